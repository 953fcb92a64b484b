"""The scope statistics: calibrated on held-out maps, and what each of them sees."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.scope import (
    EDGE,
    LEVELS,
    OUTSIDE,
    STATISTICS,
    VERDICTS,
    Scope,
    fit_scope,
    neighbour_mean,
    verdict_of,
)
from featinv_nodes.core.weights import load_scope
from featinv_nodes.worlds import model_file, open_backbone
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.drawn.scenes import draw

SOURCE = FeatureSource("net.tag", "last", False, 24, (6, 5), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
POOLED = replace(SOURCE, pooled=True)


def maps(count, seed, source=SOURCE):
    """Smooth non-negative maps on a curved surface of few dimensions, as a network's are."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 6, generator=torch.Generator().manual_seed(99))
    coarse = F.interpolate(
        torch.randn(count, 6, 2, 2, generator=random), source.grid, mode="bilinear", align_corners=True
    )
    values = (
        torch.einsum("cd,bdhw->bchw", mixing, coarse).relu()
        + 0.3
        + 0.05 * torch.rand(count, 24, *source.grid, generator=random)
    )
    result = FeatureMap(values, SOURCE)
    return result.pool() if source.pooled else result


@pytest.fixture(scope="module", params=[SOURCE, POOLED], ids=["spatial", "pooled"])
def fitted(request):
    return fit_scope(maps(800, 0, request.param), centres=100), maps(500, 1, request.param)


@pytest.fixture(scope="module")
def spatial():
    return fit_scope(maps(800, 0), centres=32), maps(500, 1)


def test_percentages_of_held_out_maps_are_what_they_say(fitted):
    """They are uniform: 400 calibrating and 500 judged maps leave sampling errors of up to 0.11 (Kolmogorov, 1 %)."""
    scope, unseen = fitted
    report = scope.evaluate(unseen)
    assert tuple(report.share) == scope.statistics
    for shares in (*report.share.values(), report.combined):
        ordered = shares.sort().values / 100
        assert (ordered - torch.arange(500) / 500).abs().max() < 0.13  # and 0.02 for lines between quantiles
    counts = Counter(report.verdict)
    assert counts["inside"] > 450 and counts["outside"] < 20
    for name, shares in report.locations.items():
        assert shares.shape == (500, *unseen.values.shape[2:]) and abs(shares.mean() - 50) < 5, name
    assert abs(report.where.mean() - 50) < 5


def edited(unseen):
    x, random = unseen.values, torch.Generator().manual_seed(2)
    order = torch.randperm(x[0, 0].numel(), generator=random)
    half = torch.cat([x[..., :3], x.roll(1, 0)[..., 3:]], 3)
    # edit, and the statistics that must be the ones to see it
    return {
        "longer": (3 * x, {"magnitude", "distance"}),
        "shorter": (x / 3, {"magnitude", "distance"}),
        "mixed": (sum(x.roll(n, 0) for n in range(4)) / 4, {"distance"}),
        "other channels": (x[:, torch.randperm(x.shape[1], generator=random)], {"direction"}),
        "noise": (torch.randn(x.shape, generator=random) * x.std() + x.mean(), {"direction"}),
        "shuffled": (x.flatten(2)[..., order].view_as(x), {"neighbours"}),
        "splice": (half, {"neighbours"}),
    }


def test_each_edit_is_seen_by_the_statistic_made_for_it(spatial):
    scope, unseen = spatial
    usual = scope.evaluate(unseen)
    for label, (values, statistics) in edited(unseen).items():
        report = scope.evaluate(unseen.with_values(values))
        for name in statistics:
            higher = (report.surprise[name][:, None] > usual.surprise[name][None]).float().mean()
            assert higher > 0.8, (label, name, higher)
        assert (report.score[:, None] > usual.score[None]).float().mean() > 0.75, label


