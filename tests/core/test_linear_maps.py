"""Linear maps of feature space: planted ones are found, a strength takes a part of them, files keep them."""

from dataclasses import replace

import pytest
import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.linear_map_files import load_linear_map, save_linear_map
from featinv_nodes.core.linear_maps import KINDS, RIDGES, LinearMap, Moments, Pairs, arithmetic, from_pairs, measure

CHANNELS = 7  # odd: one axis of a rotation has no partner
SOURCE = FeatureSource("net.tag", "last", False, CHANNELS, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def random_maps(seed=0, count=40):
    return FeatureMap(torch.randn(count, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(seed)), SOURCE)


def rotation(seed=1):
    q = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(seed)).double()).Q
    q[:, 0] *= torch.sign(torch.linalg.det(q))
    return q.float()


def planted(kind):
    """A map of a kind whose pairs determine it."""
    shift = torch.linspace(-1, 1, CHANNELS)
    matrix = rotation() if kind == "rotation" else torch.eye(CHANNELS) + 0.3 * rotation(2)
    return LinearMap(kind, None if kind == "direction" else matrix, None if kind == "rotation" else shift, SOURCE)


def fitted(kind, after, maps=None, **settings):
    pairs, maps = Pairs(), maps or random_maps()
    for part in (slice(0, 10), slice(10, None)):  # in parts, as programs read them
        pairs.add(maps.select(part), after(maps.select(part)))
    return pairs.fit(kind, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_map_is_found_kept_in_a_file_and_taken_in_part(kind, tmp_path):
    true, fresh = planted(kind), random_maps(9)
    found = fitted(kind, true.apply, ridge=1e-9, change="planted")
    save_linear_map(
        tmp_path / "m.safetensors",
        replace(found, measured={"explained": {"value": 1.0, "low": None, "high": None, "n": 3}}),
    )
    kept = load_linear_map(tmp_path / "m.safetensors")
    assert kept.source == SOURCE and kept.settings["change"] == "planted" and kept.settings["vectors"] == 480
    assert kept.measured["explained"]["n"] == 3 and "planted" in kept.describe() and kept.low is None
    expected = true.apply(fresh).values
    assert torch.allclose(kept.apply(fresh).values, expected, atol=1e-5)  # float32 products of seven terms
    assert torch.allclose(kept.apply(fresh, 0).values, fresh.values, atol=1e-5)
    if kind != "rotation":
        assert torch.allclose(kept.apply(fresh, 0.5).values, (fresh.values + expected) / 2, atol=1e-5)
        assert torch.allclose(kept.apply(fresh, -1).values, 2 * fresh.values - expected, atol=1e-5)


def test_half_a_rotation_twice_is_the_whole_and_minus_one_undoes_it():
    turn, fresh = planted("rotation"), random_maps(9)
    half = turn.apply(turn.apply(fresh, 0.5), 0.5)
    assert torch.allclose(half.values, turn.apply(fresh).values, atol=1e-5)
    assert torch.allclose(turn.apply(turn.apply(fresh), -1).values, fresh.values, atol=1e-5)
    for strength in (0.3, 1.7):
        assert torch.allclose(turn.apply(fresh, strength).values.norm(dim=1), fresh.values.norm(dim=1), atol=1e-5)
    back = replace(turn, matrix=torch.diag(torch.tensor([-1.0, -1, 1, 1, 1, -1, -1])))  # half turns, of no angle's sign
    quarter = back.apply(back.apply(fresh, 0.5), 0.5)
    assert torch.allclose(quarter.values, back.apply(fresh).values, atol=1e-5)


def test_a_reflection_is_fitted_by_the_nearest_rotation():
    mirror = torch.diag(torch.tensor([1.0] * 6 + [-1.0]))
    maps = random_maps()
    maps = maps.with_values(maps.values * torch.tensor([9.0, 8, 7, 6, 5, 4, 1])[:, None, None])
    turn = fitted("rotation", lambda m: m.with_values(torch.einsum("dc,bchw->bdhw", mirror, m.values)), maps)
    assert torch.linalg.det(turn.matrix) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(turn.matrix[:6, :6], torch.eye(6), atol=0.1)  # only the weakest axis could not follow


def test_what_pairs_do_not_determine_stays_as_it_is():
    """An affine map of fewer vectors than channels: what is orthogonal to these is not changed."""
    maps = random_maps(count=40)
    flat = maps.with_values(maps.values.index_fill(1, torch.tensor([5, 6]), 0.0))
    turn = fitted("affine", planted("affine").apply, flat)
    assert torch.equal(turn.matrix[:, 5:], torch.eye(CHANNELS)[:, 5:])


def test_the_ridge_follows_from_how_much_the_pairs_say():
    """Few noisy pairs are followed less than many; the error that chooses is that of the vectors themselves."""
    noise = torch.randn(400, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(7))
    many, true = random_maps(count=400), planted("affine")
    noisy = true.apply(many).values + 3 * noise
    chosen = [
        from_pairs(many.select(slice(0, n)), many.with_values(noisy).select(slice(0, n))).settings["ridge"]
        for n in (2, 400)
    ]
    assert chosen[0] > chosen[1]
    single, few = Pairs(), many.select(slice(0, 8))
    for i in range(8):  # read one by one, as in any batches
        single.add(few.select(i), true.apply(few.select(i)))
    assert single.fit().settings["ridge"] == from_pairs(few, true.apply(few)).settings["ridge"] == RIDGES[0]
    assert from_pairs(many.select(0), true.apply(many.select(0))).settings["ridge"] == RIDGES[-1]
    x, y = torch.randn(2, 20, CHANNELS, dtype=torch.float64).unbind()
    matrix, shift = torch.randn(CHANNELS, CHANNELS).double(), torch.randn(CHANNELS).double()
    expected = (y - x @ matrix.T - shift).square().sum().item()
    assert Moments.of(x, y).error(matrix, shift) == pytest.approx(expected)


def test_values_of_a_relu_stay_above_zero_and_only_those():
    down = torch.full((CHANNELS,), -0.5)
    maps = random_maps()
    relu = maps.with_values(maps.values.relu())
    linear = fitted("direction", lambda m: m.with_values((m.values + down[:, None, None]).relu()), relu)
    assert linear.low == 0 and linear.apply(relu).values.min() == 0
    assert torch.equal(linear.apply(maps, 0.0).values, maps.values)  # 0 changes nothing
    assert fitted("direction", lambda m: m, maps).low is None


def test_measures_are_of_the_map_after_the_change():
    before, true = random_maps(9), planted("affine")
    after, centre = true.apply(before), torch.full((CHANNELS,), 0.1)
    values = measure(true, before, after, centre)
    assert {len(v) for v in values.values()} == {40}
    assert torch.allclose(values["cosine_mapped"], torch.ones(40)) and values["distance_mapped"].max() == 0
    assert (values["cosine_before"] < 0.99).all() and (values["centred_before"] != values["cosine_before"]).all()
    expected = (after.values - before.values).square().sum((1, 2, 3))
    assert torch.allclose(values["distance_before"], expected)


def test_a_map_of_two_batches_is_measured_on_pairs_that_its_fit_did_not_see():
    maps, true = random_maps(count=8), planted("direction")
    after = true.apply(maps)
    spoilt = after.values.clone()
    spoilt[3::4] = torch.randn(2, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(5))
    linear = from_pairs(maps, after.with_values(spoilt), "direction")
    assert linear.measured["explained"]["value"] < 0.3 and linear.measured["explained"]["n"] == 2
    seen, other = (after.with_values(spoilt).select(rows) for rows in (torch.arange(8) % 4 != 3, slice(3, None, 4)))
    fit, centre = from_pairs(maps.select(torch.arange(8) % 4 != 3), seen, "direction"), seen.values.mean((0, 2, 3))
    expected = measure(fit, maps.select(slice(3, None, 4)), other, centre)["centred_mapped"].mean().item()
    assert linear.measured["centred_mapped"]["value"] == pytest.approx(expected, abs=1e-6)  # float32
    whole = from_pairs(maps, after, "direction")
    assert whole.measured["explained"]["value"] == pytest.approx(1) and "2 held-out pairs" in whole.report()
    alone = from_pairs(maps.select(0), after.select(0), "direction")
    assert not alone.measured and "not measured: give at least 4 pairs" in alone.report()


def test_arithmetic_adds_the_difference_of_two_means():
    a, plus, minus = random_maps(0, 2), random_maps(1, 5), random_maps(2, 3)
    over_all = plus.values.mean((0, 2, 3)) - minus.values.mean((0, 2, 3))
    result = arithmetic(a, plus, minus, 2.0).values
    assert torch.allclose(result, a.values + 2 * over_all[:, None, None], atol=1e-6)
    at_each = plus.values.mean(0) - minus.values.mean(0)
    assert torch.allclose(arithmetic(a, plus, minus, 1.0, True).values, a.values + at_each, atol=1e-6)
    relu = [m.with_values(m.values.relu()) for m in (a, plus, minus)]
    assert arithmetic(*relu, -4.0).values.min() == 0 > arithmetic(a, plus, minus, -4.0).values.min()
    assert arithmetic(relu[0], plus, minus, -4.0).values.min() < 0  # the layer has such values


def test_what_does_not_fit_is_refused():
    maps, other = random_maps(), replace(SOURCE, layer="x")
    foreign = FeatureMap(maps.values, other)
    pairs = Pairs()
    for wrong, words in (
        (lambda: Pairs().fit(), "no feature maps"),
        (lambda: pairs.add(maps, foreign), "layer: x against last"),
        (lambda: pairs.add(maps, maps.select(0)), "40 feature maps before the change and 1 after"),
        (lambda: planted("affine").apply(foreign), "layer: x against last"),
        (lambda: arithmetic(maps, foreign, maps), "layer: last against x"),
        (lambda: fitted("affine", lambda m: m, ridge=0.0), "ridge 0.0"),
        (lambda: fitted("other", lambda m: m), "expected one of affine"),
        (lambda: fitted("affine", lambda m: m, maps.with_values(torch.ones_like(maps.values))), "constant features"),
        (
            lambda: LinearMap("direction", rotation(), torch.zeros(7), SOURCE),
            r"a matrix of shape \(7, 7\); expected None",
        ),
        (lambda: LinearMap("rotation", 2 * rotation(), None, SOURCE), "differs from the identity by 3"),
        (lambda: LinearMap("rotation", torch.diag(torch.tensor([-1.0] + [1] * 6)), None, SOURCE), "it flips"),
    ):
        with pytest.raises(FeatInvError, match=words):
            wrong()
