"""GEGLU and its gradient, in Triton. Each program takes a block of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def geglu(x, y, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + 2 * row * D + d, d < D).to(tl.float32)
    gate = tl.load(x + (2 * row + 1) * D + d, d < D).to(tl.float32)
    tl.store(y + row * D + d, value * gate * _normal_cdf(gate), d < D)


@triton.jit
def geglu_gradient(x, dy, dx, D, BLOCK: tl.constexpr):
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
        geglu[_grid(y)](x, y, y.shape[-1], BLOCK=BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        (x,), dy = ctx.saved_tensors, dy.contiguous()
        dx = torch.empty_like(x)
        geglu_gradient[_grid(dy)](x, dy, dx, dy.shape[-1], BLOCK=BLOCK)
        return dx


def _grid(y: Tensor) -> tuple[int, int]:
    return y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], BLOCK)
