"""Makes a world of photographs: from folders of images or tar shards, for any timm backbone.

Stages: autoencoder (principal components of patches, then its decoder), base, an inversion model per depth in the order
given, each from the ControlNet of the one before. The results are under --out: base/ (a diffusers folder for --base),
the weights files (for --model); under --work checkpoints and panel_STAGE.png of images that no stage saw.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import WORLDS, open_backbone
from featinv_nodes.worlds.photo import PHOTO
from training.config import TrainConfig
from training.files import make_folder
from training.models.base_model import BaseModel, load_base
from training.models.controlnet import FeatureControlNet
from training.models.parts import load_vae
from training.models.sampling import noise, sample
from training.report import panel, save_image

from .autoencoder import standardise, train_decoder
from .base import build, train_base, write_base
from .inversion import BATCH, POOLED, StageCache, fresh, layer_of, train_inversion
from .photographs import Photographs, read_photographs, scaled

DEPTHS = ("blocks.4", "blocks.2", "last", POOLED)
#: of the minutes or images, what the autoencoder and the base model get; the inversion models share the rest
SHARES = {"autoencoder": 0.1, "base": 0.4}
SHORTEST = 5.0  # seconds of a stage, below which nothing is learned
SHOWN = 8
#: of the inversion models; at equal time it brings more than twice the images do
CYCLE = {"cycle": 0.5, "cycle_below": 500}
#: chosen on photographs that were kept back
RECOMMENDED = {"strength": 1.0, "guidance": 3.0, "negative": "features", "steps": 10}
#: of unpooled maps; with a pooled one the gradient pleases the network far more than an independent one:
#: docs/photographs.md
GUIDED = RECOMMENDED | {"gradient": 0.06, "gradient_steps": 5}


@dataclass(frozen=True)
class Sizes:
    """side: of the pictures in pixels. patch: pixels per latent cell. latents: channels. widths: of the U-Net's levels.

    The defaults are the embedded world's. On a processor, patch 16, latents 64 and widths (128, 160) need two fifths of
    the operations.
    """

    side: int = PHOTO.side
    patch: int = 8
    latents: int = 24
    widths: tuple[int, ...] = (96, 128, 160)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FOLDER", help="folders of photographs, or of tar shards of them"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="minutes of training in all, shared out among the stages")
    length.add_argument("--images", type=int, help="images to see in all, shared out among the stages")
    parser.add_argument(
        "--stage", help="autoencoder, base or a depth: run this stage alone, for all the minutes or images"
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        default=list(DEPTHS),
        help="layers to invert, or pooled for the last layer's mean (default: %(default)s)",
    )
    parser.add_argument(
        "--backbone",
        default=next(iter(PHOTO.backbones)),
        help="an embedded one, or a timm name or timm-hub folder (default: %(default)s)",
    )
    parser.add_argument("--backbone-weights", help="its .safetensors file")
    parser.add_argument(
        "--input-size", type=int, help="side in pixels of the images the backbone reads, where not its own"
    )
    parser.add_argument(
        "--name", default="photo_lite0", help="the weights files are NAME_DEPTH.safetensors (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/worlds/photo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder of the checkpoints (default: OUT/work)")
    parser.add_argument(
        "--views",
        type=int,
        help=(
            "crops of each photograph that are kept with their features; 0: new crops in every step (default: 1 on a"
            " processor, 0 on a GPU)"
        ),
    )
    parser.add_argument("--batch", type=int, help="images per step (default: 64 on a processor, 512 on a GPU)")
    parser.add_argument(
        "--lr", type=float, default=1.5e-3, help="peak learning rate of the base and the inversion models"
    )
    parser.add_argument("--side", type=int, default=Sizes.side, help="side of the generated images, in pixels")
    parser.add_argument("--patch", type=int, default=Sizes.patch, help="pixels per latent cell")
    parser.add_argument("--latents", type=int, default=Sizes.latents, help="channels of a latent cell")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=list(Sizes.widths), help="channels of the U-Net's levels"
    )
    parser.add_argument("--init-from", help="weights file whose ControlNet the first inversion model starts from")
    parser.add_argument(
        "--further",
        action="store_true",
        help="start stages without a checkpoint from the weights in --out, not from random ones",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile, worth its minutes in long stages on a processor"
    )


def make(args: argparse.Namespace) -> None:
    """Runs all stages in order, or the chosen one. Raises FeatInvError for bad arguments before any work."""
    stages = ["autoencoder", "base", *args.depths]
    chosen = [args.stage] if args.stage else stages
    if args.stage and args.stage not in stages:
        raise FeatInvError(f"--stage {args.stage}: expected one of {', '.join(stages)}")
    lengths = {stage: length(args, stage) for stage in chosen}
    sizes = checked(Sizes(args.side, args.patch, args.latents, tuple(args.widths)))
    require_same(args.out / "base", sizes)
    backbone = open_backbone(args.backbone, args.backbone_weights, args.input_size, run_code=True)
    for depth in args.depths:
        backbone.source(*layer_of(depth))
    make_folder(args.out)
    maker = Maker(args, sizes, backbone.to(args.device, memory_format=torch.channels_last))
    for stage in chosen:
        {"autoencoder": maker.autoencoder, "base": maker.base}.get(
            stage, lambda depth=stage, **length: maker.inversion(depth, **length)
        )(**lengths[stage])


def length(args: argparse.Namespace, stage: str) -> dict[str, float]:
    """A stage's share of the minutes or images. Raises FeatInvError where that is too little."""
    share = 1.0 if args.stage else SHARES.get(stage, (1 - sum(SHARES.values())) / len(args.depths))
    if args.images is not None:
        least = args.batch or BATCH
        if args.images * share < least:
            raise FeatInvError(
                f"--images {args.images}: stage {stage} would see {args.images * share:.0f}, less than one batch; give"
                f" at least {math.ceil(least / share)}"
            )
        return {"images": round(args.images * share)}
    if 60 * args.minutes * share < SHORTEST:
        raise FeatInvError(
            f"--minutes {args.minutes:g}: stage {stage} would have {60 * args.minutes * share:.1f} seconds; give at"
            f" least {math.ceil(SHORTEST / 6 / share) / 10}"
        )
    return {"minutes": args.minutes * share}


