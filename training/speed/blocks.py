"""Kernels of our own beside what torch calculates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.channels_last import ChannelsLastGroupNorm, geglu
from . import real_size

Row = dict[str, str | float]


def compare_blocks(batch: int, width: int, side: int, device: str, repeats: int) -> Iterator[Row]:
    """Rows of group normalisation with SiLU and of GEGLU, by torch and ours, on random maps [batch, width, side, side]
    in channels_last and tokens [batch, side^2, 8 width], bf16."""
    maps = torch.randn(batch, width, side, side, device=device, dtype=torch.bfloat16)
    tokens = torch.randn(batch, side**2, 8 * width, device=device, dtype=torch.bfloat16)
    torchs, ours = (kind(32, width).to(maps) for kind in (nn.GroupNorm, ChannelsLastGroupNorm))
    yield from _compare(
        "group normalisation and SiLU",
        maps.contiguous(memory_format=torch.channels_last),
        {"torch": lambda x: F.silu(torchs(x)), "ours": lambda x: ours(x, silu=True)},
        repeats,
    )
    halves = {"torch": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), "ours": geglu}
    yield from _compare("GEGLU", tokens, halves, repeats)


def _compare(what: str, x: Tensor, ways: dict[str, Callable[[Tensor], Tensor]], repeats: int) -> Iterator[Row]:
    """A row for each way to calculate the same of x: its time, and how far it is from the first, relative to the
    largest value."""
    x, expected = x.requires_grad_(), None
    for name, way in ways.items():
        result = way(x)
        results = result, *torch.autograd.grad(result.square().sum(), x)
        expected = expected or results
        apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, expected)]
        seconds = real_size.seconds(lambda: torch.autograd.grad(way(x).sum(), x), repeats)  # noqa: B023
        yield {
            what: name,
            "of": f"{tuple(x.shape)} bf16",
            "ms, forward and backward": 1000 * seconds,
            "largest difference": apart[0],
            "of the gradient": apart[1],
        }
