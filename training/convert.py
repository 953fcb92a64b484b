"""Converts checkpoints of the FeatInv paper's own code into weights files, and weights files into other layouts.

    python training/convert.py control_featinv_convnext.ckpt convnext.safetensors \\
        --backbone convnext_base.fb_in22k_ft_in1k --input-size 288
    python training/convert.py pooled.ckpt pooled.safetensors --backbone resnet50.a1_in1k --pooled
    python training/convert.py convnext.safetensors control.ckpt --to official
    python training/convert.py convnext.safetensors FOLDER --to diffusers

--to says what is written; without it, a weights file for the nodes and programs.

From the paper's code: a Lightning checkpoint or a bare state dict (.ckpt, .pth, .safetensors) that holds
`control_model.*`. Base model, autoencoder, text encoder and optimizer state are left behind. Such a file does not say
which features it inverts, so backbone, layer and pooling are named here; the backbone needs no weights for that.
The paper's ConvNeXt reads 288 pixels where timm's default for that name is 224, hence --input-size.

--to official: `control_model.*` alone, a Lightning-like .ckpt or .safetensors by OUT's name; load it with strict=False
into a model that already holds the base model. --to diffusers: a folder for ControlNetModel.from_pretrained, with the
conditional encoder beside it and a README that shows how to attach it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import ControlNetModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from featinv_nodes.core.backbones import LAST, MODULE, untrained_backbone
from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.feature_map import FeatInvError, FeatureSource
from featinv_nodes.core.files import read_pickle, write_safetensors
from featinv_nodes.core.guidance import NEGATIVES
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.weights import ENCODER_PREFIX, InversionInfo, load_inversion, save_inversion
from featinv_nodes.worlds import BACKBONES, model_file, open_backbone
from training.cli import run
from training.files import make_folder, write_text
from training.models.stable_diffusion import PROMPT

CONTROL = "control_model."
FIRST_HINT = "input_hint_block.block.1.weight"
#: what the paper's code trains and samples with (paper Sec. 2 and Table 3)
BASE = "miniSD"
ENCODER_FILE = "feature_encoder.safetensors"
PICKLES = (".ckpt", ".pth", ".pt")

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TIME = {"linear_1": "0", "linear_2": "2"}


def official_name(name: str, layers: int) -> str:
    """The official name of a tensor in our weights file, the encoder's included. layers: residual blocks per level.

    The official code numbers blocks through all levels: input_blocks.0 is the first convolution, then each level has
    its residual blocks (.0, attention .1) and a downsampler. Raises KeyError or ValueError for names without
    counterpart.
    """

    def block(level: str, index: int) -> str:
        return f"input_blocks.{1 + int(level) * (layers + 1) + index}"

    match name.split("."):
        case ["conv_in", *rest]:
            place = "input_blocks.0.0"
        case ["time_embedding", layer, *rest]:
            place = f"time_embed.{TIME[layer]}"
        case ["down_blocks", level, "resnets", index, part, *rest]:
            place = f"{block(level, int(index))}.0.{RESNET[part]}"
        case ["down_blocks", level, "attentions", index, *rest]:
            place = f"{block(level, int(index))}.1"
        case ["down_blocks", level, "downsamplers", "0", "conv", *rest]:
            place = f"{block(level, layers)}.0.op"
        case ["mid_block", "resnets", index, part, *rest]:
            place = f"middle_block.{2 * int(index)}.{RESNET[part]}"
        case ["mid_block", "attentions", "0", *rest]:
            place = "middle_block.1"
        case ["controlnet_down_blocks", index, *rest]:
            place = f"zero_convs.{int(index)}.0"
        case ["controlnet_mid_block", *rest]:
            place = "middle_block_out.0"
        case ["controlnet_cond_embedding", "block", index, *rest]:
            place = f"input_hint_block.block.{int(index) + 1}"  # .0 upsamples
        case _:
            raise KeyError(name)
    return ".".join([place, *rest])


def controlnet_config(official: Mapping[str, Tensor], heads: int) -> dict:
    """Settings of the diffusers ControlNetModel that tensors under official names (without prefix) describe.

    heads: attention heads, which shapes do not tell (official code: num_heads). Raises FeatInvError for tensors that
    describe no ControlNet of the SD 1.x kind.
    """
    numbers = [int(key.split(".")[1]) for key in official if re.match(r"input_blocks\.\d+\.", key)]
    levels: list[list[int]] = [[]]
    for number in range(1, max(numbers, default=0) + 1):
        if _has(official, f"input_blocks.{number}.0.op."):
            levels.append([])
        else:
            levels[-1].append(number)
    sizes = [len(level) for level in levels]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise FeatInvError(
            f"{CONTROL}input_blocks form levels of {sizes} residual blocks; expected the same number in each, as in SD"
            " 1.x (2)"
        )
    widths = [_shape(official, f"zero_convs.{level[-1]}.0.weight")[0] for level in levels]
    wrong = [w for w in widths if w % 32 or heads < 1 or w % heads]
    if wrong:
        raise FeatInvError(
            f"the blocks' widths are {widths}; expected multiples of 32 and of the {heads} attention heads. Is --heads"
            " right?"
        )
    attention = [any(_has(official, f"input_blocks.{number}.1.") for number in level) for level in levels]
    return {
        "in_channels": _shape(official, "input_blocks.0.0.weight")[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": sizes[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "cross_attention_dim": _shape(official, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": heads,  # diffusers' older name for the number of heads
        "flip_sin_to_cos": True,
    }


def _has(tensors: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in tensors)


def _shape(official: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in official or official[key].ndim < 2:
        state = "is missing" if key not in official else f"has shape {tuple(official[key].shape)}"
        raise FeatInvError(f"{CONTROL}{key} {state}; expected the ControlNet of the FeatInv paper's code")
    return tuple(official[key].shape)


def skeleton(config: dict, encoder: dict) -> dict[str, Tensor]:
    """All tensors of a weights file by their names, without data (on the meta device). encoder: for build_encoder."""
    with torch.device("meta"):
        model = ControlNetModel(**config)
        model.controlnet_cond_embedding = build_encoder(encoder)
    return model.state_dict()


def require_fit(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str | Path) -> None:
    """Raises FeatInvError, listing up to eight of each, for missing, unexpected and misshapen tensors."""
    shapes = [
        f"{k} {tuple(actual[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in actual
        if k in expected and actual[k].shape != expected[k].shape
    ]
    groups = {
        "missing": [k for k in expected if k not in actual],
        "unexpected": [k for k in actual if k not in expected],
        "misshapen": shapes,
    }
    texts = [
        f"{name}: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
        for name, keys in groups.items()
        if keys
    ]
    if texts:
        raise FeatInvError(
            f"{file} does not fit the ControlNet that its blocks describe. {'; '.join(texts)}. Is it a complete FeatInv"
            " checkpoint of the SD 1.x kind?"
        )


def from_official(official: Mapping[str, Tensor], heads: int, file: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Tensors under official names, without prefix -> (encoder settings, the same tensors under our names).

    No tensor changes. Raises FeatInvError, naming file, for tensors that are missing, unexpected or misshapen.
    """
    config = controlnet_config(official, heads)
    hidden, channels = _shape(official, FIRST_HINT)[:2]
    settings = {
        "kind": "conv",
        "channels": channels,
        "out_channels": config["block_out_channels"][0],
        "width": hidden,
        "kernel": 3,
    }
    ours = {
        k: v
        for k, v in skeleton(config, settings).items()
        if k.removeprefix(ENCODER_PREFIX) not in ("mean", "deviation")
    }
    names = {official_name(key, config["layers_per_block"]): key for key in ours}
    require_fit({CONTROL + k: v for k, v in official.items()}, {CONTROL + k: ours[v] for k, v in names.items()}, file)
    return settings, {names[key]: value for key, value in official.items()}


