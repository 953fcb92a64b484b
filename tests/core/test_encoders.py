"""The encoders that are not the paper's own, beside what test_weights.py asks of that one."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from featinv_nodes.core.encoders import KINDS, ConvEncoder, MapConvEncoder, PerceiverEncoder, build_encoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = PerceiverEncoder(6, 8, width=16, tokens=(3, 4), queries=(8, 8), heads=4)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return encoder


def test_starts_at_zero_and_follows_the_latent_grid():
    fresh = PerceiverEncoder(6, 8, tokens=(3, 4))
    assert not fresh(torch.randn(2, 6, 3, 4), (32, 32)).any()
    assert fresh(torch.randn(2, 6, 3, 4), (24, 40)).shape == (2, 8, 24, 40)


def test_every_place_of_the_hint_reads_every_place_of_the_map(encoder):
    x = torch.randn(1, 6, 3, 4, requires_grad=True)
    encoder(x, (8, 8))[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


def test_places_of_the_map_are_told_apart_and_pooled_maps_are_one_token(encoder):
    x = torch.randn(1, 6, 3, 4)
    assert not torch.allclose(encoder(x, (8, 8)), encoder(x.flip(3), (8, 8)), atol=1e-3)
    pooled = PerceiverEncoder(6, 8, width=16, queries=(8, 8), heads=4)
    torch.nn.init.normal_(pooled.out.weight)
    assert pooled(torch.randn(2, 6, 1, 1), (8, 8)).shape == (2, 8, 8, 8)


def test_rows_of_queries_are_rows_of_the_hint(encoder):
    """Queries that differ from row to row alone give a hint that does, also of another size; keys come before values in
    a file: without keys, every query reads the mean value."""
    with torch.no_grad():
        encoder.queries.copy_(encoder.queries[..., :1].expand_as(encoder.queries))
        hint = encoder(torch.randn(1, 6, 3, 4), (8, 12))
        assert torch.allclose(hint, hint[..., :1].expand_as(hint), atol=1e-4) and hint[..., 0].std(2).min() > 0.1
        encoder.to_key_value.weight[:16], encoder.to_key_value.bias[:16] = 0, 0
        encoder.position.zero_()
        x = torch.randn(1, 6, 3, 4)
        hint, flipped, other = (encoder(y, (8, 8)) for y in (x, x.flip(3), x + 1))
        assert torch.allclose(hint, flipped, atol=1e-4) and not torch.allclose(hint, other, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_reads_standardised_features(kind):
    torch.manual_seed(0)
    more = {"tokens": (3, 4), "queries": (4, 4)} if kind == "perceiver" else {}
    encoder, x = KINDS[kind](6, 8, 16, **more), torch.randn(5, 6, 3, 4) * torch.linspace(1, 9, 6)[:, None, None] - 2
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    encoder.standardise(x)
    hint, z = encoder(x, (6, 8)), encoder.standardised(x)
    encoder.mean.zero_()
    encoder.deviation.fill_(1)
    assert torch.allclose(encoder(z, (6, 8)), hint, atol=1e-4) and not torch.allclose(
        encoder(x, (6, 8)), hint, atol=0.1
    )


def test_settings_build_the_same_encoder(encoder):
    again = build_encoder(encoder.settings)
    again.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 6, 3, 4)
    assert torch.equal(again(x, (8, 8)), encoder(x, (8, 8)))


def test_convolutions_on_the_map_are_upsampled_afterwards_and_start_at_zero():
    torch.manual_seed(0)
    encoder, x = MapConvEncoder(6, 8, width=10), torch.randn(2, 6, 3, 4)
    assert not encoder(x, (8, 12)).any()
    torch.nn.init.normal_(encoder.block[-1].weight)
    encoder.standardise(x * 3 + 1)
    hint = encoder(x, (8, 12))
    assert hint.shape == (2, 8, 8, 12) and torch.allclose(
        hint, F.interpolate(encoder(x, (3, 4)), (8, 12), mode="bilinear"), atol=1e-6
    )
    paper = ConvEncoder(6, 8, width=10)
    paper.load_state_dict(encoder.state_dict())
    assert torch.allclose(encoder(x, (3, 4)), paper(x, (3, 4)), atol=1e-6)  # without upsampling the two are one
    assert not torch.allclose(hint, paper(x, (8, 12)), atol=0.1)
    pooled = encoder(torch.randn(1, 6, 1, 1), (9, 9))
    assert torch.allclose(pooled, pooled[:, :, :1, :1].expand_as(pooled), atol=1e-6)
    again = build_encoder(encoder.settings)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(x, (8, 12)), hint)


def gmac(kind, channels=1024, grid=9):
    with torch.device("meta"):
        encoder, values = (
            build_encoder({"kind": kind, "channels": channels, "out_channels": 320, "width": 512}),
            torch.zeros(1, channels, grid, grid),
        )
    counter = FlopCounterMode(display=False)
    with counter:
        encoder(values, (32, 32))
    return counter.get_total_flops() / 2e9


def test_convolutions_on_the_map_cost_a_thirteenth_for_convnext():
    latent, at_map = gmac("conv"), gmac("conv_at_map")
    print(f"{latent:.2f} GMAC on the latent grid, {at_map:.2f} on the map: {latent / at_map:.1f} times fewer")
    assert (
        latent == pytest.approx(8.76, abs=0.02)
        and at_map == pytest.approx(0.69, abs=0.01)
        and latent / at_map == pytest.approx((32 / 9) ** 2, rel=0.01)
    )


def test_a_kernel_of_one_is_enough_for_a_pooled_map():
    """Of larger kernels it meets the centre alone, the rest sees the padding."""
    torch.manual_seed(0)
    small, large = (MapConvEncoder(6, 8, 10, kernel=kernel) for kernel in (1, 3))
    torch.nn.init.normal_(small.block[-1].weight)
    with torch.no_grad():
        for one, other in zip(small.block[::2], large.block[::2]):
            other.weight[:, :, 1:2, 1:2] = one.weight
            other.bias.copy_(one.bias)
    pooled = torch.randn(2, 6, 1, 1)
    assert torch.allclose(small(pooled, (4, 5)), large(pooled, (4, 5)), atol=1e-6)
    assert build_encoder(small.settings).block[0].weight.shape == (10, 6, 1, 1)
