"""The weights of a backbone: read from a file of any common kind, and put into timm's model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor, nn

from .checkpoints import SUFFIXES, Checkpoint, read_checkpoint
from .digests import COUNTER, digest
from .errors import FeatInvError
from .files import misfits, read_weights, require_finite
from .transformers_weights import from_transformers

#: what a timm-hub folder's weights are called, the first that is there
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
POSITIONS = "pos_embed"


def read_backbone_weights(file: Path) -> Checkpoint:
    """The state dict in a .safetensors file or a PyTorch checkpoint, floating-point numbers in float32. Raises
    FeatInvError for a file that is missing, damaged, or of another kind."""
    if file.is_dir():
        raise FeatInvError(f"backbone weights {file} are a folder; expected one of its files, such as {HUB_FILES[0]}")
    if not file.is_file():
        raise FeatInvError(
            f"backbone weights {file} do not exist; python3 run.py download CONFIG fetches a configuration's"
        )
    if file.suffix == ".safetensors":
        return Checkpoint(read_weights(file))
    if file.suffix not in SUFFIXES:
        raise FeatInvError(f"{file}: backbone weights are a file in .safetensors or one of {', '.join(SUFFIXES)}")
    state = read_checkpoint(file)
    for name, value in state.items():
        state[name] = value.float() if value.is_floating_point() else value
    return state


def prefix_in(state: Collection[str], expected: Collection[str]) -> str:
    """What stands before the names of a model's tensors in a state dict: "module." of DataParallel, "model." of many
    trainers' modules, or nothing. The rest of the state dict, such as a loss with weights, may have other names."""
    needed = [name for name in expected if not name.endswith(COUNTER)]
    found = {name.removesuffix(needed[0]) for name in state if name.endswith(needed[0])} if needed else set()
    for prefix in sorted(found, key=len):
        if all(prefix + name in state for name in needed):
            return prefix
    return ""


def without_prefix(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The tensors that belong to a model with these names, as prefix_in finds them."""
    prefix = prefix_in(state, expected)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def at_grid(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the position embedding at the input size that a vision transformer was built for: made smaller
    as timm and transformers do, larger as transformers does (timm's way is another bicubic)."""
    stored, own, patches = state.get(POSITIONS), getattr(model, POSITIONS, None), getattr(model, "patch_embed", None)
    grid = getattr(patches, "grid_size", None)
    tokens = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    if stored is None or own is None or grid is None or stored.shape == own.shape or stored.ndim != 3:
        return state
    if stored.shape[2] != own.shape[2] or not is_square(stored.shape[1] - tokens):
        return state  # misfits names it
    from timm.layers import resample_abs_pos_embed  # timm takes seconds to import

    smaller = own.shape[1] < stored.shape[1]
    resampled = resample_abs_pos_embed(stored, list(grid), num_prefix_tokens=tokens, antialias=smaller)
    return state | {POSITIONS: resampled}


def is_square(count: int) -> bool:
    """Whether so many positions make a square grid."""
    return count > 0 and isqrt(count) ** 2 == count


def fill(model: nn.Module, name: str, file: Path) -> str:
    """Puts the weights of a file, under timm's names or those of transformers, into a model called `name`; returns the
    digest of the weights under timm's names, which is the same at every input size. Raises FeatInvError as
    read_backbone_weights does, and for tensors that are missing, unexpected, misshapen or not finite."""
    expected = model.state_dict()
    stored: Mapping[str, Tensor] = read_backbone_weights(file)
    state = from_transformers(stored) or without_prefix(stored, expected)
    fitted = at_grid(model, state)
    try:
        model.load_state_dict(fitted, strict=True)
    except RuntimeError as error:
        raise FeatInvError(
            f"{file} does not fit {name}: {misfits(expected, fitted)}. Give the weights of this model, or the name they"
            " were made for. With classes of your own, make a timm-hub folder of it: training/convert.py --to timm"
        ) from error
    require_finite(dict(model.named_parameters()), file)  # of a head that gives NaN, every picture is of one class
    return digest(state)
