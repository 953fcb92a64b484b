"""The paper's own figures, which a report puts beside the measured ones, and the settings that they were made with
(arXiv 2505.21032, Sec. 4.1, Tables 1 and 3, and its released program for ConvNeXt)."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.sampling import PAPER_POOLED, PAPER_SAMPLING, Sampling

from ..models.base_model import BaseModel
from .report import Grid

PER_CLASS, PICTURES = 10, 10_000  # validation pictures of each class, and of all 1000
SIDE = 256  # of the pictures that MiniSD draws, and that both sets of the FID are stored at
RESIZE = "bilinear"  # of both sets (Sec. 2)
SEED = 100  # of the noise, the same for every picture
#: timm architecture -> side of the pictures that it reads (Table 3)
INPUT = {
    "resnet50.tv_in1k": 224,
    "resnet50.a1_in1k": 224,
    "convnext_base.fb_in22k_ft_in1k": 288,
    "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k": 384,
}
#: timm architecture, pooled -> (cosine, top-5 match in %, top-1 match in %, FID); 10,000 validation pictures of
#: ImageNet
RECONSTRUCTION = {
    ("resnet50.tv_in1k", False): (0.46, 91, 70, 11.49),
    ("resnet50.a1_in1k", False): (0.50, 90, 70, 11.51),
    ("convnext_base.fb_in22k_ft_in1k", False): (0.61, 94, 77, 8.20),
    ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", False): (0.53, 95, 80, 12.69),
    ("resnet50.tv_in1k", True): (0.12, 48, 23, 31.64),
    ("resnet50.a1_in1k", True): (0.14, 44, 21, 37.44),
    ("convnext_base.fb_in22k_ft_in1k", True): (0.19, 44, 20, 31.67),
    ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", True): (0.16, 47, 22, 49.04),
}


def sampling(pooled: bool) -> Sampling:
    """50 steps of DDIM at the released program's timesteps, 1, 21, ... 981, and the uniform strength and guidance of
    Table 3's caption; those chosen for each model are not published."""
    return Sampling(**(PAPER_POOLED if pooled else PAPER_SAMPLING), timestep_spacing="leading")


def set_cut(backbone: Backbone) -> None:
    """Makes a backbone cut pictures as the released program does: the whole shorter side, bilinear."""
    backbone.crop_pct, backbone.crop_mode, backbone.interpolation = 1.0, "center", RESIZE


def stored(pictures: Tensor) -> Tensor:
    """Originals [B, 3, h, w] in 0..1 as the released program stores them beside the reconstructions: as JPEG, with
    Pillow's settings."""
    return torch.cat([_as_jpeg(picture)[None] for picture in pictures])


def _as_jpeg(picture: Tensor) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray((picture.cpu() * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG")
    decoded = torch.frombuffer(bytearray(Image.open(buffer).tobytes()), dtype=torch.uint8)
    return decoded.view(*picture.shape[1:], 3).permute(2, 0, 1) / 255


def beside(backbone: str, layer: str, pooled: bool) -> str:
    """One line with the paper's figures for the same features; "" where it has none."""
    if layer != LAST or (backbone, pooled) not in RECONSTRUCTION:
        return ""
    cosine, top5, top1, fid = RECONSTRUCTION[backbone, pooled]
    return (
        f"The paper, for the same features (Tables 1 and 3): cosine {cosine:.2f} on the unpooled map, top-5 match"
        f" {top5} %, top-1 match {top1} %, FID {fid}."
    )


def table(source: FeatureSource, own: dict[str, dict]) -> Grid | None:
    """The paper's row of Table 1 and this model's below it, in the paper's columns; None for features that it has no
    figures for. own: the reconstruction's figures."""
    known = RECONSTRUCTION.get((source.backbone, source.pooled)) if source.layer == LAST else None
    if known is None:
        return None
    score = "cosine_unpooled" if source.pooled else "cosine"
    value = {name: own[name]["value"] for name in (score, "top1_match", "top5_match", "fid") if name in own}
    match = f"{value['top5_match']:.0%} ({value['top1_match']:.0%})" if "top1_match" in value else "-"
    found = [f"{value[score]:.2f}", match, f"{value['fid']:.2f}" if "fid" in value else "-", f"{own[score]['n']:,}"]
    cosine, top5, top1, fid = known
    published = [f"{cosine:.2f}", f"{top5}% ({top1}%)", f"{fid:.2f}", f"{PICTURES:,}"]
    kind = "pooled" if source.pooled else "unpooled"
    return Grid(
        "Beside the paper's Table 1",
        ["model", "cosine-sim", "top5(1) match", "FID", "pictures"],
        [[f"the paper, {kind} {source.backbone}", *published], ["this model", *found]],
        "" if "fid" in value else "FID needs --inception FILE.",
    )


def departures(source: FeatureSource, base: BaseModel, count: int, data: str) -> list[str]:
    """What still differs from the paper's set-up, a sentence each."""
    lines = []
    if count != PICTURES:
        lines.append(
            f"{count} images of {data}; the paper's are the first ten of each class of ImageNet's validation set."
        )
    if base.resolution != SIDE:
        lines.append(f"The base model generates images of {base.resolution} pixels; the paper's, MiniSD, of {SIDE}.")
    side = INPUT.get(source.backbone)
    if side and source.input_size != (side, side):
        lines.append(f"{source.backbone} reads {source.input_size[0]} pixels here; in the paper {side}.")
    return lines
