"""Universal guidance: what moves, recurrence and distances do, at the levels of every kind of model."""

import math

import pytest
import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.guidance import DISTANCES, squared_distance, toward_features
from featinv_nodes.core.universal_guidance import (
    COSTS,
    STEPS,
    NotFinite,
    UniversalGuidance,
    at_cost,
    noise_again,
    sample_toward,
)
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw

SIGMAS = (8.0, 4.0, 1.0, 0.2, 0.0)
LEVELS = {
    "exploding": [(1.0, s) for s in SIGMAS],
    "preserving": [(1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)) for s in SIGMAS],
    "flow": [(1 / (1 + s), s / (1 + s)) for s in SIGMAS],
}


def drawn(guidance, levels="preserving", clean_of=None, toward=lambda x: x + 1, **changes):
    """(result, calls of the model, calls of toward) of a model that predicts half of what it sees, in units of s."""
    calls, moves = [], []
    generator = torch.Generator().manual_seed(1)
    levels = LEVELS[levels]
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * levels[0][1]

    def model(x, step):
        calls.append(step)
        return x / levels[step][0] / 2

    def move(x):
        moves.append(1)
        return toward(x)

    made = sample_toward(
        clean_of or model, x, levels, guidance, move, lambda: torch.randn(x.shape, generator=generator), **changes
    )
    return made, calls, len(moves)


def test_moves_and_recurrence_cost_what_they_say_in_the_steps_that_they_are_given():
    guidance = UniversalGuidance(moves=3, recurrence=2, start=0.25, end=0.75)
    _, calls, moves = drawn(guidance)
    assert calls == [0, 1, 1, 2, 2, 3] and len(calls) == guidance.evaluations(4)
    assert moves == guidance.gradients(4) == 12
    for nothing in (UniversalGuidance(moves=0), UniversalGuidance(step=0.0), UniversalGuidance(end=0.0)):
        assert drawn(nothing)[1:] == ([0, 1, 2, 3], 0) and nothing.gradients(4) == 0


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_is_kept_whatever_the_steps(name):
    assert at_cost(name, STEPS).gradients(STEPS) == COSTS[name]
    for steps in (1, 2, 8, 15):
        assert abs(at_cost(name, steps).gradients(steps) / COSTS[name] - 1) <= 0.2
    assert at_cost(name, 1000).recurrence == 1  # a step is taken once at least


def test_moves_and_recurrence_change_the_picture():
    plain, once, often, again = (
        drawn(UniversalGuidance(moves=m, recurrence=r))[0] for m, r in ((0, 1), (1, 1), (3, 1), (1, 3))
    )
    assert (once > plain).all() and (often > once).all()
    assert not torch.allclose(again, once)
    assert torch.equal(drawn(UniversalGuidance(moves=1, recurrence=3))[0], again)


@pytest.mark.parametrize("kind", LEVELS)
def test_noise_added_back_gives_the_level_it_says(kind):
    """Whatever the level, s x_0 + n e: the share of the clean latents and the spread around it."""
    generator = torch.Generator().manual_seed(0)
    clean, e, new = (torch.randn(4, 4, 50, 50, generator=generator) for _ in range(3))
    for there, here in zip(LEVELS[kind], LEVELS[kind][1:]):
        x = noise_again(here[0] * clean + here[1] * e, here, there, new)
        rest = x - there[0] * clean
        assert abs(rest.std() / there[1] - 1) < 0.03  # 40,000 numbers: a standard error of 0.4 %
        assert abs((rest * clean).mean() / there[1]) < 0.03


def test_the_step_is_the_same_for_every_kind_of_model():
    """Levels of one schedule in three parameterisations are one process: the same clean latents at the end."""
    results = [drawn(UniversalGuidance(moves=1, recurrence=2), kind)[0] for kind in LEVELS]
    assert all(torch.allclose(x, results[0], rtol=1e-4, atol=1e-4) for x in results)  # float32, in other units


