"""Feature maps keep their source, mix as stated, and refuse what does not fit."""

import json
from dataclasses import replace

import pytest
import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource, concatenate
from featinv_nodes.core.metadata import Source, parse
from featinv_nodes.core.metrics import best_rows, bootstrap, cosine, cosine_per_location, frechet_distance, top_k_match
from featinv_nodes.core.mixing import at_grid, compose, compose_regions, interpolate

SOURCE = FeatureSource("net.tag", "last", False, 5, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def random_map(seed=0, batch=2, prefix=False):
    """prefix: with three tokens."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, 5, 3, 4, generator=generator)
    return FeatureMap(values, SOURCE, torch.randn(batch, 3, 5, generator=generator) if prefix else None)


def test_source_survives_json():
    assert parse(Source, json.dumps(SOURCE.to_dict()), "file", "source").made() == SOURCE
    with pytest.raises(FeatInvError, match="file: the source cannot be read: field layer is missing; .* and 4 more"):
        parse(Source, '{"backbone": "x"}', "file", "source")


def test_shape_and_finiteness_are_checked():
    with pytest.raises(FeatInvError, match="expected"):
        FeatureMap(torch.zeros(1, 5, 4, 3), SOURCE)
    with pytest.raises(FeatInvError, match="NaN"):
        FeatureMap(torch.full((1, 5, 3, 4), float("nan")), SOURCE)


@pytest.mark.parametrize(
    "field, value", [("backbone", "other"), ("layer", "x"), ("mean", (0.0, 0.0, 0.0)), ("input_size", (1, 2))]
)
def test_maps_of_different_sources_do_not_combine(field, value):
    other = FeatureMap(random_map().values, replace(SOURCE, **{field: value}))
    for combine in (
        lambda: interpolate([random_map(), other], [1, 1]),
        lambda: compose(random_map(), other, torch.ones(1, 3, 4)),
        lambda: cosine(random_map(), other),
        lambda: concatenate([random_map(), other]),
    ):
        with pytest.raises(FeatInvError, match=field):
            combine()


def test_prefix_tokens_stay_with_their_maps():
    """A head that reads the class token would answer for another map, or be refused."""
    a, b = random_map(0, prefix=True), random_map(1, prefix=True)
    for maps, expected in (
        (a.to("cpu"), a.prefix),
        (a.select(-1), a.prefix[1:]),
        (a.select(torch.tensor([1, 0])), a.prefix.flip(0)),
        (a.repeat(2), a.prefix[[0, 0, 1, 1]]),
        (a.in_turn(3), a.prefix[[0, 1, 0]]),
        (concatenate([a, b]), torch.cat([a.prefix, b.prefix])),
        (interpolate([a, b], [1, 3]), 0.25 * a.prefix + 0.75 * b.prefix),
    ):
        assert torch.allclose(maps.prefix, expected, atol=1e-6) and len(maps) == len(expected)  # float32
    assert torch.equal(a.select(-1).values, a.values[1:])
    for maps in (
        concatenate([a, random_map(1)]),
        interpolate([a, random_map(1)], [1, 3]),
        compose(a, b, torch.ones(1, 3, 4)),
        a.with_values(b.values),
    ):
        assert maps.prefix is None


def test_interpolation_is_convex():
    a, b = random_map(0), random_map(1)
    assert torch.equal(interpolate([a, b], [1, 0]).values, a.values)
    assert torch.allclose(interpolate([a, b], [1, 3]).values, 0.25 * a.values + 0.75 * b.values, atol=1e-6)
    for weights in ([1, -1], [0, 0], [1]):
        with pytest.raises(FeatInvError):
            interpolate([a, b], weights)


def test_composition_takes_each_cell_from_its_side():
    a, b = random_map(0), random_map(1)
    mask = torch.zeros(1, 96, 128)
    mask[:, :32, :64] = 1  # exactly one cell row and two cell columns
    mixed = compose(a, b, mask).values
    assert torch.equal(mixed[:, :, 0, :2], a.values[:, :, 0, :2])
    assert torch.equal(mixed[:, :, 1:], b.values[:, :, 1:]) and torch.equal(mixed[:, :, 0, 2:], b.values[:, :, 0, 2:])
    each = compose(a, b, torch.stack([mask[0], 1 - mask[0]])).values  # a mask for each map
    assert torch.equal(each[0], mixed[0]) and torch.equal(each[1, :, 0, 2:], a.values[1, :, 0, 2:])
    assert torch.equal(each[1, :, 0, :2], b.values[1, :, 0, :2])
    mask[:, :48] = 1  # half of the second row
    assert at_grid(mask, (3, 4), soft=True)[0, 0, 1, 3] == 0.5
    with pytest.raises(FeatInvError, match="pooled"):
        compose(a.pool(), b.pool(), mask)
    with pytest.raises(FeatInvError, match="covers no cell of the 3 x 4 feature map"):
        compose(a, b, torch.zeros(1, 30, 40))
    for wrong in (torch.full((1, 30, 40), torch.nan), torch.ones(30, 40), torch.ones(1, 1, 30, 40)):
        for soft in (True, False):
            with pytest.raises(FeatInvError, match="the mask ha.*expected numbers in 0..1 of the shape"):
                compose(a, b, wrong, soft)
    with pytest.raises(FeatInvError, match="the mask has NaN"):
        compose(a, b, torch.tensor([[[0.0, torch.nan]]]))
    with pytest.raises(FeatInvError, match="3 masks and"):
        compose(a, b, torch.ones(3, 30, 40))


def test_several_regions_lie_on_top_of_one_another_in_their_order():
    a, b, c = random_map(0), random_map(1), random_map(2)
    left, top = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    left[:, :, :2], top[:, 0] = 1, 1
    values = compose_regions(a, [(b, left), (c, top)]).values
    assert torch.equal(values[:, :, 0], c.values[:, :, 0]) and torch.equal(values[:, :, 1:, :2], b.values[:, :, 1:, :2])
    assert torch.equal(values[:, :, 1:, 2:], a.values[:, :, 1:, 2:])
    with pytest.raises(FeatInvError, match="no region"):
        compose_regions(a, [])


def test_cosine_against_a_plain_loop():
    a, b = random_map(0), random_map(1)
    for i in range(2):
        values = []
        for y in range(3):
            for x in range(4):
                u, v = a.values[i, :, y, x].double(), b.values[i, :, y, x].double()
                values.append((u @ v / u.norm() / v.norm()).item())
        assert abs(cosine(a, b)[i].item() - sum(values) / 12) < 1e-6
    assert torch.allclose(cosine(a, a), torch.ones(2), atol=1e-6)
    centre = a.values.mean((0, 2, 3))
    shifted = FeatureMap(a.values + 100, SOURCE)
    assert cosine(shifted, FeatureMap(b.values + 100, SOURCE)).min() > 0.99  # a common part hides every difference
    assert cosine_per_location(shifted, FeatureMap(b.values + 100, SOURCE), centre + 100).mean() < 0.9


def test_a_cell_belongs_to_the_mask_that_covers_half_of_it():
    mask = torch.zeros(1, 4, 8)
    mask[:, :2, :2], mask[:, :2, 4:5] = 1, 1  # all of one cell, half of another
    assert at_grid(mask, (2, 4))[0, 0].tolist() == [[1, 0, 1, 0], [0] * 4]
    assert at_grid(mask, (2, 4), soft=True)[0, 0].tolist() == [[1, 0, 0.5, 0], [0] * 4]


def test_top_k_match():
    original = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    again = torch.tensor([[3.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    assert top_k_match(original, again, 1).tolist() == [False, True]
    assert top_k_match(original, again, 2).tolist() == [True, True]


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator)
    b = 2 * torch.randn(20_000, 3, generator=generator) + 1
    # |mu|^2 + sum (s1 - s2)^2 = 3 + 3; sampling error of 20,000 draws is about 1 %
    assert abs(frechet_distance(a, b) - 6) < 0.2
    assert frechet_distance(a, a) < 1e-6
    few = a[:20], b[:20]  # with more channels than vectors, of which the further ones say nothing
    wide = frechet_distance(*(torch.nn.functional.pad(x, (0, 30)) for x in few))
    assert wide == pytest.approx(frechet_distance(*few), rel=1e-6)  # float64


def test_bootstrap_interval_covers_the_mean():
    result = bootstrap(torch.arange(100.0))
    assert result["n"] == 100 and result["low"] < result["value"] == 49.5 < result["high"]
    assert 4 < result["value"] - result["low"] < 8  # 1.96 * 28.9 / 10 = 5.7
    assert bootstrap(torch.arange(100.0)) == result
    assert "few" not in result and bootstrap(torch.arange(9.0))["few"]
    assert bootstrap(torch.ones(1)) == {"value": 1.0, "low": None, "high": None, "n": 1, "few": True}


def test_bootstrap_draws_rows_of_several_samples_together():
    a = torch.rand(50, generator=torch.Generator().manual_seed(0))
    ratio = bootstrap(a, 2 * a, statistic=lambda x, y, axis: y.mean(axis) / x.mean(axis))
    # 1e-12: float64; were the samples drawn apart, the ratio would spread by about a tenth
    assert ratio["low"] == pytest.approx(2, abs=1e-12) and ratio["high"] == pytest.approx(2, abs=1e-12)


def test_bootstrap_interval_is_one_of_95_per_cent():
    """1.96 standard errors to either side; of 90 % it would be 1.64. 2000 draws tell the quantiles to about 3 %."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    result, error = bootstrap(values), values.std().item() / 400**0.5
    assert (result["high"] - result["low"]) / (2 * error) == pytest.approx(1.96, rel=0.08)


def test_maps_in_turn_and_the_best_of_each():
    """Pictures of two maps repeated in turn: rows 0, 2, 4 belong to the first, 1, 3, 5 to the second."""
    maps = random_map()
    assert [i for row in maps.in_turn(5).values for i in range(2) if torch.equal(row, maps.values[i])] == [
        0,
        1,
        0,
        1,
        0,
    ]
    assert torch.equal(maps.in_turn(1).values, maps.values[:1])
    similarity = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.4])
    assert best_rows(similarity, 2, 1).tolist() == [2, 1] and best_rows(similarity, 2, 2).tolist() == [2, 4, 1, 5]
    for rows, keep in ((5, 1), (6, 4), (6, 0)):
        with pytest.raises(FeatInvError, match="to keep: expected"):
            best_rows(similarity[:rows], 2, keep)
