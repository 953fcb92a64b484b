"""Group normalisation of channels_last maps and its gradient, in Triton.

Each program takes one group of one map, [S, C / groups] with S = H * W, and reads it from the cache after the first
time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x, weight, bias, y, mean, rstd, S, C, eps, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    image, group = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    inside = c < WIDTH
    start = image.to(tl.int64) * S * C + group * WIDTH
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        total += tl.load(x + start + s[:, None] * C + c[None, :], (s[:, None] < S) & inside[None, :], 0.0).to(
            tl.float32
        )
    mu = tl.sum(tl.sum(total, 1), 0) / (S * WIDTH)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        centred = tl.where(mask, tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu, 0.0)
        total += centred * centred
    inv_std = 1 / tl.sqrt(tl.sum(tl.sum(total, 1), 0) / (S * WIDTH) + eps)
    tl.store(mean + image * tl.num_programs(1) + group, mu)
    tl.store(rstd + image * tl.num_programs(1) + group, inv_std)
    w = tl.load(weight + group * WIDTH + c, inside, 0.0).to(tl.float32)
    b = tl.load(bias + group * WIDTH + c, inside, 0.0).to(tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        normed = (tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu) * inv_std
        tl.store(y + start + s[:, None] * C + c[None, :], normed * w[None, :] + b[None, :], mask)


@triton.jit
def _backward(
    x,
    weight,
    mean,
    rstd,
    dy,
    dx,
    dweight,
    dbias,
    S,
    C,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, group = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    inside = c < WIDTH
    start = image.to(tl.int64) * S * C + group * WIDTH
    mu = tl.load(mean + image * tl.num_programs(1) + group)
    inv_std = tl.load(rstd + image * tl.num_programs(1) + group)
    weight_terms = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    bias_terms = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        normed = (tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu) * inv_std
        gradient = tl.load(dy + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        weight_terms += gradient * normed
        bias_terms += gradient
    weight_gradient, bias_gradient = tl.sum(weight_terms, 0), tl.sum(bias_terms, 0)  # [BLOCK_C]
    tl.store(dweight + image * C + group * WIDTH + c, weight_gradient, inside)
    tl.store(dbias + image * C + group * WIDTH + c, bias_gradient, inside)
    w = tl.load(weight + group * WIDTH + c, inside, 0.0).to(tl.float32)
    c1 = tl.sum(w * weight_gradient, 0) / (S * WIDTH)
    c2 = tl.sum(w * bias_gradient, 0) / (S * WIDTH)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        normed = (tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu) * inv_std
        gradient = tl.load(dy + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        tl.store(dx + start + s[:, None] * C + c[None, :], inv_std * (gradient * w[None, :] - c2 - normed * c1), mask)


def _launch(x: Tensor, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the sizes that both kernels take."""
    width = x.shape[1] // groups
    block_c = triton.next_power_of_2(width)
    block_s = min(triton.next_power_of_2(x.shape[2] * x.shape[3]), max(1, 2048 // block_c))
    return (len(x), groups), {
        "S": x.shape[2] * x.shape[3],
        "C": x.shape[1],
        "WIDTH": width,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
    }


class GroupNormFunction(torch.autograd.Function):
    """F.group_norm of x [B, C, H, W] in channels_last, weight and bias [C]; calculated in float32, in x's dtype and
    layout."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        y, (grid, sizes) = torch.empty_like(x), _launch(x, groups)
        mean, rstd = (torch.empty(len(x), groups, device=x.device) for _ in range(2))
        _forward[grid](x, weight, bias, y, mean, rstd, eps=eps, **sizes)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, (grid, sizes) = torch.empty_like(x), _launch(x, ctx.groups)
        dweight, dbias = (torch.empty(x.shape[:2], device=x.device) for _ in range(2))
        _backward[grid](
            x, weight, mean, rstd, dy.contiguous(memory_format=torch.channels_last), dx, dweight, dbias, **sizes
        )
        needed = ctx.needs_input_grad
        return (
            dx,
            dweight.sum(0).to(weight.dtype) if needed[1] else None,
            dbias.sum(0).to(bias.dtype) if needed[2] else None,
            None,
            None,
        )
