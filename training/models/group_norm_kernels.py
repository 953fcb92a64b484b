"""Group normalisation of channels_last maps, SiLU after it, and their gradient, in Triton.

A map is read as it lies in memory, as S = H * W places of C channels. `group_norm_sums` adds up each channel over
chunks of the places, `group_norm_statistics` makes each group's mean and deviation of these, and `group_norm` passes
over the map again; the gradient has the same three steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def group_norm_sums(x, sums, squares, S, C, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Each channel, less the value of its first place, and its square: [B, chunks, C]."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += image.to(tl.int64) * S * C
    shift = tl.load(x + c, c < C, 0.0).to(tl.float32)  # near the mean, so that the squares stay small
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    total_squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, CHUNK, BLOCK_S):
        s = chunk * CHUNK + first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & (c[None, :] < C)
        values = tl.load(x + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        shifted = tl.where(mask, values - shift[None, :], 0.0)
        total += shifted
        total_squares += shifted * shifted
    place = (image * tl.num_programs(1) + chunk) * C + c
    tl.store(sums + place, tl.sum(total, 0), c < C)
    tl.store(squares + place, tl.sum(total_squares, 0), c < C)


@triton.jit
def _over_chunks(sums, image, chunks, C, c, inside, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr):
    """[BLOCK_W], the channels c of sums [B, chunks, C] added up over the chunks."""
    total = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    for first in range(0, chunks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (k[:, None] < chunks) & inside[None, :]
        total += tl.load(sums + (image * chunks + k[:, None]) * C + c[None, :], mask, 0.0)
    return tl.sum(total, 0)


@triton.jit
def group_norm_statistics(
    x,
    sums,
    squares,
    mean,
    rstd,
    S,
    C,
    chunks,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean and inverse deviation of each group, [B, groups], from its channels' (Chan et al. 1983)."""
    image, group = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, BLOCK_W) < WIDTH
    c = group * WIDTH + tl.arange(0, BLOCK_W)
    total = _over_chunks(sums, image, chunks, C, c, inside, BLOCK_K, BLOCK_W)
    total_squares = _over_chunks(squares, image, chunks, C, c, inside, BLOCK_K, BLOCK_W)
    means = tl.load(x + image.to(tl.int64) * S * C + c, inside, 0.0).to(tl.float32) + total / S
    mu = tl.sum(tl.where(inside, means, 0.0), 0) / WIDTH
    apart = tl.where(inside, means - mu, 0.0)
    within = total_squares - total * total / S
    variance = tl.maximum(tl.sum(within / S + apart * apart, 0) / WIDTH, 0.0)
    tl.store(mean + image * tl.num_programs(1) + group, mu)
    tl.store(rstd + image * tl.num_programs(1) + group, 1 / tl.sqrt(variance + eps))


@triton.jit
def _of_channels(weight, bias, mean, rstd, c, group, C):
    """Weight, bias, mean and inverse deviation of channels c, float32."""
    w = tl.load(weight + c, c < C, 0.0).to(tl.float32)
    b = tl.load(bias + c, c < C, 0.0).to(tl.float32)
    return w, b, tl.load(mean + group, c < C, 0.0), tl.load(rstd + group, c < C, 0.0)


