"""Converts checkpoints of the FeatInv paper's own code into weights files, and weights files into other layouts.

    python training/convert.py control_featinv_convnext.ckpt convnext.safetensors \\
        --backbone convnext_base.fb_in22k_ft_in1k --input-size 288
    python training/convert.py pooled.ckpt pooled.safetensors --backbone resnet50.a1_in1k --pooled
    python training/convert.py convnext.safetensors control.ckpt --to official
    python training/convert.py convnext.safetensors FOLDER --to diffusers
    python training/convert.py finetune.pth FOLDER --to timm --backbone resnet18.a1_in1k --classes names.txt

--to says what is written; without it, a weights file for the nodes and programs.

From the paper's code: a Lightning checkpoint or a bare state dict (.ckpt, .pth, .safetensors) that holds
`control_model.*`. Base model, autoencoder, text encoder and optimizer state are left behind. Such a file does not say
which features it inverts, so backbone, layer and pooling are named here; the backbone needs no weights for that.
The paper's ConvNeXt reads 288 pixels where timm's default for that name is 224, hence --input-size.

--to official: `control_model.*` alone, a Lightning-like .ckpt or .safetensors by OUT's name; load it with strict=False
into a model that already holds the base model. --to diffusers: a folder for ControlNetModel.from_pretrained, with the
conditional encoder beside it and a README that shows how to attach it.

--to timm: the weights of a backbone (.pth, .bin, .ckpt, .safetensors), such as your own fine-tune, into a timm-hub
folder (config.json, model.safetensors) for models/backbones and --backbone. The number of classes is read off the
weights; their names from --classes, a line or an entry of a JSON list each, or from the checkpoint where it has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import ControlNetModel

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.backbones import LAST, MODULE
from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.files import require_finite, write_safetensors, written_whole
from featinv_nodes.core.guidance import NEGATIVES
from featinv_nodes.core.sampling import PAPER_POOLED, PAPER_SAMPLING, Sampling
from featinv_nodes.core.weights import ENCODER_PREFIX, InversionInfo, load_inversion, save_inversion
from featinv_nodes.worlds import BACKBONES, model_file, open_backbone
from training.cli import run
from training.files import make_folder, write_text
from training.models.official import CONTROL, from_official, read_official, to_official
from training.models.stable_diffusion import PROMPT
from training.models.timm_folder import write_timm_folder

#: what the paper's code trains and samples with (paper Sec. 2 and Table 3)
BASE = "miniSD"
ENCODER_FILE = "feature_encoder.safetensors"
PICKLES = (".ckpt", ".pth", ".pt")


def describe_source(name: str, layer: str, pooled: bool, side: int | None = None) -> FeatureSource:
    """What a backbone's maps are, without its weights. name: timm name, timm-hub folder or embedded backbone. side:
    pixels it reads, where not its default. Raises FeatInvError for a name, layer or side that it does not have."""
    own_file = Path(name).is_dir() or name in BACKBONES or name.startswith(MODULE)
    backbone = open_backbone(name, None, side, run_code=True) if own_file else untrained_backbone(name, side)
    return replace(backbone.source(layer, pooled), weights="")  # no checkpoint says on which weights it was trained


def write_weights_file(args: argparse.Namespace) -> str:
    """Official -> ours."""
    if not args.backbone:
        raise FeatInvError(
            f"{args.input} does not say which features it inverts; give --backbone, and --layer and --pooled where they"
            " differ"
        )
    if args.output.suffix != ".safetensors":
        raise FeatInvError(f"{args.output}: a weights file's name ends in .safetensors")
    uniform = PAPER_POOLED if args.pooled else PAPER_SAMPLING
    given = {k: getattr(args, k) for k in ("strength", "guidance") if getattr(args, k) is not None}
    recommended = {**uniform, **given, "negative": args.negative, "steps": args.steps}
    recommended["timestep_spacing"] = "leading"  # as the paper's code samples
    Sampling(**recommended)  # raises if they make no sense
    official = read_official(args.input)
    require_finite({CONTROL + name: value for name, value in official.items()}, args.input)
    settings, tensors = from_official(official, args.heads, args.input)
    source = describe_source(args.backbone, args.layer, args.pooled, args.input_size)
    if source.channels != settings["channels"]:
        raise FeatInvError(
            f"{args.input} inverts features of {settings['channels']} channels, but {source.describe()}. Name the"
            " backbone and layer it was trained for"
        )
    encoder = build_encoder(settings)  # mean 0 and deviation 1: the paper does not standardise
    encoder.load_state_dict(
        {k.removeprefix(ENCODER_PREFIX): v for k, v in tensors.items() if k.startswith(ENCODER_PREFIX)}, strict=False
    )
    base = {
        "name": args.base,
        "width": settings["out_channels"],
        "context": tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "latent_channels": tensors["conv_in.weight"].shape[1],
        "heads": args.heads,
    }
    info = InversionInfo(source, settings, base, args.prompt, recommended, config={"converted_from": args.input.name})
    save_inversion(args.output, info, tensors, encoder)
    return f"{len(tensors)} tensors, {source.describe()}"


def write_official(args: argparse.Namespace) -> str:
    """Ours -> official."""
    if args.output.suffix not in (*PICKLES, ".safetensors"):
        raise FeatInvError(f"{args.output}: give a name that ends in one of {', '.join(PICKLES)} or .safetensors")
    info, tensors, encoder = load_inversion(args.input)
    require_finite(tensors, args.input)
    _, official = to_official(tensors, encoder, info.base["heads"], args.input)
    if encoder.mean.any() or (encoder.deviation != 1).any():
        raise FeatInvError(
            f"{args.input} standardises its features, for which the official layout has no place; use --to diffusers,"
            " or train with standardise: false"
        )
    state = {CONTROL + key: value.contiguous() for key, value in official.items()}
    if args.output.suffix == ".safetensors":
        write_safetensors(args.output, state, {"format": "pt"})
        return f"{len(state)} tensors"
    with written_whole(args.output) as part:
        torch.save({"state_dict": state}, part)
    return f"{len(state)} tensors"


README = """# FeatInv ControlNet: {source}

