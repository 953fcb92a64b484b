"""A run's checkpoints: the newest whole one is found by itself, and older ones go only after a new one was read
back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from featinv_nodes.core.errors import FeatInvError

from ..checksum import is_whole, write_checksummed

#: one file whatever the number of processes and however they share the weights
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather(model: nn.Module, optimizer: Optimizer, average: nn.Module | None) -> dict:
    """The state of a run with parameters by name, on the CPU of the main process; every process calls this."""
    state = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    return state | ({"average": get_model_state_dict(average, options=FULL)} if average is not None else {})


def restore(state: dict, model: nn.Module, optimizer: Optimizer, average: nn.Module | None) -> None:
    """Puts back what gather gave; an average that the run did not have before starts from the weights."""
    set_model_state_dict(model, state["model"], options=FULL)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FULL)
    if average is not None:
        set_model_state_dict(average, state.get("average", state["model"]), options=FULL)


def whole(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The model itself; where processes share out its weights (FSDP), a built one, which has them on the main process.
    Every process calls this."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model
    fresh, weights = build(), get_model_state_dict(model, options=FULL)
    if weights:
        fresh.load_state_dict(weights)
    return fresh


def save(folder: Path, images_seen: int, state: dict, keep: int) -> None:
    """Writes the checkpoint of `images_seen` images, reads it back, and then lets go of all but the newest `keep`.

    Raises FeatInvError where that fails, a full disk above all; those before are kept then.
    """
    try:
        file = write_checksummed(
            folder, f"checkpoint-{images_seen:012d}", ".pt", lambda opened: torch.save(state, opened)
        )
    except (OSError, RuntimeError) as error:
        raise FeatInvError(
            f"the checkpoint at {images_seen} images was not written to {folder} ({error}); those before are kept: make"
            " room there"
        ) from error
    before = [other for other in _all(folder) if other.name < file.name]
    for other in set(_all(folder)) - {file, *before[: keep - 1]}:
        other.unlink()


def newest(folder: Path, say: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over. None where there is none at all.

    Raises FeatInvError if every one is damaged, since starting anew would end in their loss.
    """
    there = _all(folder)
    for file in there:
        if is_whole(file):
            return file
        say(f"{file} is damaged and passed over")
    if there:
        raise FeatInvError(
            f"no checkpoint in {folder} is whole; to start anew, remove them: {', '.join(f.name for f in there)}"
        )
    return None


def load(file: Path) -> dict:
    """What save was given, its tensors read when they are used."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _all(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)
