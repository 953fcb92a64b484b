"""The sample panel of a run: held-out images and their reconstructions."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import as_seen
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import drawing_world
from featinv_nodes.worlds.drawn.scenes import draw

from ..config import STREAM, TrainConfig
from ..data.listing import Part, open_listing
from ..data.stream import first_pictures
from ..models.base_model import BaseModel
from ..models.controlnet import FeatureControlNet
from ..models.sampling import noise, sample
from ..report import panel

COUNT, SIDE = 8, 512  # pictures, and the pixels a side that their centre is scaled to


def held_out(config: TrainConfig) -> Tensor:
    """[COUNT, 3, h, w] pictures that training does not see: held-out scenes; of photographs, whose augmented versions
    it does see, an even choice, of a stream the first, less those that cannot be read. Raises FeatInvError if none can.
    """
    if drawing_world(config.data):
        return draw(config.seed, torch.arange(COUNT), "held-out").image
    if config.data.startswith(STREAM):
        pictures = [_square(picture) for picture in first_pictures(config.data, COUNT)]
    else:
        listing = open_listing(config.data, None)
        chosen = Part(listing, min(COUNT, len(listing.names)))
        pictures = [x for index in range(len(chosen.names)) if (x := _read(chosen, index)) is not None]
    if not pictures:
        raise FeatInvError(f"data {config.data}: no image to show could be read")
    return torch.stack(pictures)


def _read(listing: Part, index: int) -> Tensor | None:
    try:
        with listing.open(index) as opened:
            return _square(as_seen(opened))
    except Exception:  # decoders raise whatever they stumble over; training names the picture
        return None


def _square(picture: Image.Image) -> Tensor:
    fitted = ImageOps.fit(picture, (SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, np.float32) / 255).permute(2, 0, 1)


@torch.inference_mode()
def sample_panel(
    base: BaseModel, backbone: Backbone, model: FeatureControlNet, config: TrainConfig
) -> tuple[Image.Image, float]:
    """Draws held-out pictures from their features with fixed noise; the panel and the mean cosine. Always without
    guidance by the gradient, which would hide how well the weights are trained."""
    learning = model.training
    model.eval()
    pixel_values = backbone.preprocess(held_out(config).to(base.unet.device))
    features = backbone(pixel_values, config.layer, config.pooled)
    sampling = Sampling.chosen(config.recommended, {"gradient": 0.0})
    start = torch.cat([noise(base, seed) for seed in range(len(pixel_values))])
    pictures = base.decode(sample(base, model, features, start, sampling, config.prompt))
    model.train(learning)
    score = cosine(features, backbone(backbone.preprocess(pictures, "stretch"), config.layer, config.pooled))
    rows = [[(x, "") for x in pixel_values], [(x, f"cos {c:.2f}") for x, c in zip(pictures, score.tolist())]]
    return (
        panel(rows, ["original", "reconstruction"], f"{config.name}, mean cosine {score.mean():.3f}"),
        score.mean().item(),
    )
