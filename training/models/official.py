"""The layout of the FeatInv paper's own code, and the conversion of tensors from it and to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import misfits, opened
from featinv_nodes.core.weights import ENCODER_PREFIX

CONTROL = "control_model."
FIRST_HINT = "input_hint_block.block.1.weight"

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
    """Raises FeatInvError, naming some of each kind, for missing, unexpected and misshapen tensors."""
    if differing := misfits(expected, actual):
        raise FeatInvError(
            f"{file} does not fit the ControlNet that its blocks describe: {differing}. Is it a complete FeatInv"
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
        raise FeatInvError(f"{file} has the conditional encoder {kind!r}; other programs read only the paper's, 'conv'")
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
    state = _read_safetensors(file) if file.suffix == ".safetensors" else read_checkpoint(file)
    control = {k.removeprefix(CONTROL): v for k, v in state.items() if k.startswith(CONTROL)}
    if not control:
        parts = sorted({".".join(k.split(".")[:2]) for k in state})
        raise FeatInvError(
            f"{file} has no tensors {CONTROL}*; it has {', '.join(parts[:8]) or 'none at all'}. Give a checkpoint of"
            " the ControlNet, not of the base model"
        )
    return control


def _read_safetensors(file: Path) -> dict[str, Tensor | None]:
    with opened(file) as handle:
        if "featinv" in (handle.metadata() or {}):
            raise FeatInvError(
                f"{file} is a FeatInv weights file already; to convert it, give --to official or --to diffusers"
            )
        keys = list(handle.keys())
        chosen = [key for key in keys if key.startswith(CONTROL)]
        return {key: handle.get_tensor(key) for key in chosen} or dict.fromkeys(keys)
