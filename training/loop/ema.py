"""The moving average of weights that is saved and sampled from."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """average <- keep * average + (1 - keep) * model, for parameters and buffers; counters are copied."""
    kinds = defaultdict(list)
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        kinds[type(a) if a.is_floating_point() else None].append((a, b))  # FSDP shares out parameters, not buffers
    for a, b in kinds.pop(None, []):
        a.copy_(b)
    for pairs in kinds.values():
        torch._foreach_lerp_(*zip(*pairs), 1 - keep)


def kept_at(decay: float, steps: float) -> float:
    """The share of the average that a step keeps, after so many steps: `decay` in the end, less in the beginning, where
    the weights still change much (as TensorFlow's and diffusers' averages do)."""
    return min(decay, (1 + steps) / (10 + steps))
