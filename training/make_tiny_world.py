"""Makes the embedded world's weights, stage by stage, from nothing.

    python training/make_tiny_world.py                 all stages in order
    python training/make_tiny_world.py --stage vit     one of them
    python training/make_tiny_world.py --stage base --further --work out/more     train what is shipped further

Stages: cnn, vit (backbones), autoencoder, decoder (again, for noisy latents), base, the four inversion models, rcdm (what
the evaluation compares with), scope statistics, concepts, card. Each goes on where it was stopped and writes its result into
featinv_nodes/tiny_world/ when it is done, rcdm into training/evaluation/ as only the evaluation reads it. The stage card measures everything and writes CARD.md, which also says how long the stages took, and with which --images, --batch
and --graph the shipped files were made on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import DDIMScheduler

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.concepts import save_concepts
from featinv_nodes.core.files import write_safetensors
from featinv_nodes.core.weights import load_inversion, save_inversion
from featinv_nodes.tiny_world import BACKBONES, CONCEPTS, FOLDER, MODELS, open_backbone
from training.cli import run
from training.config import CONFIGS, read_config
from training.evaluation.rcdm import EMBEDDED, save_rcdm
from training.fit_scope import ship_scope
from training.loop.graph import check_device
from training.models.base_model import load_base, load_vae
from training.tiny import autoencoder, backbones, base, rcdm
from training.tiny.card import write_card
from training.tiny.concepts import fit_concepts
from training.train import train

#: pictures that two processor cores see in hours; the shipped files saw more on a GPU, see CARD.md
INVERSION_IMAGES = {"tiny_cnn_last": 180_000, "tiny_cnn_stage": 90_000, "tiny_cnn_pooled": 15_000, "tiny_vit_last": 90_000}
STAGES = ("cnn", "vit", "autoencoder", "decoder", "base", *MODELS, "rcdm", "scope", "concepts", "card")


def half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict in fp16, as shipped."""
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in module.state_dict().items()}


def ship_backbone(kind: str, work: Path, device: str) -> None:
    model = backbones.train_cnn(work, device) if kind == "cnn" else backbones.train_vit(work, load_cnn(), device)
    model = model.cpu()
    folder = FOLDER / BACKBONES[f"tiny-{kind}"][0]
    architecture, arguments = backbones.SPECS[kind]
    config = {
        "architecture": architecture, "num_classes": len(backbones.CLASSES), "model_args": arguments,
        "label_names": backbones.CLASSES,
        "pretrained_cfg": {
            "tag": backbones.TAG, "input_size": [3, 64, 64], "fixed_input_size": kind == "vit", "interpolation": "bicubic", "crop_pct": 1.0,
            "crop_mode": "center", "mean": list(backbones.MEAN), "std": list(backbones.STD), "num_classes": len(backbones.CLASSES),
        },
    }
    write_safetensors(folder / "model.safetensors", half(model), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(kind, json.dumps(backbones.accuracy(model)))


def load_cnn() -> torch.nn.Module:
    return open_backbone("tiny-cnn").model


def ship_autoencoder(work: Path, device: str, decoder: bool) -> None:
    if decoder:
        vae = autoencoder.train_decoder(work, load_vae(FOLDER / "base" / "vae"), load_cnn(), device)
    else:
        vae = autoencoder.train_autoencoder(work, load_cnn(), device)
    folder = FOLDER / "base" / "vae"
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", half(vae), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "PatchAutoencoder"}) + "\n")


def ship_base(work: Path, device: str, further: bool, scale: dict) -> None:
    folder = FOLDER / "base"
    start = load_base("tiny", base.PROMPT).unet.requires_grad_(True) if further else None
    unet = base.train_base(work, load_vae(folder / "vae"), device, start=start, **scale).cpu()
    unet.half().save_pretrained(folder / "unet")
    DDIMScheduler(**base.SCHEDULE).save_pretrained(folder / "scheduler")
    text = base.prompt_embeddings()
    write_safetensors(folder / "prompts.safetensors", {base.PROMPT: text["prompt"], "": text["empty"]}, {"format": "pt"})


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
    """The embedded world's RCDM; of a finished checkpoint in `work` only the file is made."""
    backbone = open_backbone("tiny-cnn")
    model = rcdm.train_rcdm(work, backbone, images, device)
    seen = torch.load(work / "rcdm.pt", map_location="cpu", weights_only=True, mmap=True)["seen"]
    about = {"steps": rcdm.STEPS, "images_seen": seen, "gmac_per_picture": round(rcdm.COST, 3), "gmac": round(seen * rcdm.COST)}
    save_rcdm(file, model, backbone.source(LAST, True), about)
    print("rcdm", json.dumps(about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone")
    parser.add_argument("--work", type=Path, default=Path("out/tiny_world"), help="folder of the checkpoints")
    parser.add_argument("--further", action="store_true", help="train the shipped base or inversion models further instead of new ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores to use")
    parser.add_argument("--images", type=int, help="pictures seen by the base, inversion model or RCDM (default: what two processor cores do in hours)")
    parser.add_argument("--batch", type=int, help="pictures per step of these")
    parser.add_argument("--rate", type=float, help="peak learning rate of these")
    parser.add_argument("--graph", action="store_true", help="one CUDA graph per step instead of torch.compile, for these")
    args = parser.parse_args()
    scale = {k: v for k, v in {"images": args.images, "batch": args.batch, "rate": args.rate}.items() if v is not None}
    scale |= {"graph": True, "compile": False} if args.graph else {}
    if args.graph:
        check_device(args.device)
    torch.set_num_threads(args.threads)
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
            save_concepts(FOLDER / CONCEPTS, fit_concepts(open_backbone("tiny-cnn")))
        elif stage == "scope":
            for name in MODELS:
                ship_scope(name)
        elif stage == "card":
            write_card()
        else:
            ship_inversion(stage, args.work, args.further, scale)


if __name__ == "__main__":
    run(main)
