"""Maps are scaled as F.interpolate scales them."""

import pytest
import torch
from torch.nn import functional as F

from featinv_nodes.core.encoders import ConvEncoder
from featinv_nodes.core.resize import resize_bilinear

SIZES = [
    ((9, 9), (32, 32)),
    ((10, 10), (16, 16)),
    ((20, 20), (16, 16)),
    ((1, 1), (16, 16)),
    ((8, 8), (8, 8)),
    ((3, 7), (12, 5)),
    ((7, 3), (64, 40)),
    ((32, 32), (9, 11)),
    ((5, 4), (1, 1)),
]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def maps(grid, memory_format=torch.contiguous_format, channels=6):
    torch.manual_seed(0)
    return torch.randn(2, channels, *grid).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("grid, size", SIZES)
def test_equals_interpolate_with_its_gradient_and_keeps_the_memory_format(grid, size, form):
    both = [maps(grid, FORMATS[form]).requires_grad_() for _ in range(2)]
    ours, theirs = resize_bilinear(both[0], size), F.interpolate(both[1], size, mode="bilinear", align_corners=False)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert grid == (1, 1) or ours.is_contiguous(memory_format=FORMATS[form])  # one cell is in both formats
    weights = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((scaled * weights).sum(), x)[0] for scaled, x in zip((ours, theirs), both)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)


def test_a_view_that_is_in_neither_memory_format():
    x = maps((9, 18))[:, :, :, ::2]
    assert torch.allclose(resize_bilinear(x, (32, 16)), F.interpolate(x, (32, 16), mode="bilinear"), atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_autocast_does_not_round_it(form):
    x = maps((9, 9), FORMATS[form])
    with torch.autocast("cpu", torch.bfloat16):
        scaled = resize_bilinear(x, (32, 32))
    assert scaled.dtype == torch.float32 and torch.equal(scaled, resize_bilinear(x, (32, 32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = maps((9, 9)).to(dtype)
    scaled = resize_bilinear(x, (32, 32))
    assert scaled.dtype == dtype and torch.equal(scaled, resize_bilinear(x.float(), (32, 32)).to(dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_it_is_compiled_as_one_graph(form, autocast):
    encoder, x = ConvEncoder(6, 8, width=10), maps((9, 9), FORMATS[form])
    torch.nn.init.normal_(encoder.block[-1].weight)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)(x, (32, 32))
        assert torch.allclose(compiled, encoder(x, (32, 32)), atol=1e-6)


def test_it_needs_no_values():
    """So a CUDA graph takes it, and memory and operations are counted without a device."""
    assert resize_bilinear(maps((9, 9)).to("meta"), (32, 32)).shape == (2, 6, 32, 32)
