"""The moving average of weights that is saved and sampled from."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """average <- keep * average + (1 - keep) * model, for parameters and buffers; counters are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    old, new = zip(*((a, b) for a, b in pairs if a.is_floating_point()))
    torch._foreach_lerp_(old, new, 1 - keep)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)