def test_direction_does_not_see_length_nor_plain_statistics_places(spatial):
    """So the line under a picture names the right part."""
    scope, unseen = spatial
    usual, longer = scope.evaluate(unseen), scope.evaluate(unseen.with_values(3 * unseen.values))
    for name in ("direction", "neighbours"):
        assert torch.allclose(usual.share[name], longer.share[name], atol=0.01)
    shuffled = scope.evaluate(unseen.with_values(edited(unseen)["shuffled"][0]))
    for name in ("direction", "magnitude", "distance"):
        assert torch.allclose(usual.share[name], shuffled.share[name], atol=0.01)


def test_a_map_is_as_unusual_as_its_worst_tenth_by_neighbours_and_as_its_mean_by_the_rest(spatial):
    """So a seam of a few locations shows, which the mean over all would hide. Of 30 locations, a tenth are three."""
    scope, unseen = spatial
    raw, report = scope.raw(unseen), scope.evaluate(unseen)
    worst = raw["neighbours"].flatten(1).topk(3).values.mean(1)
    expected = {"neighbours": worst, "direction": raw["direction"].mean((1, 2))}
    for name, statistic in expected.items():
        rising = report.surprise[name][statistic.argsort()].diff()
        assert rising.min() > -1e-4, f"{name}: maps are ranked by another number"  # float32, sums in another order


def test_says_where(spatial):
    scope, unseen = spatial
    values = unseen.values.clone()
    values[:, :, 2, 3] = values[:, :, 2, 3].flip(1)
    where = scope.evaluate(unseen.with_values(values)).where
    assert where.shape == (500, 6, 5)
    assert (where[:, 2, 3] > where.flatten(1).median(1).values).float().mean() > 0.95


def test_words(spatial):
    scope, unseen = spatial
    values = unseen.values[:3].clone()
    values[1] *= 20
    values[2] /= 20
    report = scope.evaluate(unseen.with_values(values))
    assert report.verdict[1:] == ["outside", "outside"]
    assert (
        "magnitude too large" in report.off[1]
        and "too far from the mean" in report.off[1]
        and "magnitude too small" in report.off[2]
    )
    assert report.captions()[1].startswith("outside: ")
    inside = next(i for i, verdict in enumerate(scope.evaluate(unseen).verdict) if verdict == "inside")
    line = scope.evaluate(unseen.select(inside)).describe()
    assert line.startswith("inside (direction ") and line.endswith(" % of held-out maps are less unusual)")
    assert scope.evaluate(unseen.select(inside)).off == [[]]
    assert "of 3 maps inside; furthest is number" in report.describe() and "\n" not in report.describe()
    assert [verdict_of(x) for x in (EDGE - 0.1, EDGE, OUTSIDE)] == list(VERDICTS)


def test_a_map_is_judged_alike_alone_and_in_a_batch(fitted):
    scope, unseen = fitted
    together, alone = scope.evaluate(unseen), scope.evaluate(unseen.select(7))
    assert torch.allclose(together.combined[7], alone.combined[0], atol=0.1)  # sums in another order


def test_the_same_maps_in_batches_give_the_same_scope():
    whole = maps(300, 0)
    one = fit_scope(whole, centres=16)
    assert all(
        torch.equal(a, b) for a, b in zip(one.tensors().values(), fit_scope(whole, centres=16).tensors().values())
    )
    parts = fit_scope((whole.select(slice(i, i + 7)) for i in range(0, 300, 7)), centres=16)
    assert parts.maps == 300 and torch.allclose(one.quantiles["magnitude"], parts.quantiles["magnitude"])


def test_vectors_of_length_zero_are_judged():
    values = maps(400, 0).values
    values[:, :, 0, 0] = 0
    scope = fit_scope(FeatureMap(values, SOURCE), centres=16)
    report = scope.evaluate(FeatureMap(torch.zeros(1, 24, 6, 5), SOURCE))
    assert report.verdict == ["outside"] and report.score.isfinite().all()


