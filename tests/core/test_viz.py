"""FeatInv-Viz: paired maps, and slopes that say what really came of an edit."""

import pytest
import torch

from featinv_nodes.core.concepts import REST, Concepts, SparseEncoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.viz import (
    PairedMaps,
    Slope,
    closed_loop,
    edit,
    measure_slope,
    measure_slopes,
    null_difference,
    parse_groups,
    passes,
    signed_difference,
    slope,
)

SOURCE = FeatureSource("net.tag", "last", False, 12, (3, 2), (96, 64), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
CLOSE = 1e-4  # float32 sums of a few hundred products


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["orthogonal", "oblique"])
def concepts(request):
    """Three subspaces and a rest, in general position or all orthogonal."""
    rows = (
        torch.linalg.qr(draw(12, 12))[0]
        if request.param == "orthogonal"
        else torch.nn.functional.normalize(draw(12, 12))
    )
    return Concepts(rows[:6].split([1, 2, 3]), ["a", "b", "c"], SOURCE)


@pytest.fixture
def features():
    return FeatureMap(draw(1, 12, 3, 2, seed=3), SOURCE, prefix=draw(1, 1, 12))


def pictures(*numbers):
    """[n, 3, 1, 1], grey, one brightness each."""
    return torch.tensor(numbers)[:, None, None, None].expand(-1, 3, -1, -1)


