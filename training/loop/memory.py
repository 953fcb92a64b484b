"""Checks before a training run whether it fits the device's memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import nn

from featinv_nodes.core.errors import FeatInvError

MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes per parameter
#: where Linux names a container's limit, by the version of its control groups
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available(device: torch.device) -> float:
    """GB of a device: all of a GPU's; for a processor this computer's, or the container's where that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 1e9
    return min(psutil.virtual_memory().total, *map(_limit, LIMITS)) / 1e9


def _limit(file: str) -> float:
    """Bytes that a control group's file names; infinite where there is no file, or no limit in it."""
    try:
        return float(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max"
        return float("inf")


def needed(trained: nn.Module, frozen: list[nn.Module], average: bool, moments: int = 8, shares: int = 1) -> float:
    """GB that weights (float32), gradients, AdamW's two moments (bytes per parameter) and the moving average take,
    where they are shared out one of `shares`, and the frozen parts in their precision; activations come on top."""
    own = sum(p.numel() for p in trained.parameters()) / shares
    others = sum(p.numel() * p.element_size() for m in frozen for p in m.parameters())
    return (own * (8 + moments + 4 * average) + others) / 1e9


def require(device: torch.device, *parts: object) -> None:
    """Raises FeatInvError if not even weights and optimizer fit. parts: as needed takes them."""
    required, there = needed(*parts), available(device)
    if required > there:
        raise FeatInvError(
            f"training needs {required:.1f} GB for weights and optimizer alone, and more with each image of the"
            f" batch; {device} has {there:.1f} GB"
        )


def explain(error: torch.OutOfMemoryError, batch: int, device: torch.device, *parts: object) -> FeatInvError:
    """What to do when a step did not fit. parts: as needed takes them."""
    return FeatInvError(
        f"{device} ran out of its {available(device):.1f} GB at batch {batch}: weights and optimizer take"
        f" {needed(*parts):.1f} GB, the batch the rest; lower --batch and raise --accumulate, or use --checkpointing"
        f" true or --optimizer adamw8bit. Checkpoints are kept ({str(error).splitlines()[0]})"
    )
