"""Counting arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def gmac_of(run: Callable[[], object]) -> float:
    """Multiply-accumulates (10^9) of a call, gradients included, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops() / 2e9