def test_the_original_and_every_change_once_per_seed(concepts, features):
    change = edit(features, concepts, [["a"], ["b", 2]], 0.25)
    assert change.titles() == ["a", "b + c"] and change.factor == 0.25
    assert torch.equal(change.changed.values[:1], concepts.scale(features, {"a": 0.25}).values)
    assert torch.equal(change.changed.values[1:], concepts.scale(features, {"b": 0.25, "c": 0.25}).values)
    paired = change.paired(4)
    assert len(paired) == 12 and paired.source == SOURCE
    assert torch.equal(paired.values, torch.cat([features.values, change.changed.values]).repeat_interleave(4, 0))
    assert paired.seeds == 4 and not isinstance(paired.select(0), PairedMaps)
    change.require_pairs(paired, 12)
    for maps, count, words in (
        (paired, 8, "8 images of Paired Latents' 12 maps"),
        (paired.in_turn(12), 12, "not those that Paired Latents makes"),
        (edit(features, concepts, [["a"], ["c"]], 0.25).paired(4), 12, "not those that Paired Latents makes"),
    ):
        with pytest.raises(FeatInvError, match=words):
            change.require_pairs(maps, count)
    drawn = torch.arange(12.0)[:, None, None, None].expand(-1, 3, 5, 5)
    assert change.unpaired(drawn)[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_an_edit_that_cannot_be_shown_says_why(concepts, features):
    change = edit(features, concepts, [["a"], ["b"]])
    for wrong in (0, 4):
        with pytest.raises(
            FeatInvError, match=f"{wrong} images for the original and 2 changed maps; expected a multiple of 3"
        ):
            change.unpaired(torch.zeros(wrong, 3, 4, 4))
    several = edit(features.repeat(2), concepts, [["a"], ["b"]])
    assert len(several.changed) == 4
    for use in (lambda: several.paired(5), lambda: several.unpaired(torch.zeros(6, 3, 4, 4))):
        with pytest.raises(FeatInvError, match="one image at a time; this edit is of 2"):
            use()
    for groups in ([], [[]], [["a"], []]):
        with pytest.raises(FeatInvError, match="no concept named; give numbers or names out of a, b, c, rest"):
            edit(features, concepts, groups)
    with pytest.raises(FeatInvError, match="there are 4: 0 a"):
        edit(features, concepts, [["a"], ["d"]])


def test_length_is_kept_where_an_amplified_vector_grows(concepts, features):
    length = features.values.norm(dim=1)
    free, kept = (edit(features, concepts, [["c"]], 3.0, keep).changed.values for keep in (False, True))
    grown = free.norm(dim=1) > length
    assert grown.any() and torch.allclose(kept.norm(dim=1)[grown], length[grown])
    assert torch.allclose(
        torch.cosine_similarity(kept, free), torch.ones(1), atol=CLOSE
    )  # the direction is the edited one


def test_vectors_that_shrink_or_are_turned_down_keep_what_they_are():
    """Two concepts that point against each other: more of one makes the vector shorter, less of it longer."""
    rows = torch.zeros(2, 12)
    rows[0, 0], rows[1, :2] = 1, torch.tensor([-0.9, 0.19**0.5])
    concepts = Concepts([rows[:1], rows[1:]], ["a", "b"], SOURCE)
    features = FeatureMap((0.1 * rows[0] + rows[1])[None, :, None, None].repeat(1, 1, 3, 2), SOURCE)
    for factor, longer in ((3.0, False), (0.25, True)):
        free, kept = (edit(features, concepts, [["a"]], factor, keep).changed.values for keep in (False, True))
        assert (free.norm(dim=1) > features.values.norm(dim=1)).all() == longer and torch.equal(free, kept)


def test_groups_are_written_with_commas_and_semicolons():
    assert parse_groups("sky, bird; branch") == [["sky", "bird"], ["branch"]]
    assert parse_groups(" 0,3 ;;1;\n") == [["0", "3"], ["1"]] and parse_groups("a concept") == [["a concept"]]
    assert parse_groups("") == parse_groups(" , ; \n") == []


def test_a_concept_named_twice_is_scaled_once(concepts, features):
    change = edit(features, concepts, [["a", "0", 0, "b"]], 0.5)
    assert change.groups == (("a", "b"),) and torch.allclose(
        change.changed.values, concepts.scale(features, {"a": 0.5, "b": 0.5}).values
    )


@pytest.mark.parametrize("factor", [0.0, 0.25, 2.0])
def test_the_slope_of_the_edited_map_itself_is_the_factor_and_that_of_others_one(concepts, features, factor):
    """A perfect inversion: the backbone reads exactly what was asked for, in every seed."""
    change = edit(features, concepts, [["a"], ["b", "c"], [REST]], factor)
    result = measure_slopes(change, torch.rand(12, 3, 4, 4), change.paired(3))
    for s in result:
        assert s.asked == factor and s.own == pytest.approx(factor, abs=CLOSE)
        assert s.others == pytest.approx(1, abs=CLOSE) and s.untouched == pytest.approx(1, abs=CLOSE) and s.passed


def test_slopes_where_nothing_changed_or_all_did(concepts, features):
    change = edit(features, concepts, [["b"]], 0.25)
    drawn = (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4))
    whole, half = features.repeat(2), features.with_values(features.values / 2).repeat(2)
    stubborn, faded = measure_slope(change, 0, drawn, (whole, whole)), measure_slope(change, 0, drawn, (half, half))
    assert (
        stubborn.own == pytest.approx(1, abs=CLOSE)
        and stubborn.others == pytest.approx(1, abs=CLOSE)
        and not stubborn.passed
    )
    assert [faded.own, faded.others, faded.untouched] == pytest.approx([0.5] * 3, abs=CLOSE) and not faded.passed
    everything = edit(features, concepts, [["a", "b", "c", REST]], 0.25)
    assert measure_slope(everything, 0, drawn, (whole, everything.changed.repeat(2))).others == 1


def test_each_seed_counts_alike(concepts, features):
    """One seed shows the change and another none: the slope is half way."""
    change = edit(features, concepts, [["c"]], 0.0)
    seen = features.with_values(torch.cat([features.values, change.changed.values]))
    result = measure_slope(change, 0, (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)), (features.repeat(2), seen))
    assert result.own == pytest.approx(0.5, abs=CLOSE) and result.untouched == pytest.approx(1, abs=CLOSE)


def test_a_concept_that_the_map_lacks_has_no_slope():
    """A sparse code is often exactly zero."""
    concepts = Concepts([torch.eye(12)[:1]], ["a"], SOURCE, encoder=SparseEncoder(torch.eye(12)[:1], torch.zeros(1), 1))
    without = FeatureMap(torch.cat([torch.zeros(1, 1, 3, 2), draw(1, 11, 3, 2)], 1), SOURCE)
    assert slope(concepts, [0], without, FeatureMap(draw(1, 12, 3, 2), SOURCE)) == 0


def test_pictures_read_by_another_backbone_are_refused(concepts, features):
    other = FeatureSource(**{**SOURCE.to_dict(), "backbone": "other.tag"})
    change = edit(features, concepts, [["a"]])
    with pytest.raises(
        FeatInvError, match="what the backbone reads in the images \\(other.tag.*backbone: other.tag against net.tag"
    ):
        measure_slopes(change, torch.zeros(4, 3, 8, 8), FeatureMap(draw(4, 12, 3, 2), other))


