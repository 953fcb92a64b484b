"""The Perceiver encoder, beside what test_weights.py asks of the convolutional one."""

import pytest
import torch

from featinv_nodes.core.encoders import PerceiverEncoder, build_encoder


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


def test_settings_build_the_same_encoder(encoder):
    again = build_encoder(encoder.settings)
    again.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 6, 3, 4)
    assert torch.equal(again(x, (8, 8)), encoder(x, (8, 8)))