Made from {file} for diffusers. Base model: {base}. Prompt: {prompt!r}. Recommended: {recommended}.

`{encoder_file}` is the conditional encoder: it turns a feature map [B, {channels}, h, w] into the hint
[B, {out_channels}, H, W] on the latents' grid. The ControlNet takes that hint as it is, so its own embedding for
images (zeros here) is replaced:

```python
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file
from torch.nn import functional as F

folder = "."  # this folder
controlnet = ControlNetModel.from_pretrained(folder)
controlnet.controlnet_cond_embedding = torch.nn.Identity()  # hints arrive encoded
weights = load_file(f"{{folder}}/{encoder_file}")


def encode(features, size):
    x = (features - weights["mean"][:, None, None]) / weights["deviation"][:, None, None]
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    for layer in (0, 2, 4):
        x = x if layer == 0 else F.silu(x)
        x = F.conv2d(x, weights[f"block.{{layer}}.weight"], weights[f"block.{{layer}}.bias"], padding=1)
    return x
```

One step: `controlnet(latents, timestep, text_embedding, hint, conditioning_scale=strength)` with
`hint = encode(features, latents.shape[2:])`.
"""


def write_diffusers(args: argparse.Namespace) -> str:
    """Ours -> a diffusers folder, written under a temporary name and renamed."""
    if args.output.exists():
        raise FeatInvError(f"{args.output} exists already; choose another folder or remove it")
    info, tensors, encoder = load_inversion(args.input)
    require_finite(tensors, args.input)
    config, _ = to_official(tensors, encoder, info.base["heads"], args.input)
    with torch.device("meta"):
        model = ControlNetModel(**config)
    # diffusers' own embedding, for pictures, stands where our encoder does; without it, opening the folder would warn
    blank = {k: torch.zeros(v.shape) for k, v in model.state_dict().items() if k.startswith(ENCODER_PREFIX)}
    with written_whole(args.output) as part:
        part.mkdir(parents=True)
        model.save_config(part)
        write_safetensors(part / "diffusion_pytorch_model.safetensors", {**blank, **tensors}, {"format": "pt"})
        write_safetensors(part / ENCODER_FILE, encoder.state_dict(), {"featinv_encoder": json.dumps(asdict(info))})
        text = README.format(
            source=info.source.describe(),
            file=args.input.name,
            base=info.base["name"],
            prompt=info.prompt,
            recommended=json.dumps(info.recommended),
            encoder_file=ENCODER_FILE,
            **info.encoder,
        )
        write_text(part / "README.md", text)
    return f"config.json, diffusion_pytorch_model.safetensors, {ENCODER_FILE}, README.md"


def write_timm(args: argparse.Namespace) -> str:
    """A backbone's weights -> a timm-hub folder."""
    return write_timm_folder(args.output, args.input, args.backbone, args.classes, args.tag, args.input_size)