def test_a_flow_of_pure_noise_keeps_nothing_of_the_clean_latents():
    clean, noise = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)
    assert torch.equal(noise_again(clean, (0.9, 0.1), (0.0, 1.0), noise), noise)
    twice = noise_again(
        clean, (0.5, 0.5), (0.5 + 1e-9, 0.5), noise
    )  # a level that a schedule has twice, but for rounding
    assert torch.allclose(twice, clean)


def test_squared_distance_has_the_gradient_of_its_formula():
    backbone, scenes = open_backbone("tiny-cnn"), draw(0, torch.arange(3), "held-out").image
    values, pictures = backbone.extract(scenes).values, (scenes.flip(0) * 0.8 + 0.1).requires_grad_()
    distance = squared_distance(pictures, backbone, values, "last", False)
    with torch.no_grad():
        difference = backbone.values(backbone.preprocess(pictures, "stretch"), "last", False) - values
    assert torch.allclose(distance, (difference**2).mean((1, 2, 3)) / (values**2).mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(distance.sum(), pictures)
    step = gradient / gradient.norm() * 1e-2
    with torch.no_grad():
        ahead, behind = (
            squared_distance(pictures + sign * step, backbone, values, "last", False).sum() for sign in (1, -1)
        )
    slope = (ahead - behind) / 2 / 1e-2
    assert abs(slope / gradient.norm() - 1) < 0.05  # ReLUs tip over on the way


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_a_move_lowers_the_distance_that_it_is_given(distance):
    backbone, scenes = open_backbone("tiny-cnn"), draw(0, torch.arange(4), "held-out").image
    expected, clean = backbone.extract(scenes), torch.nn.functional.avg_pool2d(scenes, 3, 1, 1) * 2 - 1
    picture_of = lambda x: x / 2 + 0.5  # noqa: E731
    moved = toward_features(clean, picture_of, backbone, expected, 0.01, distance)
    after, before = (
        DISTANCES[distance](picture_of(x), backbone, expected.values, "last", False) for x in (moved, clean)
    )
    assert (after < before).all()
    other = toward_features(clean, picture_of, backbone, expected, 0.01, "cosine")
    assert torch.equal(moved, other) == (distance == "cosine")


def test_what_is_not_finite_ends_with_the_setting_to_lower_and_the_last_finite_latents():
    seen = []

    def toward(x):
        return x * math.inf if len(seen) == 2 else x + 1

    with pytest.raises(NotFinite, match="a move in step 3 of 4 gave values that are not finite; lower step") as raised:
        drawn(UniversalGuidance(moves=1, recurrence=1), toward=toward, report=lambda *now: seen.append(now))
    assert torch.equal(raised.value.latents, seen[-1][2]) and torch.isfinite(raised.value.latents).all()
    with pytest.raises(NotFinite, match="prediction in step 1 of 4 gave .* finite; compute in float32") as raised:
        drawn(UniversalGuidance(), clean_of=lambda x, step: x * math.nan)
    assert raised.value.latents is None
    with pytest.raises(NotFinite, match="a move in step 1 of 4") as raised:
        drawn(UniversalGuidance(), clean_of=lambda x, step: x / 2, toward=lambda x: x * math.nan)
    assert torch.isfinite(raised.value.latents).all()  # what the model predicted before any move


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"moves": -1}, "moves -1; expected a whole number of at least 0"),
        ({"recurrence": 0}, "recurrence 0; expected a whole number of at least 1"),
        ({"step": -0.1}, "step -0.1; expected a length from 0 on"),
        ({"step": math.nan}, "step nan; expected a length"),
        ({"step": math.inf}, "step inf; expected a length"),
        ({"start": 0.6, "end": 0.5}, "start 0.6 and end 0.5; expected shares"),
        ({"distance": "L1"}, "distance 'L1'; expected one of cosine, squared"),
    ],
)
def test_a_value_out_of_its_range_is_named(setting, words):
    with pytest.raises(FeatInvError, match=words):
        UniversalGuidance(**setting)