def to_official(
    tensors: Mapping[str, Tensor], encoder: nn.Module, heads: int, file: str | Path
) -> tuple[dict, dict[str, Tensor]]:
    """A weights file's ControlNet and encoder -> (ControlNetModel settings, tensors under official names, without
    prefix).

    The encoder's mean and deviation have no official name and are left out. Raises FeatInvError as from_official does,
    and for an encoder of another kind than the paper's.
    """
    if (kind := encoder.settings["kind"]) != "conv":
        raise FeatInvError(
            f"{file} has the conditional encoder {kind!r}; other programs know the paper's, 'conv', alone"
        )
    layers = len({key.split(".")[3] for key in tensors if key.startswith("down_blocks.0.resnets.")})
    ours = {**tensors, **{ENCODER_PREFIX + k: v for k, v in encoder.state_dict().items()}}
    official = {}
    for key, value in ours.items():
        try:
            official[official_name(key, layers)] = value
        except (KeyError, ValueError):
            pass  # require_fit names it
    config = controlnet_config(official, heads)
    require_fit(ours, skeleton(config, encoder.settings), file)
    return config, official


def read_official(file: Path) -> dict[str, Tensor]:
    """The ControlNet's tensors of a checkpoint of the paper's code, names without `control_model.`.

    Pickles are opened with weights_only: nothing in them is run. Raises FeatInvError for a missing or incomplete file,
    one with objects besides tensors, a FeatInv weights file, and one without a ControlNet.
    """
    if not file.is_file():
        raise FeatInvError(f"checkpoint {file} does not exist")
    state = _read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    control = {
        k.removeprefix(CONTROL): v for k, v in state.items() if str(k).startswith(CONTROL) and isinstance(v, Tensor)
    }
    if not control:
        parts = sorted({".".join(str(k).split(".")[:2]) for k in state})
        raise FeatInvError(
            f"{file} has no tensors {CONTROL}*; it has {', '.join(parts[:8]) or 'none at all'}. Give a checkpoint of"
            " the ControlNet, not of the base model"
        )
    return control


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            if "featinv" in (opened.metadata() or {}):
                raise FeatInvError(
                    f"{file} is a FeatInv weights file already; to convert it, give --to official or --to diffusers"
                )
            keys = list(opened.keys())
            chosen = [key for key in keys if key.startswith(CONTROL)]
            return {key: opened.get_tensor(key) for key in chosen} or dict.fromkeys(keys)
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error


