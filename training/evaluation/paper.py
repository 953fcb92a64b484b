"""The paper's own figures, which a report puts beside the measured ones, and the settings that they were made with
(arXiv 2505.21032, Sec. 4.1, Tables 1 and 3, and its released program for ConvNeXt)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.sampling import PAPER_POOLED, PAPER_SAMPLING, Sampling

from ..models.base_model import BaseModel
from .report import Grid

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


@dataclass(frozen=True)
class Pictures:
    """Which pictures a suite's figures in the paper are of: how many, in words, and how many of each class folder, None
    for as many as there are."""

    count: int
    words: str
    per_class: int | None = None


TEN_OF_EACH = Pictures(10_000, "the first ten of each class of ImageNet's validation set", 10)  # Sec. 4.1, App. B and C
ONE_OF_EACH = Pictures(1000, "one of each class of ImageNet's validation set", 1)  # Figs. 10 and 11
IMAGENET_A = Pictures(7500, "all of ImageNet-A")  # Sec. 4.2
BAID = Pictures(10_000, "some of BAID")  # Fig. 5


@dataclass(frozen=True)
class Published:
    """A row of the paper: cosine on the unpooled map, top-5 and top-1 match in %, None where it has none, FID; of which
    pictures, and where it stands."""

    cosine: float
    top5: int | None
    top1: int | None
    fid: float
    pictures: Pictures = TEN_OF_EACH
    where: str = "Tables 1 and 3"

    @property
    def match(self) -> str:
        return "-" if self.top5 is None else f"{self.top5}% ({self.top1}%)"


RESNET50, RESNET50B, CONVNEXT, SWINV2 = INPUT
#: timm architecture, pooled -> figures with the convolutional encoder
RECONSTRUCTION = {
    (RESNET50, False): Published(0.46, 91, 70, 11.49),
    (RESNET50B, False): Published(0.50, 90, 70, 11.51),
    (CONVNEXT, False): Published(0.61, 94, 77, 8.20),
    (SWINV2, False): Published(0.53, 95, 80, 12.69),
    (RESNET50, True): Published(0.12, 48, 23, 31.64),
    (RESNET50B, True): Published(0.14, 44, 21, 37.44),
    (CONVNEXT, True): Published(0.19, 44, 20, 31.67),
    (SWINV2, True): Published(0.16, 47, 22, 49.04),
}
PERCEIVER = {(SWINV2, False): Published(0.36, 76, 53, 22.65)}
#: suite -> figures of other pictures than those of Table 1
ELSEWHERE = {
    "ood": {(CONVNEXT, False): Published(0.48, None, None, 12.98, BAID, "Sec. 4.2")},
    "natural-adversarial": {(CONVNEXT, False): Published(0.56, 71, 38, 12.44, IMAGENET_A, "Sec. 4.2")},
}


def published(suite: str, source: FeatureSource, encoder: str = "conv") -> Published | None:
    """The paper's figures in a suite for the same features and kind of encoder; None where it has none."""
    rows = ELSEWHERE.get(suite, PERCEIVER if encoder == "perceiver" else RECONSTRUCTION)
    return rows.get((source.backbone, source.pooled)) if source.layer == LAST else None


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


def beside(row: Published) -> str:
    """One line with the paper's figures."""
    match = "" if row.top5 is None else f", top-5 match {row.top5} %, top-1 match {row.top1} %"
    return (
        f"The paper, for the same features ({row.where}): cosine {row.cosine:.2f} on the unpooled map{match}, FID"
        f" {row.fid:.2f}."
    )


def table(row: Published, source: FeatureSource, own: dict[str, dict]) -> Grid:
    """The paper's row and this model's below it, in the columns of Table 1. own: the reconstruction's figures."""
    score = "cosine_unpooled" if source.pooled else "cosine"
    value = {name: own[name]["value"] for name in (score, "top1_match", "top5_match", "fid") if name in own}
    match = f"{value['top5_match']:.0%} ({value['top1_match']:.0%})" if "top1_match" in value else "-"
    found = [f"{value[score]:.2f}", match, f"{value['fid']:.2f}" if "fid" in value else "-", f"{own[score]['n']:,}"]
    kind = "pooled" if source.pooled else "unpooled"
    return Grid(
        f"Beside the paper ({row.where})",
        ["model", "cosine-sim", "top5(1) match", "FID", "pictures"],
        [
            [
                f"the paper, {kind} {source.backbone}",
                f"{row.cosine:.2f}",
                row.match,
                f"{row.fid:.2f}",
                f"{row.pictures.count:,}",
            ],
            ["this model", *found],
        ],
        "" if "fid" in value else "FID needs --inception FILE.",
    )


def departures(source: FeatureSource, base: BaseModel, count: int, data: str, pictures: Pictures) -> list[str]:
    """What still differs from the paper's set-up, a sentence each. pictures: those of the suite in the paper."""
    lines = []
    if count != pictures.count:
        lines.append(
            f"{count} image{'s' * (count != 1)} of {data}; the paper's are {pictures.count:,}: {pictures.words}."
        )
    if base.resolution != SIDE:
        lines.append(f"The base model generates images of {base.resolution} pixels; the paper's, MiniSD, of {SIDE}.")
    side = INPUT.get(source.backbone)
    if side and source.input_size != (side, side):
        lines.append(f"{source.backbone} reads {source.input_size[0]} pixels here; in the paper {side}.")
    return lines
