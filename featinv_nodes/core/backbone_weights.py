"""The weights of a backbone: read from a file of any common kind, and put into timm's model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from .checkpoints import SUFFIXES, Checkpoint, read_checkpoint
from .errors import FeatInvError
from .files import read_weights

#: what a timm-hub folder's weights are called, the first that is there
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
COUNTER = "num_batches_tracked"  # BatchNorm's, which torch fills in


def read_backbone_weights(file: Path) -> Checkpoint:
    """The state dict in a .safetensors file or a PyTorch checkpoint, floating-point numbers in float32. Raises
    FeatInvError for a file that is missing, damaged, or of another kind."""
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


def fill(model: nn.Module, name: str, file: Path) -> None:
    """Puts the weights of a file into a model called `name`. Raises FeatInvError as read_backbone_weights does, and
    for tensors that are missing, unexpected or misshapen."""
    expected = model.state_dict()
    state = without_prefix(read_backbone_weights(file), expected)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FeatInvError(
            f"{file} does not fit {name}: {misfits(expected, state)}. Give the weights of this model, or the name they"
            " were made for. With classes of your own, make a timm-hub folder of it: training/convert.py --to timm"
        ) from error


def misfits(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> str:
    """Which keys differ, a few of each kind by name; without BatchNorm's counters."""
    wanted, found = ({k: v.shape for k, v in d.items() if not k.endswith(COUNTER)} for d in (expected, actual))
    reshaped = [k for k in wanted if k in found and found[k] != wanted[k]]
    kinds = {
        "missing": [k for k in wanted if k not in found],
        "unexpected": [k for k in found if k not in wanted],
        "misshapen": [f"{k} {list(found[k])} instead of {list(wanted[k])}" for k in reshaped],
    }
    kinds = {kind: keys for kind, keys in kinds.items() if keys}
    return "; ".join(f"{kind} {some(keys, 8 // len(kinds))}" for kind, keys in kinds.items())


def some(names: Collection[str], most: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more
