"""Group normalisation that keeps channels_last: torch's CUDA kernel copies such maps to contiguous ones, forward and
backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelsLastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose result has the dtype and layout of maps [B, C, H, W] in channels_last on a CUDA device, under
    autocast too; for everything else nn.GroupNorm itself."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and self.affine):
            return super().forward(x)
        from .group_norm_kernels import GroupNormFunction  # Triton is there where CUDA is

        return GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def keep_channels_last(module: nn.Module) -> None:
    """Makes every nn.GroupNorm of a model a ChannelsLastGroupNorm, in place, with its weights and their names."""
    for part in module.modules():
        if type(part) is nn.GroupNorm:
            part.__class__ = ChannelsLastGroupNorm