WRITERS = {
    "featinv": write_weights_file,
    "official": write_official,
    "diffusers": write_diffusers,
    "timm": write_timm,
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "input",
        metavar="IN",
        help=(
            "checkpoint of the paper's code; with --to official or diffusers, a weights file or a shipped model's"
            " name; with --to timm, a backbone's weights"
        ),
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="file, or folder with --to diffusers or timm")
    parser.add_argument(
        "--to", choices=WRITERS, default="featinv", help="what to write (default: a FeatInv weights file)"
    )
    own = parser.add_argument_group("for a weights file")
    own.add_argument(
        "--backbone",
        help=(
            "timm name, timm-hub folder or embedded backbone whose features the checkpoint inverts; with --to timm, the"
            " timm name that the weights were trained from"
        ),
    )
    own.add_argument("--layer", default=LAST, help="layer of the backbone (default: %(default)s)")
    own.add_argument("--pooled", action="store_true", help="the features are averaged over the locations")
    own.add_argument("--input-size", type=int, help="pixels the backbone reads, where not timm's default for its name")
    own.add_argument("--base", default=BASE, help="base model's name or diffusers folder (default: %(default)s)")
    own.add_argument("--heads", type=int, default=8, help="attention heads (default: %(default)s, as in SD 1.x)")
    own.add_argument("--prompt", default=PROMPT, help="text of the positive prompt (default: the paper's)")
    own.add_argument("--strength", type=float, help="recommended control strength (default: 1, pooled 1.5)")
    own.add_argument("--guidance", type=float, help="recommended guidance scale (default: 1.75, pooled 8)")
    own.add_argument("--steps", type=int, default=50, help="recommended DDIM steps (default: %(default)s)")
    own.add_argument(
        "--negative", choices=NEGATIVES, default="text", help="what guidance pushes away from (default: %(default)s)"
    )
    timm = parser.add_argument_group("for a timm-hub folder, besides --backbone and --input-size")
    timm.add_argument("--classes", type=Path, help="file with the classes' names in the order of the logits")
    timm.add_argument("--tag", help="what tells these weights from others of the architecture (default: OUT's name)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    own_layout = args.to in ("official", "diffusers")
    args.input = Path(model_file(args.input)) if own_layout else Path(args.input)
    if own_layout and args.input.suffix != ".safetensors":
        raise FeatInvError(
            f"--to {args.to} reads a FeatInv weights file (.safetensors), not {args.input}; convert that to one first"
        )
    if args.output.resolve() == args.input.resolve():
        raise FeatInvError(f"{args.output} would overwrite the input; choose another name")
    make_folder(args.output.parent)
    print(f"{args.output}: {WRITERS[args.to](args)}")


if __name__ == "__main__":
    run(main)
