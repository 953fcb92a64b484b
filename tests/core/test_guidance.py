"""Guidance by the gradient of the features: what a step does, inside whatever grad mode, and what it leaves alone."""

import pytest
import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.guidance import feature_distance, leave_inference, rms, toward_features
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw


@pytest.fixture
def backbone():
    return open_backbone("tiny-cnn")


@pytest.fixture
def scenes():
    return draw(0, torch.arange(4), "held-out").image


def picture_of(latents):
    """A stand-in for a decoder: latents are pictures of another range."""
    return (latents / 2 + 0.5).clamp(0, 1)


def blurred(scenes):
    return torch.nn.functional.avg_pool2d(scenes, 3, 1, 1) * 2 - 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_step_comes_nearer_in_every_grad_mode(backbone, scenes, mode):
    with mode():
        expected, clean = backbone.extract(scenes), blurred(scenes)
        before = clean.clone()
        moved = toward_features(clean, picture_of, backbone, expected, 0.01)
    assert torch.equal(clean, before) and not moved.requires_grad
    with torch.inference_mode():
        after, first = (
            feature_distance(picture_of(x), backbone, expected.values, expected.source.layer, expected.source.pooled)
            for x in (moved, clean)
        )
        assert (after < first).all()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def test_the_step_is_its_length_in_units_of_the_latents(backbone, scenes):
    """Per sample, so that neither the other rows nor the latents' scale matter."""
    expected, clean = backbone.extract(scenes), blurred(scenes)
    moved = toward_features(clean, picture_of, backbone, expected, 0.01)
    assert torch.allclose(
        rms(moved - clean) / rms(clean), torch.full((4, 1, 1, 1), 0.01), rtol=1e-3
    )  # float32, a difference of near numbers
    alone = toward_features(clean[1:2], picture_of, backbone, expected.select(1), 0.01)
    assert (alone - moved[1:2]).norm() < 0.05 * (moved - clean)[
        1:2
    ].norm()  # ReLUs at their corner tip over by the size of a batch
    larger = toward_features(clean * 3, lambda x: picture_of(x / 3), backbone, expected, 0.01)
    assert (larger / 3 - moved).norm() < 0.05 * (moved - clean).norm()
    assert torch.equal(toward_features(clean, picture_of, backbone, expected, 0.0), clean)
    large = (clean * 10).half()  # whose gradient has squares below the smallest number of half precision
    half = toward_features(large, lambda x: picture_of(x.float() / 10), backbone, expected, 0.01)
    assert half.dtype == torch.float16
    assert torch.allclose(rms(half - large) / rms(large), torch.full((4, 1, 1, 1), 0.01), rtol=0.05)


def test_a_backbone_that_was_made_inside_inference_mode(scenes):
    with torch.inference_mode():
        backbone = open_backbone("tiny-cnn")
        expected = backbone.extract(scenes)
        values = [p.clone() for p in backbone.parameters()]
        moved = toward_features(blurred(scenes), picture_of, backbone, expected, 0.01)
        leave_inference(backbone)
    assert torch.isfinite(moved).all() and all(torch.equal(a, b) for a, b in zip(values, backbone.parameters()))


def test_the_whole_of_a_wide_picture_counts(backbone, scenes):
    """Also its edges, which the backbone's own evaluation would cut off."""
    wide = torch.cat([scenes[:1], scenes[1:2]], 3).requires_grad_()
    expected = backbone.extract(scenes[2:3])
    feature_distance(wide, backbone, expected.values.clone(), "last", False).sum().backward()
    assert all(part.abs().sum() > 0 for part in wide.grad.split(16, 3))


def test_control_and_gradient_act_in_the_steps_that_they_are_given():
    sampling = Sampling(steps=10, start=0.3, end=0.5, gradient=0.1, gradient_steps=3)
    assert [n for n in range(10) if sampling.controls(n)] == [3, 4]
    assert [n for n in range(10) if sampling.moves(n)] == [7, 8, 9]
    assert all(Sampling(steps=10).controls(n) and not Sampling(steps=10).moves(n) for n in range(10))


def test_a_flat_gradient_moves_nothing(backbone, scenes):
    black = -torch.ones_like(scenes) * 3  # far below black: the clamp passes no gradient
    assert torch.equal(toward_features(black, picture_of, backbone, backbone.extract(scenes), 0.5), black)


def test_what_does_not_fit_is_refused(backbone, scenes):
    with pytest.raises(FeatInvError, match="2 feature maps for 4 latents"):
        toward_features(scenes, picture_of, backbone, backbone.extract(scenes[:2]), 0.1)
    with pytest.raises(FeatInvError, match="tiny_world"):
        toward_features(scenes, picture_of, open_backbone("tiny-vit"), backbone.extract(scenes), 0.1)
