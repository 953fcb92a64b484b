"""What test_channels_last.py runs in a process of its own, since Triton decides at its import whether it interprets."""

import torch
from torch.nn import functional as F

from training.models.geglu_kernels import GegluFunction
from training.models.group_norm_kernels import GroupNormFunction

CASES = [
    ((2, 12, 3, 5), 4, torch.float32),
    ((1, 40, 8, 8), 4, torch.float32),
    ((2, 8, 1, 1), 4, torch.float32),
    ((1, 80, 32, 32), 2, torch.float32),
    ((2, 12, 3, 5), 4, torch.bfloat16),
    ((1, 96, 20, 20), 3, torch.float32),
]


def compare_group_norm(shape, groups, dtype, device, silu, mean=1.0):
    """Values and gradients beside torch's, and the layout."""
    x = (torch.randn(shape, device=device) * 3 + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, weights = (
        torch.randn(shape[1], device=device),
        torch.randn(shape[1], device=device),
        torch.randn(shape, device=device),
    )
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    theirs = [t.double().clone().requires_grad_() for t in (x, weight, bias)]
    result, expected = (
        GroupNormFunction.apply(*ours, groups, 1e-5, silu),
        F.group_norm(theirs[0], groups, *theirs[1:], 1e-5),
    )
    expected = F.silu(expected) if silu else expected
    assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
    compare(result, ours, expected, theirs, weights, (shape, dtype, silu))


def compare_geglu(shape, dtype, device):
    x, weights = (
        (2 * torch.randn(shape, device=device)).to(dtype),
        torch.randn(*shape[:-1], shape[-1] // 2, device=device),
    )
    ours, theirs = x.clone().requires_grad_(), x.double().clone().requires_grad_()
    value, gate = theirs.chunk(2, -1)
    compare(GegluFunction.apply(ours), [ours], value * F.gelu(gate), [theirs], weights, (shape, dtype))


def compare(result, ours, expected, theirs, weights, what):
    assert result.dtype == ours[0].dtype
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y, inputs in ((result, ours), (expected, theirs))]
    for actual, target in zip((result, *gradients[0]), (expected, *gradients[1]), strict=True):
        difference = ((actual.double() - target).abs().max() / target.abs().max().clamp(min=1)).item()
        assert difference < (1e-5 if ours[0].dtype == torch.float32 else 1e-2), (*what, difference)


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, case in enumerate(CASES):
        compare_group_norm(*case, device, silu=number % 2 == 0)
    compare_group_norm((1, 8, 16, 16), 2, torch.float32, device, silu=True, mean=50.0)
    compare_geglu((2, 3, 40), torch.float32, device)
    compare_geglu((2, 2560), torch.bfloat16, device)
    print("equal")
