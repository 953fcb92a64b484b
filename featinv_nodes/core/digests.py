"""Digests of weights: whether two models of one name have the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLED = 4096  # values of a tensor that are read at most, the first and the last among them
DIGITS = 16
#: the last part of the name of batch normalisation's counter, which says how long a model learned, not what; torch
#: fills it in where it is missing
COUNTER = "num_batches_tracked"
FULL_OR_HALF = (torch.float32, torch.float16, torch.float64)


def digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """The first DIGITS hexadecimal digits of a SHA-256 over a state dict: the sorted names, the shapes, and of every
    tensor up to SAMPLED values, evenly spread. A change of fewer values between those that are read goes unseen.

    Floating-point values count as rounded to half precision, so that a file's published half-precision variant has the
    digest of the full one; bfloat16 is another rounding and has another. Counters of batch normalisation do not count,
    nor do the device, the order of the tensors and their layout in memory.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    sha = hashlib.sha256()
    for name in sorted(state):
        if name.rpartition(".")[2] == COUNTER:
            continue
        sha.update(f"{name} {list(state[name].shape)}\n".encode())
        sha.update(_sample(state[name].detach()).numpy().tobytes())
    return sha.hexdigest()[:DIGITS]


def _sample(tensor: Tensor) -> Tensor:
    """Up to SAMPLED values [n] on the CPU in the order of their indices, floating-point ones in half precision."""
    count = tensor.numel()
    if count > SAMPLED:
        flat = torch.arange(SAMPLED, device=tensor.device) * (count - 1) // (SAMPLED - 1)
        tensor = tensor[torch.unravel_index(flat, tensor.shape)]  # as indexed, whatever the memory format
    values = tensor.reshape(-1)
    return (values.half() if values.is_floating_point() else values).cpu().contiguous()


def in_full_or_half(weights: Mapping[str, Tensor]) -> bool:
    """Whether all weights are plain numbers in a precision whose digest is that of the published file; those that a
    program keeps in bfloat16, 8 bits or packed are not."""
    return all(type(t.data) is Tensor and t.dtype in FULL_OR_HALF and not t.is_meta for t in weights.values())
