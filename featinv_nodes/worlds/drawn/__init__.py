"""The drawn world: scenes of one or two objects on a background, 64 pixels, with true masks. See CARD.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..world import Shipped, World

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent


def held_out(numbers: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] in 0..1 of the held-out scenes with these numbers [B]."""
    from .scenes import draw  # torch takes seconds to import

    return draw(0, numbers, "held-out").image


DRAWN = World(
    name="drawn",
    title="the drawn world",
    folder=FOLDER,
    base="tiny",
    side=64,
    prompt="a drawing of the small world",
    backbones={
        "tiny-cnn": Shipped("resnet10t.tiny_world", FOLDER / "backbone_cnn"),
        "tiny-vit": Shipped("vit_tiny_patch16_224.tiny_world", FOLDER / "backbone_vit"),
    },
    independent={"resnet10t.tiny_world": "tiny-vit", "vit_tiny_patch16_224.tiny_world": "tiny-cnn"},
    models=("tiny_cnn_last", "tiny_cnn_stage", "tiny_cnn_pooled", "tiny_vit_last"),
    concepts=("tiny_cnn_concepts",),
    decoders=("decoder_tiny_vit_last",),
    outside=(
        "This model knows drawn scenes only; a photograph is outside its world and comes back as the nearest scene."
    ),
    draw=held_out,
)