def checked(sizes: Sizes) -> Sizes:
    """Raises FeatInvError for sizes that do not fit together."""
    levels = 2 ** (len(sizes.widths) - 1)
    if min(sizes.patch, sizes.side) < 1 or sizes.patch % 4 or sizes.side % (sizes.patch * levels):
        raise FeatInvError(
            f"--side {sizes.side} and --patch {sizes.patch}: expected a patch that is a multiple of 4 and parts the"
            f" side into a multiple of {levels} cells"
        )
    if not 0 < sizes.latents <= 3 * sizes.patch**2 or any(width < 32 or width % 32 for width in sizes.widths):
        raise FeatInvError(
            f"--latents {sizes.latents}, --widths {sizes.widths}: expected at most {3 * sizes.patch**2} latents, and"
            " widths that are multiples of 32"
        )
    return sizes


def require_same(folder: Path, sizes: Sizes) -> None:
    """Raises FeatInvError if the folder holds a base model, finished or not, of other sizes."""
    configs = {
        part: json.loads(file.read_text(encoding="utf-8"))
        for part in ("vae", "unet")
        if (file := folder / part / "config.json").exists()
    }
    if "vae" in configs:
        known = PatchAutoencoder(
            **{name: configs["vae"][name] for name in ("patch", "latents") if name in configs["vae"]}
        ).config
        side, widths = sizes.side, sizes.widths
        if "unet" in configs:
            side, widths = configs["unet"]["sample_size"] * known["patch"], tuple(configs["unet"]["block_out_channels"])
        there = Sizes(side, known["patch"], known["latents"], widths)
        if there != sizes:
            raise FeatInvError(
                f"{folder} holds a base model of {there}, which is not {sizes}; give its sizes, or another --out"
            )


