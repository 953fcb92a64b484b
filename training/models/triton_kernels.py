"""Triton kernels with their gradients: group normalisation of channels_last maps, and GEGLU.

A program of the former takes one group of one map, [S, C / groups] with S = H * W, and reads it from the cache after
the first time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    S,
    C,
    eps,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, group = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    inside = c < WIDTH
    start = image.to(tl.int64) * S * C + group * WIDTH
    shift = tl.load(x + start).to(tl.float32)  # any of the values: near the mean, so that the squares stay small
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        shifted = tl.where(
            mask, tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - shift, 0.0
        )
        total += shifted
        squares += shifted * shifted
    mu = tl.sum(tl.sum(total, 1), 0) / (S * WIDTH)
    variance = tl.maximum(tl.sum(tl.sum(squares, 1), 0) / (S * WIDTH) - mu * mu, 0.0)
    mu += shift
    inv_std = 1 / tl.sqrt(variance + eps)
    tl.store(mean + image * tl.num_programs(1) + group, mu)
    tl.store(rstd + image * tl.num_programs(1) + group, inv_std)
    w = tl.load(weight + group * WIDTH + c, inside, 0.0).to(tl.float32)
    b = tl.load(bias + group * WIDTH + c, inside, 0.0).to(tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        normed = (tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu) * inv_std
        result = normed * w[None, :] + b[None, :]
        if SILU:
            result = result * tl.sigmoid(result)
        tl.store(y + start + s[:, None] * C + c[None, :], result, mask)


@triton.jit
def _through_silu(gradient, z):
    """The gradient of z from that of z sigmoid(z)."""
    share = tl.sigmoid(z)
    return gradient * share * (1 + z * (1 - share))


@triton.jit
def _backward(
    x,
    weight,
    bias,
    mean,
    rstd,
    dy,
    dx,
    dweight,
    dbias,
    S,
    C,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, group = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    inside = c < WIDTH
    start = image.to(tl.int64) * S * C + group * WIDTH
    w = tl.load(weight + group * WIDTH + c, inside, 0.0).to(tl.float32)
    b = tl.load(bias + group * WIDTH + c, inside, 0.0).to(tl.float32)
    mu = tl.load(mean + image * tl.num_programs(1) + group)
    inv_std = tl.load(rstd + image * tl.num_programs(1) + group)
    weight_terms = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    bias_terms = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        normed = (tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu) * inv_std
        gradient = tl.load(dy + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        if SILU:
            gradient = _through_silu(gradient, normed * w[None, :] + b[None, :])
        weight_terms += gradient * normed
        bias_terms += gradient
    weight_gradient, bias_gradient = tl.sum(weight_terms, 0), tl.sum(bias_terms, 0)  # [BLOCK_C]
    tl.store(dweight + image * C + group * WIDTH + c, weight_gradient, inside)
    tl.store(dbias + image * C + group * WIDTH + c, bias_gradient, inside)
    c1 = tl.sum(w * weight_gradient, 0) / (S * WIDTH)
    c2 = tl.sum(w * bias_gradient, 0) / (S * WIDTH)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & inside[None, :]
        normed = (tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32) - mu) * inv_std
        gradient = tl.load(dy + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        if SILU:
            gradient = _through_silu(gradient, normed * w[None, :] + b[None, :])
        tl.store(dx + start + s[:, None] * C + c[None, :], inv_std * (gradient * w[None, :] - c2 - normed * c1), mask)


#: values that a program holds at once, and its warps: the fastest of those tried on an H200
FORWARD, BACKWARD = (2048, 4), (2048, 4)


def _launch(x: Tensor, groups: int, values: int, warps: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the sizes that a kernel takes."""
    width, places = x.shape[1] // groups, x.shape[2] * x.shape[3]
    block_c = triton.next_power_of_2(width)
    block_s = min(triton.next_power_of_2(places), max(1, values // block_c))
    sizes = {"S": places, "C": x.shape[1], "WIDTH": width, "BLOCK_S": block_s, "BLOCK_C": block_c}
    return (len(x), groups), sizes | {"num_warps": warps}


class GroupNormFunction(torch.autograd.Function):
    """F.group_norm of x [B, C, H, W] in channels_last, weight and bias [C], and SiLU after it where asked for;
    calculated in float32, in x's dtype and layout."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        y, (grid, sizes) = torch.empty_like(x), _launch(x, groups, *FORWARD)
        mean, rstd = (torch.empty(len(x), groups, device=x.device) for _ in range(2))
        _forward[grid](x, weight, bias, y, mean, rstd, eps=eps, SILU=silu, **sizes)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, (grid, sizes) = torch.empty_like(x), _launch(x, ctx.groups, *BACKWARD)
        dweight, dbias = (torch.empty(x.shape[:2], device=x.device) for _ in range(2))
        dy = dy.contiguous(memory_format=torch.channels_last)
        _backward[grid](x, weight, bias, mean, rstd, dy, dx, dweight, dbias, SILU=ctx.silu, **sizes)
        needed = ctx.needs_input_grad
        return (
            dx,
            dweight.sum(0).to(weight.dtype) if needed[1] else None,
            dbias.sum(0).to(bias.dtype) if needed[2] else None,
            None,
            None,
            None,
        )


@triton.jit
def _geglu_forward(x, y, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + 2 * row * D + d, d < D).to(tl.float32)
    gate = tl.load(x + (2 * row + 1) * D + d, d < D).to(tl.float32)
    tl.store(y + row * D + d, value * gate * _normal_cdf(gate), d < D)


@triton.jit
def _geglu_backward(x, dy, dx, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + 2 * row * D + d, d < D).to(tl.float32)
    gate = tl.load(x + (2 * row + 1) * D + d, d < D).to(tl.float32)
    gradient = tl.load(dy + row * D + d, d < D).to(tl.float32)
    cdf = _normal_cdf(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + 2 * row * D + d, gradient * gate * cdf, d < D)
    tl.store(dx + (2 * row + 1) * D + d, gradient * value * (cdf + gate * density), d < D)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1 + tl.erf(0.7071067811865476 * x))


class GegluFunction(torch.autograd.Function):
    """value * gelu(gate) of x [..., 2 D], whose first half is value; calculated in float32, in x's dtype."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _geglu_forward[_geglu_grid(y)](x, y, y.shape[-1], BLOCK=GEGLU_BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        (x,), dy = ctx.saved_tensors, dy.contiguous()
        dx = torch.empty_like(x)
        _geglu_backward[_geglu_grid(dy)](x, dy, dx, dy.shape[-1], BLOCK=GEGLU_BLOCK)
        return dx


GEGLU_BLOCK = 1024


def _geglu_grid(y: Tensor) -> tuple[int, int]:
    return y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], GEGLU_BLOCK)
