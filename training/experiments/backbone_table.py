"""Tries backbones of many timm families with random weights, and writes a table of the results.

    python training/experiments/backbone_table.py                     writes docs/backbones.md
    python training/experiments/backbone_table.py NAME [NAME ...]     prints the rows of these timm models

A row compares the head's output for the extracted last map with the model's own output, and the map with that of timm's
forward_intermediates.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError

FILE = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"
TOLERANCE = 1e-5
WIDE = {"img_size": (160, 224)}
#: timm sizes a network without img_size by its configuration
WIDE_CNN = {"pretrained_cfg_overlay": {"input_size": (3, 160, 224)}}

TRIED: list[tuple[str, str, dict]] = [
    ("ResNet", "resnet50.tv_in1k", {}),
    ("ResNet", "resnet50.a1_in1k", {}),
    ("ConvNeXt", "convnext_base.fb_in22k_ft_in1k", {}),
    ("Swin v2", "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", {}),
    ("ResNet, wide input", "resnet18.a1_in1k", WIDE_CNN),
    ("ResNet v2", "resnetv2_18.ra4_e3600_r224_in1k", {}),
    ("ResNeSt", "resnest14d.gluon_in1k", {}),
    ("SK-ResNet", "skresnet18.ra_in1k", {}),
    ("RegNet", "regnetx_002.pycls_in1k", {}),
    ("DenseNet", "densenet121.ra_in1k", {}),
    ("VGG", "vgg11.tv_in1k", {}),
    ("Inception v3", "inception_v3.tv_in1k", {}),
    ("Inception v4", "inception_v4.tf_in1k", {}),
    ("Xception", "legacy_xception.tf_in1k", {}),
    ("DLA", "dla34.in1k", {}),
    ("DPN", "dpn48b.untrained", {}),
    ("HRNet", "hrnet_w18_small.gluon_in1k", {}),
    ("VoVNet", "ese_vovnet19b_dw.ra_in1k", {}),
    ("CSPNet", "cs3darknet_s.untrained", {}),
    ("HGNet v2", "hgnetv2_b0.ssld_stage2_ft_in1k", {}),
    ("RepVGG", "repvgg_a0.rvgg_in1k", {}),
    ("NFNet", "nfnet_l0.ra2_in1k", {}),
    ("EfficientNet", "efficientnet_b0.ra_in1k", {}),
    ("EfficientNet v2", "tf_efficientnetv2_b0.in1k", {}),
    ("MobileNet v3", "mobilenetv3_small_050.lamb_in1k", {}),
    ("MobileNet v4", "mobilenetv4_conv_small.e2400_r224_in1k", {}),
    ("GhostNet", "ghostnet_050.untrained", {}),
    ("ReXNet", "rexnet_100.nav_in1k", {}),
    ("FasterNet", "fasternet_t0.in1k", {}),
    ("StarNet", "starnet_s1.in1k", {}),
    ("ConvNeXt v2", "convnextv2_atto.fcmae_ft_in1k", {}),
    ("InceptionNeXt", "inception_next_atto.sail_in1k", {}),
    ("MambaOut", "mambaout_femto.in1k", {}),
    ("FocalNet", "focalnet_tiny_srf.ms_in1k", {}),
    ("PoolFormer", "poolformer_s12.sail_in1k", {}),
    ("CAFormer", "caformer_s18.sail_in1k", {}),
    ("EdgeNeXt", "edgenext_xx_small.in1k", {}),
    ("FastViT", "fastvit_t8.apple_in1k", {}),
    ("MobileViT", "mobilevit_xxs.cvnets_in1k", {}),
    ("EfficientFormer", "efficientformer_l1.snap_dist_in1k", {}),
    ("EfficientFormer v2", "efficientformerv2_s0.snap_dist_in1k", {}),
    ("EfficientViT, MIT", "efficientvit_b0.r224_in1k", {}),
    ("EfficientViT, MSRA", "efficientvit_m0.r224_in1k", {}),
    ("RepViT", "repvit_m0_9.dist_300e_in1k", {}),
    ("LeViT", "levit_128s.fb_dist_in1k", {}),
    ("MaxViT", "maxvit_tiny_tf_224.in1k", {}),
    ("CoAtNet", "coatnet_0_rw_224.sw_in1k", {}),
    ("Swin", "swin_tiny_patch4_window7_224.ms_in1k", {}),
    ("Swin v2, wide input", "swinv2_tiny_window8_256.ms_in1k", {"img_size": (128, 192)}),
    ("Swin v2-CR", "swinv2_cr_tiny_ns_224.sw_in1k", {}),
    ("DaViT", "davit_tiny.msft_in1k", {}),
    ("GC ViT", "gcvit_xxtiny.in1k", {}),
    ("NesT", "nest_tiny_jx.goog_in1k", {}),
    ("Next-ViT", "nextvit_small.bd_in1k", {}),
    ("TinyViT", "tiny_vit_5m_224.dist_in22k_ft_in1k", {}),
    ("Hiera", "hiera_tiny_224.mae_in1k_ft_in1k", {}),
    ("PVT v2", "pvt_v2_b0.in1k", {}),
    ("Twins", "twins_svt_small.in1k", {}),
    ("MViT v2", "mvitv2_tiny.fb_in1k", {}),
    ("Sequencer", "sequencer2d_s.in1k", {}),
    ("ViT, class token", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", {}),
    ("ViT, average", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"global_pool": "avg"}),
    ("ViT, wide input", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", WIDE),
    ("ViT, ResNet stem", "vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", {}),
    ("ViT, relative positions", "vit_relpos_small_patch16_224.sw_in1k", {}),
    ("SigLIP, attention pool", "vit_base_patch16_siglip_224.webli", {"depth": 4}),
    ("DeiT, distilled", "deit_tiny_distilled_patch16_224.fb_in1k", {}),
    ("DeiT III", "deit3_small_patch16_224.fb_in1k", {}),
    ("DINOv2", "vit_small_patch14_dinov2.lvd142m", {"img_size": 224}),
    ("DINOv2, registers, wide input", "vit_small_patch14_reg4_dinov2.lvd142m", {"img_size": (168, 224)}),
    ("DINOv3", "vit_small_patch16_dinov3.lvd1689m", {}),
    ("EVA-02", "eva02_tiny_patch14_224.mim_in22k", {}),
    ("BEiT", "beit_base_patch16_224.in22k_ft_in22k_in1k", {"depth": 4}),
    ("BEiT v2", "beitv2_base_patch16_224.in1k_ft_in22k_in1k", {"depth": 4}),
    ("SAM's ViT", "samvit_base_patch16_224", {"depth": 4}),
    ("NaFlexViT", "naflexvit_base_patch16_gap.e300_s576_in1k", {"depth": 4}),
    ("CaiT", "cait_xxs24_224.fb_dist_in1k", {}),
    ("XCiT", "xcit_nano_12_p16_224.fb_in1k", {}),
    ("ConViT", "convit_tiny.fb_in1k", {}),
    ("TNT", "tnt_s_patch16_224.in1k", {}),
    ("VOLO", "volo_d1_224.sail_in1k", {}),
    ("MLP-Mixer", "mixer_s16_224.untrained", {}),
    ("CoaT-Lite", "coat_lite_tiny.in1k", {}),
    ("CoaT", "coat_tiny.in1k", {}),
    ("CrossViT", "crossvit_9_240.in1k", {}),
    ("PiT", "pit_ti_224.in1k", {}),
    ("EfficientViM", "efficientvim_m1.e300_in1k", {}),
]

PROSE = """# Backbones that were tried

