"""FeatInv ControlNet in areas and windows, under a mask and along a curve, and what it says of latents that do not
fit."""

import pytest
from test_inside import CLOSE


@pytest.fixture
def seen(measured):
    return measured["controlling"]


def test_an_area_gets_the_whole_map_or_its_part(seen):
    """Set before our node or after it; an area that is the whole picture changes nothing."""
    assert len(seen["areas"]) == 5
    assert {name: value for name, value in seen["areas"].items() if not value <= CLOSE} == {}


def test_maps_side_by_side_are_each_whole_in_their_half(seen):
    """0.73 against 0.66 seen."""
    cosine = seen["two_maps"]
    assert cosine["whole map in each area"] > cosine["the area's part"] + 0.03


def test_a_mask_says_where_control_acts(seen):
    """At every depth, in an area its part of the mask, a mask for each latent."""
    result = seen["masks"]
    assert result["black"] == result["left"] == result["left in an area"] == 0
    assert max(result[name] for name in ("white", "one each", "kept", "kept in an area")) <= CLOSE
    assert result["finer than a cell"] <= 0.05  # a hundredth, a twentieth on the edges; single pixels give 0 or 3/2
    assert len(result["every depth"]) == 4 and 0 < min(result["every depth"]) <= max(result["every depth"]) < 0.9
    assert "expected finite values" in result["wrong"]
    assert "start_percent 0.8 is after end_percent 0.2" in result["backwards"]


def test_the_strength_follows_its_curve(seen):
    """Evenly from start to end: 0.8 times 1, 0, 1 between 20 % and 60 % of ten steps."""
    result = seen["curves"]
    assert result["constant"] == result["single"] == result["nothing"] == 0
    assert result["strengths"] == pytest.approx([0.8, 0.4, 0, 0.4], abs=0.01)  # a thousandth of the process is 0.004
    assert "'1; 0'; expected factors from 0 to 10" in result["words"] and "'1, -1'" in result["negative"]


def test_each_latent_of_a_context_window_has_its_own_map(seen):
    """Of four latents, two at a time; newer hosts add the one before."""
    result = seen["windows"]
    if "failed" in result:
        pytest.skip(f"context windows along a batch fail in this ComfyUI: {result['failed']}")
    assert [numbers[-2:] for numbers in result["maps"]] == [[0, 1], [1, 2], [2, 3]]
    assert all(numbers == list(range(numbers[0], numbers[-1] + 1)) for numbers in result["maps"])
    assert result["exact"] <= CLOSE


def test_a_context_window_along_the_width_or_the_height_has_its_part_of_the_map(seen):
    result = seen["windows"]
    assert max(result["across"], result["down"]) <= CLOSE and {result["columns"], result["rows"]} <= {6, 7}


def test_a_part_is_known_by_the_host_s_window_or_refused(seen):
    result = seen["parts"]
    assert result["window"] == [3, 0] and result["one before"] == [1, 2, 3]
    assert "processes 2 of 3 latents at a time" in result["some latents"]
    assert "4 x 8 latent cells of 8 x 8" in result["some columns"]


def test_the_node_says_what_does_not_fit(seen):
    """Feature Guidance too: on itself, in the browser that queued, and in the log; no longer when it fits."""
    said = {
        "more": ["5 feature maps for 1 latent: those after number 1 are not used. Give the sampler a batch of 5"],
        "fewer": ["2 feature maps for 3 latents: they repeat in turn, the first ones once more"],
        "gradient": ["2 feature maps for 1 latent: those after number 1 are not used"],
        "masks": ["2 masks for 1 latent: those after number 1 are not used"],
    }
    for case, (words,) in said.items():
        (text, node, browser), (logged,) = seen["warnings"][case]
        assert text.startswith(words) and browser == "me" and node == ("13" if case == "gradient" else "12"), case
        assert logged == f"FeatInv: {text}", case
    assert seen["warnings"]["right after"] == [["5 feature maps for 5 latents", "12", "me"]]
    assert seen["warnings"]["again"] == []
    assert seen["warnings"]["in turn"] == [
        ["2 feature maps for 4 latents: each serves 2 of them, in turn.", "12", "me"]
    ]
    ((logged,),) = seen["warnings"]["size"]
    assert "12 x 8 cells, 96 x 64 pixels" in seen["warnings"]["wide"][0][0]
    assert "12 x 6 cells, 96 x 48 pixels" in logged and "trained at 8 x 8 latent cells, 64 x 64 pixels" in logged


def test_empty_latents_have_the_size_of_the_inversion_model(seen):
    """An embedded world's, by its base model's name, or as the weights file says."""
    result = seen["empty"]
    assert result["drawn"] == [2, 24, 8, 8] and result["photo"] == [1, 24, 16, 16]
    assert (
        result["minisd"] == [2, 4, 32, 32] and result["sd"] == [2, 4, 64, 64] and result["written"] == [2, 24, 12, 12]
    )
    assert "at 16 x 16 latent cells, 128 x 128 pixels" in result["about"]
    assert "does not say at which size" in result["unknown"]


def test_maps_of_paired_latents_are_drawn_and_shown_as_pairs_or_not_at_all(seen):
    result = seen["pairs"]
    assert result["own"] == result["pictures"] == "no error"
    assert "4 maps, and the sampler has 2 latents" in result["fewer"]
    assert result["part way"] == "no error"  # where a second sampler goes on, latents of a seed differ
    assert "same noise for equal seeds" in result["other noise"]
    assert "2 images of Paired Latents' 4 maps" in result["fewer images"]
    assert "not those that Paired Latents makes" in result["other maps"]