def test_dead_channels_are_known_to_be_dead():
    values, alive = maps(400, 0).values, maps(1, 1)
    values[:, :4] = 0
    scope = fit_scope(FeatureMap(values, SOURCE), centres=16)
    assert all(t.isfinite().all() for t in scope.tensors().values())
    report = scope.evaluate(alive)
    assert report.verdict == ["outside"] and "too far from the mean" in report.off[0] and report.score.isfinite().all()


def test_cycle_cosines_are_judged_from_below(spatial):
    scope, _ = spatial
    with pytest.raises(FeatInvError, match="--drawn"):
        scope.evaluate_cycle(torch.tensor([0.9]))
    measured = replace(scope, quantiles=scope.quantiles | {"cycle": torch.linspace(0.8, 1, len(LEVELS))})
    share, verdicts = measured.evaluate_cycle(torch.tensor([0.99, 0.9, 0.5]))
    assert verdicts == ["inside", "inside", "outside"] and abs(share[1] - 50) < 1 and share[0] < share[1] < share[2]


def test_bad_input_is_named(spatial):
    scope, unseen = spatial
    with pytest.raises(FeatInvError, match="layer: stages.1 against last"):
        scope.evaluate(FeatureMap(unseen.values, replace(SOURCE, layer="stages.1")))
    with pytest.raises(FeatInvError, match="30 feature maps; scope statistics need at least 200"):
        fit_scope(maps(30, 0))
    with pytest.raises(FeatInvError, match="constant features"):
        fit_scope(FeatureMap(torch.ones(300, 24, 6, 5), SOURCE))
    with pytest.raises(FeatInvError, match="do not fit together"):
        fit_scope([maps(200, 0), maps(200, 0, POOLED)])


def test_comes_back_from_its_tensors_and_json(fitted):
    scope, unseen = fitted
    again = Scope.read(scope.source, json.loads(json.dumps(scope.about())), scope.tensors())
    assert torch.equal(again.evaluate(unseen).combined, scope.evaluate(unseen).combined)
    with pytest.raises(FeatInvError, match="fit them again"):
        Scope.read(scope.source, scope.about(), {})


def test_neighbour_mean_leaves_out_the_place_itself_and_the_border():
    z = torch.arange(9.0).view(1, 1, 3, 3)
    assert torch.allclose(neighbour_mean(z)[0, 0, 1, 1], torch.tensor(4.0))
    assert torch.allclose(neighbour_mean(z)[0, 0, 0, 0], torch.tensor((1 + 3 + 4) / 3))


@pytest.mark.parametrize("name", DRAWN.models)
def test_shipped_models_know_held_out_scenes_from_noise(name):
    """95 and 99 % by construction; of 200 new scenes chance leaves 5 +- 5 % and 1 +- 2 % beyond (three deviations)."""
    scope = load_scope(model_file(name))
    expected = [name for name in STATISTICS if name != "neighbours" or not scope.source.pooled]
    assert scope.maps >= 2000 and list(scope.statistics) == expected
    calibrated = {name + at for name in (*expected, "score") for at in ("", " at")} | {"cycle"}
    assert scope.quantiles.keys() == calibrated
    assert all(len(q) == len(LEVELS) and (q.diff() >= 0).all() and q[0] < q[-1] for q in scope.quantiles.values())
    backbone = open_backbone(scope.source.backbone)
    pictures = backbone.preprocess(draw(0, torch.arange(300_000, 300_200), "held-out").image)
    features = backbone.extract(pictures, scope.source.layer, scope.source.pooled)
    counts = Counter(scope.evaluate(features).verdict)
    assert counts["inside"] >= 180 and counts["outside"] <= 8
    noise = (
        torch.randn(features.values.shape, generator=torch.Generator().manual_seed(0)) * features.values.std()
        + features.values.mean()
    )
    assert set(scope.evaluate(features.with_values(noise)).verdict) == {"outside"}
