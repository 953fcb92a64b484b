"""What test_group_norm.py runs in a process of its own, since Triton decides at its import whether it interprets."""

import torch
from torch.nn import functional as F

from training.models.group_norm_kernels import GroupNormFunction

CASES = [
    ((2, 12, 3, 5), 4, torch.float32),
    ((1, 40, 8, 8), 4, torch.float32),
    ((2, 8, 1, 1), 4, torch.float32),
    ((1, 80, 32, 32), 2, torch.float32),
    ((2, 12, 3, 5), 4, torch.bfloat16),
]


def compare(shape, groups, dtype, device):
    """Values and gradients beside torch's, and the layout."""
    x = (torch.randn(shape, device=device) * 3 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, weights = (
        torch.randn(shape[1], device=device),
        torch.randn(shape[1], device=device),
        torch.randn(shape, device=device),
    )
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    theirs = [t.float().clone().requires_grad_() for t in (x, weight, bias)]
    result, expected = GroupNormFunction.apply(*ours, groups, 1e-5), F.group_norm(theirs[0], groups, *theirs[1:], 1e-5)
    assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y, inputs in ((result, ours), (expected, theirs))]
    for actual, target in zip((result, *gradients[0]), (expected, *gradients[1])):
        difference = ((actual.float() - target).abs().max() / target.abs().max().clamp(min=1)).item()
        assert difference < (1e-5 if dtype == torch.float32 else 1e-2), (shape, dtype, difference)


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in CASES:
        compare(*case, "cuda" if torch.cuda.is_available() else "cpu")
    print("equal")
