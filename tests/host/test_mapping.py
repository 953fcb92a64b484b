"""Linear maps of feature space and several regions in a real ComfyUI's process: what mapping.py measured there."""

CLOSE = 1e-5  # float32 sums in another order; no difference was seen


def test_a_linear_map_from_pairs_changes_other_maps_as_the_method_does(measured):
    result = measured["mapping"]
    assert max(result["differences"].values()) <= CLOSE
    cosines = result["cosines"]
    assert cosines["affine"] > cosines["unchanged"] + 0.02 and cosines["rotation"] > cosines["unchanged"]
    assert result["off"] and result["arithmetic"] <= CLOSE


def test_linear_maps_are_kept_as_files_and_opened_again(measured):
    result = measured["mapping"]
    files = [f"swap {kind}.safetensors" for kind in ("affine", "direction", "rotation")]
    assert result["names"] == result["folder"] == files and result["opened"] <= CLOSE
    made, opened = result["reports"]
    assert made.startswith(opened) and made.endswith("Press R to see it in Load Linear Map.")
    assert opened.startswith("direction, of resnet10t.tiny_world, layer last") and "2 held-out pairs" in opened
    assert result["said"].startswith("affine") and "saved" not in result["said"]
    assert " of 4 maps inside; furthest is number " in result["scope"][0]
    assert result["scope"][1].startswith("connect the inversion model")


def test_what_does_not_fit_a_linear_map_is_named(measured):
    result = measured["mapping"]
    for case, words in {
        "other backbone": "Use the same backbone",
        "uneven": "8 feature maps before the change and 4 after it",
        "outside": "leads out of",
        "gone": "none.safetensors is not in",
        "nothing saved": "there is no file yet; save one with Linear Map from Pairs",
    }.items():
        assert result[case].startswith("FeatInvError") and words in result[case], result[case]


def test_several_regions_lie_in_their_masks(measured):
    result = measured["mapping"]["regions"]
    assert result["right"]
    assert "needs a mask for features_c; connect mask_c" in result["no mask"]
    assert "mask_d is connected, features_d is not" in result["no map"]


def test_feature_mix_is_the_method_in_every_mode(measured):
    result = dict(measured["mapping"]["mixes"])
    assert result.pop("edges differ") > 0.01
    assert {name: value for name, value in result.items() if not value <= CLOSE} == {}
