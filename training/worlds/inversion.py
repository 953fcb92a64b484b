"""Trains the inversion models of a world of photographs: one layer after the other, on the world's frozen base
model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.digests import digest
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import InversionInfo
from training.config import TrainConfig
from training.files import write_json
from training.loop.objective import training_loss
from training.loop.setup import start_from
from training.models.base_model import BaseModel
from training.models.controlnet import FeatureControlNet

from .loop import read_images_seen, train_stage
from .photographs import Photographs, scaled

POOLED = "pooled"
BATCH, PART = 64, 512
SAMPLE = 512  # pictures that the features' mean and deviation are taken from

#: a number -> so many random (latents [B, C, H, W], feature values [B, C_f, h, w])
Draw = Callable[[int], tuple[Tensor, Tensor]]


def layer_of(depth: str) -> tuple[str, bool]:
    """(layer, pooled) of a depth: a layer's name, or "pooled" for the last layer's mean."""
    return (LAST, True) if depth == POOLED else (depth, False)


def fresh(photographs: Photographs, base: BaseModel, backbone: Backbone, depth: str) -> Draw:
    """New crops without end: latents and features are computed in the step, for a GPU."""
    layer, pooled = layer_of(depth)

    @torch.no_grad()
    def draw(count: int) -> tuple[Tensor, Tensor]:
        pictures = photographs.random(count)
        latents = base.encode(scaled(pictures, base.resolution).contiguous(memory_format=torch.channels_last))
        return latents.float(), backbone.values(backbone.preprocess(pictures, "stretch"), layer, pooled).float()

    return draw


class StageCache:
    """`views` crops of each photograph, their latents and the features of all depths computed once and kept in a
    folder: for a processor, where a backbone costs as much as a training step. A stopped cache continues."""

    def __init__(
        self, folder: Path, photographs: Photographs, base: BaseModel, backbone: Backbone, depths: list[str], views: int
    ) -> None:
        layers = list(dict.fromkeys(layer_of(depth)[0] for depth in depths))
        count, side = views * len(photographs.pictures), base.latent_size
        shapes = {"latents": (base.describe()["latent_channels"], side, side)}
        shapes |= {layer: ((source := backbone.source(layer)).channels, *source.grid) for layer in layers}
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "count": count,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "of": _digest(photographs, base, backbone),
            "done": 0,
        }
        file = folder / "kept.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else manifest
        fits = {**known, "done": 0} == manifest
        manifest["done"] = known["done"] if fits else 0
        mode = "r+" if manifest["done"] and all((folder / f"{name}.npy").exists() for name in shapes) else "w+"
        if mode == "w+":
            manifest["done"] = 0
            write_json(file, manifest)  # before the files: whoever is stopped here must not take them for filled
            _require_room(folder, 2 * count * sum(math.prod(shape) for shape in shapes.values()), list(shapes))
        self.rows = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.float16, (count, *shape))
            for name, shape in shapes.items()
        }
        self._fill(file, manifest, photographs, base, backbone, layers)

    @torch.no_grad()
    def _fill(
        self,
        file: Path,
        manifest: dict,
        photographs: Photographs,
        base: BaseModel,
        backbone: Backbone,
        layers: list[str],
    ) -> None:
        count, pictures, device = manifest["count"], len(photographs.pictures), photographs.pictures.device
        generator = torch.Generator().manual_seed(0)
        top, left = (torch.randint(photographs.margin + 1, (count,), generator=generator) for _ in range(2))
        mirrored = torch.rand(count, generator=generator) < 0.5
        with tqdm(total=count, initial=manifest["done"], desc="features", unit="img", mininterval=5) as bar:
            for first in range(manifest["done"], count, PART):
                for rows in torch.arange(first, min(first + PART, count)).split(BATCH):
                    crops = photographs.crops(
                        *(part.to(device) for part in (rows % pictures, top[rows], left[rows], mirrored[rows]))
                    )
                    pixel_values = backbone.preprocess(crops, "stretch").contiguous(memory_format=torch.channels_last)
                    self.rows["latents"][rows] = base.encode(scaled(crops, base.resolution)).half().cpu().numpy()
                    for layer, values in backbone.several(pixel_values, layers).items():
                        self.rows[layer][rows] = values.half().cpu().numpy()
                    bar.update(len(rows))
                for part in self.rows.values():
                    part.flush()
                write_json(file, manifest | {"done": min(first + PART, count)})

    def draw(self, depth: str, device: str) -> Draw:
        """Random cached rows for one depth."""
        layer, pooled = layer_of(depth)

        def rows(count: int) -> tuple[Tensor, Tensor]:
            picked = np.sort(
                np.random.default_rng(torch.randint(2**31, ()).item()).integers(0, len(self.rows["latents"]), count)
            )
            latents, values = (
                torch.from_numpy(self.rows[name][picked]).to(device).float() for name in ("latents", layer)
            )
            return latents, values.mean((2, 3), keepdim=True) if pooled else values

        return rows


def _digest(photographs: Photographs, base: BaseModel, backbone: Backbone) -> str:
    """What kept rows are of: some of the photographs' pixels, the autoencoder and the network."""
    sha = hashlib.sha256(f"{backbone.name} {digest(base.vae)} {digest(backbone.model)}".encode())
    sha.update(photographs.pictures[::7, :, ::32, ::32].cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def _require_room(folder: Path, required: int, names: list[str]) -> None:
    """Raises FeatInvError where files of so many bytes do not fit: a mapped file on a full disk ends the process."""
    free = shutil.disk_usage(folder).free + sum(
        file.stat().st_size for name in names if (file := folder / f"{name}.npy").exists()
    )
    if required > free:
        raise FeatInvError(
            f"{folder} has {free / 1e9:.1f} GB left and the features need {required / 1e9:.1f}: make room there, or"
            " give fewer --depths, or --views 0"
        )


def train_inversion(
    config: TrainConfig,
    work: Path,
    base: BaseModel,
    backbone: Backbone,
    draw: Draw,
    file: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.int8,
    **stage,  # of train_stage
) -> None:
    """One inversion model, written to `file` after each minute and at the end. config.init_from: a weights file whose
    ControlNet it starts from. The encoder standardises its features."""
    torch.manual_seed(config.seed)
    model = FeatureControlNet.start(
        base, backbone.source(config.layer, config.pooled), config.encoder_width, config.encoder
    )
    model = model.to(device, memory_format=torch.channels_last)
    # images that the other model has seen; None where the encoder is a new one
    before = start_from(model, config.init_from, base) if config.init_from else None
    if before is None:
        model.encoder.standardise(draw(SAMPLE)[1])
    forward = torch.compile(model) if config.compile else model

    def loss_of(indices: Tensor) -> Tensor:
        latents, features = draw(len(indices))
        with torch.autocast(device, torch.bfloat16):
            return training_loss(base, backbone, forward, latents, features, config)

    def keep(average: FeatureControlNet) -> None:
        images_seen = (before or 0) + read_images_seen(work, config.name)
        info = InversionInfo(
            model.source,
            model.encoder.settings,
            base.describe(),
            config.prompt,
            config.recommended,
            images_seen,
            {"name": config.name, "seed": config.seed, "cycle": config.cycle, "cycle_below": config.cycle_below},
        )
        average.save(file, info, dtype)

    train_stage(
        config.name,
        model,
        loss_of,
        batch=config.batch,
        lr=config.lr,
        work=work,
        ema=config.ema,
        decay=config.weight_decay,
        seed=config.seed,
        device=device,
        keep=keep,
        **stage,
    )