def describe_source(name: str, layer: str, pooled: bool, side: int | None = None) -> FeatureSource:
    """What a backbone's maps are, without its weights. name: timm name, timm-hub folder or embedded backbone. side:
    pixels it reads, where not its default. Raises FeatInvError for a name, layer or side that it does not have."""
    own_file = Path(name).is_dir() or name in BACKBONES or name.startswith(MODULE)
    backbone = open_backbone(name, None, side, run_code=True) if own_file else untrained_backbone(name, side)
    return backbone.source(layer, pooled)


def write_weights_file(args: argparse.Namespace) -> str:
    """Official -> ours."""
    if not args.backbone:
        raise FeatInvError(
            f"{args.input} does not say which features it inverts; give --backbone, and --layer and --pooled where they"
            " differ"
        )
    if args.output.suffix != ".safetensors":
        raise FeatInvError(f"{args.output}: a weights file's name ends in .safetensors")
    uniform = {"strength": 1.5, "guidance": 8.0} if args.pooled else {"strength": 1.0, "guidance": 1.75}
    given = {k: getattr(args, k) for k in ("strength", "guidance") if getattr(args, k) is not None}
    recommended = {**uniform, **given, "negative": args.negative, "steps": args.steps}
    recommended["timestep_spacing"] = "leading"  # as the paper's code samples
    Sampling(**recommended)  # raises if they make no sense
    settings, tensors = from_official(read_official(args.input), args.heads, args.input)
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
    part = args.output.with_name(args.output.name + ".part")
    try:
        torch.save({"state_dict": state}, part)
        os.replace(part, args.output)
    finally:
        part.unlink(missing_ok=True)
    return f"{len(state)} tensors"


README = """# FeatInv ControlNet: {source}

Made from {file} for diffusers. Base model: {base}. Prompt: {prompt!r}. Recommended: {recommended}.

`{encoder_file}` is the conditional encoder: it turns a feature map [B, {channels}, h, w] into the hint
[B, {out_channels}, H, W] on the latents' grid. The ControlNet takes that hint as it is, so its own embedding for
pictures (zeros here) is replaced:

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
    config, _ = to_official(tensors, encoder, info.base["heads"], args.input)
    with torch.device("meta"):
        model = ControlNetModel(**config)
    # diffusers' own embedding, for pictures, stands where our encoder does; without it, opening the folder would warn
    blank = {k: torch.zeros(v.shape) for k, v in model.state_dict().items() if k.startswith(ENCODER_PREFIX)}
    part = args.output.with_name(args.output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
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
        os.replace(part, args.output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"config.json, diffusion_pytorch_model.safetensors, {ENCODER_FILE}, README.md"


WRITERS = {"featinv": write_weights_file, "official": write_official, "diffusers": write_diffusers}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "input",
        metavar="IN",
        help=(
            "checkpoint of the paper's code; with --to official or diffusers, a weights file or a shipped model's name"
        ),
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="file, or folder with --to diffusers")
    parser.add_argument(
        "--to", choices=WRITERS, default="featinv", help="what to write (default: a FeatInv weights file)"
    )
    own = parser.add_argument_group("for a weights file")
    own.add_argument(
        "--backbone", help="timm name, timm-hub folder or embedded backbone whose features the checkpoint inverts"
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
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    args.input = Path(args.input) if args.to == "featinv" else Path(model_file(args.input))
    if args.to != "featinv" and args.input.suffix != ".safetensors":
        raise FeatInvError(
            f"--to {args.to} reads a FeatInv weights file (.safetensors), not {args.input}; convert that to one first"
        )
    if args.output.resolve() == args.input.resolve():
        raise FeatInvError(f"{args.output} would overwrite the input; choose another name")
    make_folder(args.output.parent)
    print(f"{args.output}: {WRITERS[args.to](args)}")


if __name__ == "__main__":
    run(main)