Which timm models work as backbones, for those who choose one. Other models may work too; this page lists those that
were tried. A model with the verdict *equal* can be inverted at its last layer and at its named layers.

Each row is a model with random weights on two random images. Three columns give the largest difference, relative to the
largest value:

- *head*: between the head's output for the extracted last map and the model's own output;
- *images*: between the model's outputs for the two images;
- *map*: between the extracted map and the last one of timm's `forward_intermediates`. It is "-" if their sizes differ,
  and not 0 if further modules follow the last named layer.

*Equal* means that *head* is at most 1e-5 and at most a thousandth of *images*.
`python training/experiments/backbone_table.py` writes this page. With a timm name it prints that model's row.
timm {timm}, torch {torch}, float32 on the CPU.

"""
HEADER = (
    "| family | timm model | input | prefix tokens | last map, C x H x W | named layers, C x H x W | outputs | head |"
    " images | map | verdict |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
)


@torch.no_grad()
def randomise(model: nn.Module, pictures: Tensor) -> nn.Module:
    """Adds noise to what starts constant (zero-init heads, LayerScale, normalisations), and sets the batch statistics
    by one pass of the pictures, so that the signal neither fades nor explodes."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            parameter += 0.1 * torch.randn_like(parameter)
    norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        model(pictures)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def normalised(backbone: Backbone, pictures: Tensor) -> Tensor:
    """What the model itself reads, computed apart from Backbone."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    return (pictures - mean) / std


def compared(backbone: Backbone, pictures: Tensor) -> tuple[float, float, float | None]:
    """The differences of the table for preprocessed pictures [2, 3, h, w]: head, pictures, map (None: not to be
    compared).

    Raises FeatInvError if the model's head reads no single spatial map.
    """
    features = backbone.extract(pictures)
    values = normalised(backbone, pictures)
    with torch.inference_mode():
        own = backbone.model(values)
        head = difference(backbone.logits(features), own)
        ask = partial(
            backbone.model.forward_intermediates, values, indices=1, intermediates_only=True, output_fmt="NCHW"
        )
        try:
            (timms,) = ask(norm=True)
        except AssertionError:  # "normalization of features not supported": there is none before the head
            (timms,) = ask(norm=False)
    return (
        head,
        difference(own[:1], own[1:]),
        difference(features.values, timms) if timms.shape == features.values.shape else None,
    )


def shape(backbone: Backbone, layer: str) -> str:
    source = backbone.source(layer)
    return " x ".join(map(str, (source.channels, *source.grid)))


def row(family: str, name: str, arguments: dict) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(name, pretrained=False, **arguments), name)
    height, width = backbone.input_size
    pictures = F.interpolate(torch.rand(2, 3, 8, 8), (height, width), mode="bicubic").clamp(0, 1)
    randomise(backbone.model, normalised(backbone, pictures))
    stages = backbone.layers[1:]
    named = f"{len(stages)}: " + ", ".join(
        f"{layer} {shape(backbone, layer)}" for layer in dict.fromkeys((stages[0], stages[-1]))
    )
    cells = [
        family,
        f"`{name}`" + "".join(f", {k}={v}" for k, v in arguments.items() if k != "pretrained_cfg_overlay"),
        f"{height} x {width}",
    ]
    try:
        head, control, same = compared(backbone, pictures)
    except FeatInvError as error:
        reason = str(error).split(";")[0].replace(f" of {name}", "")
        return f"| {' | '.join([*cells, '-', '-', named, '-', '-', '-', '-', 'named layers only: ' + reason])} |\n"
    last = backbone.last_map
    verdict = "equal" if head <= min(TOLERANCE, control / 1000) else "DIFFERENT"
    outputs = backbone.model.num_classes or f"{last.channels}, no classes"
    numbers = [f"{head:.1e}", f"{control:.1e}", "-" if same is None else f"{same:.1e}", verdict]
    return f"| {' | '.join([*cells, str(last.prefix), shape(backbone, 'last'), named, str(outputs), *numbers])} |\n"


def write(tried: list[tuple[str, str, dict]], file: Path) -> None:
    """Tries each (family, timm name, arguments of timm.create_model), one model at a time, and writes the table."""
    rows = []
    for number, one in enumerate(tried, 1):
        rows.append(row(*one))
        print(number, rows[-1], end="", flush=True)
    equal, families = sum(line.endswith("| equal |\n") for line in rows), {name.split(",")[0] for name, *_ in tried}
    count = f"{len(rows)} models of {len(families)} families: {equal} equal, {len(rows) - equal} not.\n\n"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        PROSE.format(timm=timm.__version__, torch=torch.__version__) + count + HEADER + "".join(rows), encoding="utf-8"
    )
    print(f"wrote {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="timm models to try; without any, those of the table")
    names = parser.parse_args().names
    unknown = [name for name in names if not timm.is_model(name.split(".")[0])]
    if unknown:
        parser.error(f"timm does not know {', '.join(unknown)}")
    if names:
        print(HEADER + "".join(row("", name, {}) for name in names), end="")
    else:
        write(TRIED, FILE)