def test_the_null_difference_is_what_the_seeds_alone_do():
    assert null_difference(pictures(0.1, 0.2, 0.5)).item() == pytest.approx(0.3 * 3**0.5)  # of 0.4, 0.1, 0.3
    assert null_difference(pictures(0.1)) is None


def test_the_null_ratio_compares_the_change_with_the_seeds(concepts, features):
    change = edit(features, concepts, [["a"]])
    drawn = (pictures(0.2, 0.3), pictures(0.7, 0.8))
    assert measure_slope(change, 0, drawn, (features.repeat(2), features.repeat(2))).null == pytest.approx(5)
    assert measure_slope(change, 0, (drawn[0][:1], drawn[1][:1]), (features, features)).null is None


def test_the_sign_says_darker_or_brighter():
    original = torch.zeros(3, 3, 1, 2) + 0.5
    changed = original.clone()
    changed[:, :, 0, 0] += 0.25
    changed[:2, 0, 0, 1] -= 0.3  # one channel, two seeds of three
    assert torch.allclose(signed_difference(original, changed), torch.tensor([[0.25, -0.1]]))
    with pytest.raises(FeatInvError, match="same seed"):
        signed_difference(original, changed[:2])


def test_a_failed_slope_says_so():
    for asked, own, verdict in (
        (0.25, 0.26, "(as requested)"),
        (0.25, 0.95, "NOT as requested: too little"),
        (0.25, -0.4, "NOT as requested: too much"),
        (2, 1.9, "(as requested)"),
        (2, 1.1, "NOT as requested: too little"),
        (2, 2.5, "NOT as requested: too much"),
    ):
        said = Slope(asked, own, 0.97, 1.0, 3.04)
        assert verdict in said.describe() and said.passed == ("NOT" not in verdict)
        assert said.describe().startswith(f"slope {own:.2f} for factor {asked:g} (") and said.describe().endswith(
            "other concepts 0.97; 3.0 times the difference between seeds"
        )
    assert "seeds" not in Slope(0.25, 0.25, 1.0, 1.0, None).describe()
    assert [passes(0.25, s) for s in (0.14, 0.16, 0.39, 0.41)] == [False, True, True, False]


RESPONSES = {
    "faithful": (0.25, lambda f: f, 1),
    "reluctant": (0.25, lambda f: 0.5 + 0.5 * f, 3),
    "too eager": (0.25, lambda f: 2 * f - 1, 2),
    "a step": (0.25, lambda f: 1.0 if f > -0.2 else 0.3, 3),
    "amplified by half": (3.0, lambda f: 1 + (f - 1) / 2, 3),
    "amplified too much": (2.0, lambda f: 1 + 2 * (f - 1), 2),
}


@pytest.mark.parametrize("asked, response, calls", RESPONSES.values(), ids=RESPONSES)
def test_the_closed_loop_finds_a_factor_that_gives_what_was_asked(asked, response, calls):
    tried = []

    def slope_at(factor):
        tried.append(factor)
        return response(factor)

    factor, result = closed_loop(slope_at, asked)
    assert passes(asked, result) and result == response(factor) and tried[0] == asked
    assert len(tried) == calls


def test_a_closed_loop_that_finds_nothing_ends_with_the_nearest():
    """A step from whole to gone: no factor gives a quarter."""
    tried = []

    def slope_at(factor):
        tried.append(factor)
        return 1.0 if factor > 0 else -0.1

    factor, result = closed_loop(slope_at, 0.25)
    assert len(tried) == 5 and result == -0.1 and factor <= 0 and not passes(0.25, result)
    assert min(tried) >= -0.5 and closed_loop(lambda f: 0.9, 0.25, rounds=1) == (0.25, 0.9)
    assert closed_loop(lambda f: 1.0 if f > 0 else -0.9, 0.25) == (0.25, 1.0)  # too little is nearer than too much


def test_a_slope_that_passes_is_taken_though_another_was_nearer():
    """0.39 passes and 0.14 does not, which is nearer to 0.25."""
    answers = iter([0.14, 0.39])
    assert closed_loop(lambda f: next(answers), 0.25) == (0.625, 0.39)