@triton.jit
def group_norm(
    x,
    weight,
    bias,
    mean,
    rstd,
    y,
    S,
    C,
    groups,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = image.to(tl.int64) * S * C
    w, b, mu, inv_std = _of_channels(weight, bias, mean, rstd, c, image * groups + c // WIDTH, C)
    for first in range(0, CHUNK, BLOCK_S):
        s = chunk * CHUNK + first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & (c[None, :] < C)
        values = tl.load(x + start + s[:, None] * C + c[None, :], mask, 0.0).to(tl.float32)
        result = (values - mu[None, :]) * inv_std[None, :] * w[None, :] + b[None, :]
        if SILU:
            result = result * tl.sigmoid(result)
        tl.store(y + start + s[:, None] * C + c[None, :], result, mask)


@triton.jit
def _gradient_before_silu(x, dy, place, mask, w, b, mu, inv_std, SILU: tl.constexpr):
    """The normalised values at some places, and the gradient of what weight and bias make of them."""
    normed = (tl.load(x + place, mask, 0.0).to(tl.float32) - mu[None, :]) * inv_std[None, :]
    gradient = tl.load(dy + place, mask, 0.0).to(tl.float32)
    if SILU:  # z sigmoid(z)
        z = normed * w[None, :] + b[None, :]
        share = tl.sigmoid(z)
        gradient = gradient * share * (1 + z * (1 - share))
    return normed, gradient


@triton.jit
def group_norm_gradient_sums(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    S,
    C,
    groups,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The shares of a chunk of places in the gradients of weight and bias: [B, chunks, C]."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = image.to(tl.int64) * S * C
    w, b, mu, inv_std = _of_channels(weight, bias, mean, rstd, c, image * groups + c // WIDTH, C)
    weight_total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    bias_total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, CHUNK, BLOCK_S):
        s = chunk * CHUNK + first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & (c[None, :] < C)
        place = start + s[:, None] * C + c[None, :]
        normed, gradient = _gradient_before_silu(x, dy, place, mask, w, b, mu, inv_std, SILU)
        weight_total += gradient * normed
        bias_total += gradient
    place = (image * tl.num_programs(1) + chunk) * C + c
    tl.store(weight_sums + place, tl.sum(weight_total, 0), c < C)
    tl.store(bias_sums + place, tl.sum(bias_total, 0), c < C)


@triton.jit
def group_norm_gradient_statistics(
    weight_sums,
    bias_sums,
    weight,
    dweight,
    dbias,
    along,
    shift,
    S,
    C,
    chunks,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The gradients of weight and bias from each map, [B, C], and what each group's normalisation takes out of its
    gradient, [B, groups]: along the normalised values, and the same everywhere."""
    image, group = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, BLOCK_W) < WIDTH
    c = group * WIDTH + tl.arange(0, BLOCK_W)
    weight_total = _over_chunks(weight_sums, image, chunks, C, c, inside, BLOCK_K, BLOCK_W)
    bias_total = _over_chunks(bias_sums, image, chunks, C, c, inside, BLOCK_K, BLOCK_W)
    tl.store(dweight + image * C + c, weight_total, inside)
    tl.store(dbias + image * C + c, bias_total, inside)
    w = tl.load(weight + c, inside, 0.0).to(tl.float32)
    place = image * tl.num_programs(1) + group
    tl.store(along + place, tl.sum(w * weight_total, 0) / (S * WIDTH))
    tl.store(shift + place, tl.sum(w * bias_total, 0) / (S * WIDTH))


@triton.jit
def group_norm_gradient(
    x,
    dy,
    weight,
    bias,
    mean,
    rstd,
    along,
    shift,
    dx,
    S,
    C,
    groups,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = image.to(tl.int64) * S * C
    group = image * groups + c // WIDTH
    w, b, mu, inv_std = _of_channels(weight, bias, mean, rstd, c, group, C)
    c1 = tl.load(along + group, c < C, 0.0)
    c2 = tl.load(shift + group, c < C, 0.0)
    for first in range(0, CHUNK, BLOCK_S):
        s = chunk * CHUNK + first + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < S) & (c[None, :] < C)
        place = start + s[:, None] * C + c[None, :]
        normed, gradient = _gradient_before_silu(x, dy, place, mask, w, b, mu, inv_std, SILU)
        result = inv_std[None, :] * (gradient * w[None, :] - c2[None, :] - normed * c1[None, :])
        tl.store(dx + place, result, mask)


class Plan:
    """How the kernels divide maps [B, C, H, W]: sizes, grids and blocks."""

    def __init__(self, x: Tensor, groups: int) -> None:
        batch, channels, places, width = len(x), x.shape[1], x.shape[2] * x.shape[3], x.shape[1] // groups
        chunk, block_c = min(triton.next_power_of_2(places), 256), min(triton.next_power_of_2(channels), 64)
        self.chunks = triton.cdiv(places, chunk)
        self.sizes = {"S": places, "C": channels}
        self.over_map = batch, self.chunks, triton.cdiv(channels, block_c)
        self.map_blocks = {"CHUNK": chunk, "BLOCK_S": min(chunk, 2048 // block_c), "BLOCK_C": block_c}
        self.over_groups = batch, groups
        block_w = triton.next_power_of_2(width)
        block_k = min(triton.next_power_of_2(self.chunks), max(1, 1024 // block_w))
        self.group_blocks = {"WIDTH": width, "BLOCK_K": block_k, "BLOCK_W": block_w}
        self.groups, self.width = groups, width


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
        plan, y = Plan(x, groups), torch.empty_like(x)
        sums, squares = torch.empty(2, len(x), plan.chunks, x.shape[1], device=x.device)
        mean, rstd = torch.empty(2, len(x), groups, device=x.device)
        group_norm_sums[plan.over_map](x, sums, squares, **plan.sizes, **plan.map_blocks)
        group_norm_statistics[plan.over_groups](
            x, sums, squares, mean, rstd, **plan.sizes, chunks=plan.chunks, eps=eps, **plan.group_blocks
        )
        group_norm[plan.over_map](
            x, weight, bias, mean, rstd, y, **plan.sizes, groups=groups, SILU=silu, WIDTH=plan.width, **plan.map_blocks
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.plan, ctx.silu = plan, silu
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias, mean, rstd), plan = ctx.saved_tensors, ctx.plan
        dx, dy = torch.empty_like(x), dy.contiguous(memory_format=torch.channels_last)
        weight_sums, bias_sums = torch.empty(2, len(x), plan.chunks, x.shape[1], device=x.device)
        dweight, dbias = torch.empty(2, len(x), x.shape[1], device=x.device)
        along, shift = torch.empty(2, len(x), plan.groups, device=x.device)
        given = x, dy, weight, bias, mean, rstd
        further = plan.sizes | plan.map_blocks | {"groups": plan.groups, "SILU": ctx.silu, "WIDTH": plan.width}
        group_norm_gradient_sums[plan.over_map](*given, weight_sums, bias_sums, **further)
        group_norm_gradient_statistics[plan.over_groups](
            weight_sums,
            bias_sums,
            weight,
            dweight,
            dbias,
            along,
            shift,
            **plan.sizes,
            chunks=plan.chunks,
            **plan.group_blocks,
        )
        group_norm_gradient[plan.over_map](*given, along, shift, dx, **further)
        needed = ctx.needs_input_grad
        return (
            dx,
            dweight.sum(0).to(weight.dtype) if needed[1] else None,
            dbias.sum(0).to(bias.dtype) if needed[2] else None,
            None,
            None,
            None,
        )