class Maker:
    """The stages, on one device, with the photographs in memory."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes, backbone: Backbone) -> None:
        self.args, self.sizes, self.backbone, self.device = args, sizes, backbone, args.device
        gpu = args.device.startswith("cuda")
        self.work, self.folder = args.work or args.out / "work", args.out / "base"
        self.views = (0 if gpu else 1) if args.views is None else args.views
        self.batch = args.batch or (512 if gpu else BATCH)
        self.step = {"graph": gpu}
        self.photographs: Photographs = read_photographs(args.data, max(backbone.input_size), self.device)

    def targets(self, pictures: Tensor) -> Tensor:
        """Crops in 0..1 as the autoencoder reads them: at the world's side, in -1..1."""
        return scaled(pictures, self.sizes.side) * 2 - 1

    def autoencoder(self, **length: float) -> None:
        """Principal components of patches, standardised; then the decoder learns to draw what they leave out."""
        if (self.folder / "vae" / "config.json").exists():
            vae = load_vae(self.folder / "vae")
        else:
            some = self.targets(self.photographs.random(3000)).cpu()
            vae = PatchAutoencoder(self.sizes.patch, self.sizes.latents, refined=False)
            vae.start_from_patches(some)
            standardise(vae, some)
            self.write(None, vae)

        def maps_of(x: Tensor) -> list[Tensor]:
            return self.backbone.stages(self.backbone.preprocess(x / 2 + 0.5, "stretch"))

        batch = min(self.batch, 128)
        vae = train_decoder(
            self.work,
            vae,
            lambda numbers: self.targets(self.photographs.random(len(numbers))),
            maps_of,
            self.device,
            batch=batch,
            noise=(0.3, 0.5),
            later=10_000,
            compile=self.args.compile,
            keep=lambda average: self.write(None, average),
            **self.step,
            **length,
        )
        self.write(None, vae)
        originals = scaled(self.photographs.held_out(SHOWN), self.sizes.side)
        drawn = (vae.decode(vae.encode(originals.cpu() * 2 - 1)) / 2 + 0.5).clamp(0, 1)
        self.show("autoencoder", "round trip", drawn)

    def base(self, **length: float) -> None:
        if not (self.folder / "vae" / "config.json").exists():
            raise FeatInvError(f"{self.folder} has no autoencoder yet; run the stage autoencoder first")
        vae = load_vae(self.folder / "vae").to(self.device, memory_format=torch.channels_last)

        @torch.no_grad()
        def latents(count: int) -> Tensor:
            return vae.encode(
                self.targets(self.photographs.random(count)).contiguous(memory_format=torch.channels_last)
            ).float()

        torch.manual_seed(0)
        made = self.args.further and (self.folder / "unet" / "config.json").exists()
        start = self.opened().unet.requires_grad_(True) if made else build_unet(self.sizes)
        unet = train_base(
            self.work,
            start,
            latents,
            self.device,
            self.batch,
            self.args.lr,
            self.args.compile,
            keep=lambda average: self.write(average, vae),
            **self.step,
            **length,
        )
        self.write(unet, vae)
        base = self.opened()
        drawn = base.decode(
            sample(base, None, None, self.noise(base, SHOWN), Sampling(steps=50, guidance=1.0), PHOTO.prompt)
        )
        self.show("base", "generated from noise", drawn)

    def inversion(self, depth: str, **length: float) -> None:
        base = self.opened()
        name, (layer, pooled) = self.file(depth).stem, layer_of(depth)
        before = [self.file(d) for d in self.args.depths[: self.args.depths.index(depth)]]
        before += [self.earlier(depth)] if self.args.further else []
        start = next((str(file) for file in reversed(before) if file.exists()), self.args.init_from)
        config = TrainConfig(
            name,
            self.backbone.name,
            base.name,
            self.args.data[0],
            PHOTO.prompt,
            1,
            layer=layer,
            pooled=pooled,
            encoder="conv_at_map",
            encoder_width=self.sizes.widths[0],
            batch=self.batch,
            lr=self.args.lr,
            ema=0.999,
            compile=self.args.compile,
            **CYCLE,
            init_from=start,
            recommended=RECOMMENDED if pooled else GUIDED,
        )
        if self.views:
            draw = StageCache(
                self.work / "kept", self.photographs, base, self.backbone, list(self.args.depths), self.views
            ).draw(depth, self.device)
        else:
            draw = fresh(self.photographs, base, self.backbone, depth)
        train_inversion(
            config, self.work, base, self.backbone, draw, self.file(depth), self.device, **self.step, **length
        )
        model, _ = FeatureControlNet.load(self.file(depth), base)
        originals = self.photographs.held_out(SHOWN)
        features = self.backbone(self.backbone.preprocess(originals, "stretch"), layer, pooled)
        drawn = base.decode(
            sample(
                base,
                model.to(self.device),
                features,
                self.noise(base, len(originals)),
                Sampling(**config.recommended),
                PHOTO.prompt,
                self.backbone,
            )
        )
        scores = cosine(features, self.backbone(self.backbone.preprocess(drawn, "stretch"), layer, pooled))
        self.show(depth, "reconstruction", drawn, scores)

    def earlier(self, depth: str) -> Path:
        """The weights that a further training starts from: a copy of the file, which the training then overwrites."""
        copy = self.work / f"before_{self.file(depth).name}"
        if self.file(depth).exists() and not (self.work / f"{self.file(depth).stem}.pt").exists():
            make_folder(self.work)
            shutil.copyfile(self.file(depth), copy)
        return copy

    def file(self, depth: str) -> Path:
        return self.args.out / f"{self.args.name}_{depth.replace('.', '')}.safetensors"

    def opened(self) -> BaseModel:
        """The current base model. Raises FeatInvError if its stage has not run."""
        if not (self.folder / "unet" / "config.json").exists():
            raise FeatInvError(f"{self.folder} has no base model yet; run the stages autoencoder and base first")
        base = load_base(self.folder, PHOTO.prompt).to(self.device)
        base.name = next(
            (world.base for world in WORLDS.values() if world.base_folder == self.folder.resolve()), str(self.folder)
        )
        return base

    def write(self, unet: torch.nn.Module | None, vae: PatchAutoencoder) -> None:
        write_base(self.folder, unet, vae, PHOTO.prompt, torch.int8)

    def noise(self, base: BaseModel, count: int) -> Tensor:
        """Starting noise of the seeds from 0 on."""
        return torch.cat([noise(base, seed) for seed in range(count)]).to(self.device)

    def show(self, stage: str, title: str, drawn: Tensor, scores: Tensor | None = None) -> None:
        """panel_STAGE.png in the folder of the checkpoints: pictures that were kept back, and what the stage makes of
        them."""
        captions = [""] * len(drawn) if scores is None else [f"cos {score:.2f}" for score in scores.tolist()]
        originals = [(picture, "") for picture in scaled(self.photographs.held_out(SHOWN), self.sizes.side).cpu()]
        file = self.work / f"panel_{stage}.png"
        save_image(
            panel([originals, list(zip(drawn.cpu(), captions))], ["original", title], f"{self.args.name}: {stage}"),
            file,
        )
        print(f"see {file}")


def build_unet(sizes: Sizes) -> torch.nn.Module:
    return build(sizes.side // sizes.patch, sizes.latents, sizes.widths)
