"""Makes the drawn world: backbones, autoencoder, base model and inversion models, from scenes that the code draws.

Each stage writes its result into featinv_nodes/worlds/drawn/ when it is done, rcdm into training/evaluation/ as only
the evaluation reads it. The stage card measures everything and writes CARD.md, which also says how long the stages
took, and with which --images, --batch and --graph the shipped files were made on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.concepts import save_concepts
from featinv_nodes.core.files import write_weights
from featinv_nodes.core.weights import load_inversion, save_inversion
from featinv_nodes.worlds import concepts_file, open_backbone
from featinv_nodes.worlds.drawn import DRAWN, FOLDER
from featinv_nodes.worlds.drawn.scenes import draw
from training.config import CONFIGS, read_config
from training.data.scope import ship_scope
from training.evaluation.rcdm import EMBEDDED, save_rcdm
from training.files import write_json
from training.loop.graph import check_device
from training.loop.training import train
from training.models.base_model import load_base
from training.models.parts import load_vae

from . import autoencoder, backbones, base, rcdm
from .card import write_card
from .concepts import fit_concepts
from .loop import read_images_seen

#: pictures that two processor cores see in hours; the shipped files saw more on a GPU, see CARD.md
INVERSION_IMAGES = {
    "tiny_cnn_last": 180_000,
    "tiny_cnn_stage": 90_000,
    "tiny_cnn_pooled": 15_000,
    "tiny_vit_last": 90_000,
}
STAGES = ("cnn", "vit", "autoencoder", "decoder", "base", *DRAWN.models, "rcdm", "scope", "concepts", "card")


def ship_backbone(kind: str, work: Path, device: str) -> None:
    model = backbones.train_cnn(work, device) if kind == "cnn" else backbones.train_vit(work, load_cnn(), device)
    model = model.cpu()
    folder = DRAWN.backbones[f"tiny-{kind}"].folder
    architecture, arguments = backbones.SPECS[kind]
    config = {
        "architecture": architecture,
        "num_classes": len(backbones.CLASSES),
        "model_args": arguments,
        "label_names": backbones.CLASSES,
        "pretrained_cfg": {
            "tag": backbones.TAG,
            "input_size": [3, 64, 64],
            "fixed_input_size": kind == "vit",
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(backbones.MEAN),
            "std": list(backbones.STD),
            "num_classes": len(backbones.CLASSES),
        },
    }
    write_weights(folder / "model.safetensors", model.state_dict(), torch.float16)
    write_json(folder / "config.json", config)
    print(kind, json.dumps(backbones.accuracy(model)))


def load_cnn() -> torch.nn.Module:
    return open_backbone("tiny-cnn").model


def ship_autoencoder(work: Path, device: str, decoder: bool) -> None:
    if decoder:
        cnn = load_cnn().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

        def pictures(numbers: torch.Tensor) -> torch.Tensor:
            return backbones.normalise(draw(0, numbers + autoencoder.IMAGES).image)

        maps_of, images = autoencoder.stages_of(cnn), autoencoder.DECODER_IMAGES
        vae = autoencoder.train_decoder(
            work, load_vae(DRAWN.base_folder / "vae"), pictures, maps_of, device, images=images
        )
    else:
        vae = autoencoder.train_autoencoder(work, load_cnn(), device)
    base.write_base(DRAWN.base_folder, None, vae.cpu(), DRAWN.prompt)


def ship_base(work: Path, device: str, further: bool, scale: dict) -> None:
    """The base model, new or the shipped one trained further, on cached latents of training scenes."""
    vae, scale = load_vae(DRAWN.base_folder / "vae"), {"images": base.IMAGES} | scale
    start = load_base(DRAWN.base, DRAWN.prompt).unet.requires_grad_(True) if further else base.build()
    latents = base.cached_latents(work, vae, device, min(base.CACHED, scale["images"] // 3)).to(device)

    def some(count: int) -> torch.Tensor:
        return latents[torch.randint(len(latents), (count,), device=device)].float()

    unet = base.train_base(work, start, some, device, **scale).cpu()
    base.write_base(DRAWN.base_folder, unet, vae.cpu(), DRAWN.prompt)


def ship_inversion(name: str, work: Path, further: bool, scale: dict) -> None:
    """A shipped model: its configuration as train.py reads it, with more images and another seed."""
    scale = {"compile": True, "seed": 2 if further else 1} | scale
    images = scale.pop("images", INVERSION_IMAGES[name])
    scale |= {"max_images": images, "warmup": images // 50, "save_every": images // 20, "panel_every": images // 4}
    config = read_config(CONFIGS / f"{name}.yaml", {k: str(v) for k, v in scale.items()})
    config.init_from = str(FOLDER / f"{name}.safetensors") if further else None
    info, controlnet, encoder = load_inversion(train(config, work / name))
    save_inversion(FOLDER / f"{name}.safetensors", info, controlnet, encoder, torch.float16)


def ship_rcdm(work: Path, device: str, images: int, file: Path = EMBEDDED) -> None:
    """The drawn world's RCDM; of a finished checkpoint in `work` only the file is made."""
    backbone = open_backbone("tiny-cnn")
    model = rcdm.train_rcdm(work, backbone, images, device)
    images_seen = read_images_seen(work, "rcdm")
    about = {
        "steps": rcdm.STEPS,
        "images_seen": images_seen,
        "gmac_per_picture": round(rcdm.COST, 3),
        "gmac": round(images_seen * rcdm.COST),
    }
    save_rcdm(file, model, backbone.source(LAST, True), about)
    print("rcdm", json.dumps(about))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone")
    parser.add_argument("--work", type=Path, default=Path("out/worlds/drawn"), help="folder of the checkpoints")
    parser.add_argument(
        "--further", action="store_true", help="train the shipped base or inversion models further instead of new ones"
    )
    parser.add_argument(
        "--images",
        type=int,
        help="images seen by the base, inversion model or RCDM (default: what two processor cores do in hours)",
    )
    parser.add_argument("--batch", type=int, help="images per step of these")
    parser.add_argument("--lr", type=float, help="peak learning rate of these")
    parser.add_argument(
        "--graph", action="store_true", help="one CUDA graph per step instead of torch.compile, for these"
    )


def make(args: argparse.Namespace) -> None:
    """Runs all stages in order, or the chosen one."""
    scale = {k: v for k, v in {"images": args.images, "batch": args.batch, "lr": args.lr}.items() if v is not None}
    scale |= {"graph": True, "compile": False} if args.graph else {}
    if args.graph:
        check_device(args.device)
    for stage in [args.stage] if args.stage else STAGES:
        if stage in ("cnn", "vit"):
            ship_backbone(stage, args.work, args.device)
        elif stage in ("autoencoder", "decoder"):
            ship_autoencoder(args.work, args.device, stage == "decoder")
        elif stage == "base":
            ship_base(args.work, args.device, args.further, scale)
        elif stage == "rcdm":
            ship_rcdm(args.work, args.device, args.images or rcdm.IMAGES)
        elif stage == "concepts":
            save_concepts(concepts_file("tiny_cnn_concepts"), fit_concepts(open_backbone("tiny-cnn")))
        elif stage == "scope":
            for name in DRAWN.models:
                ship_scope(name)
        elif stage == "card":
            write_card()
        else:
            ship_inversion(stage, args.work, args.further, scale)
