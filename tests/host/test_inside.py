"""The pack inside a real ComfyUI's process: what inside.py measured there."""

import pytest

#: float32 sums in another order; the largest seen is 3e-6
CLOSE = 1e-5


def test_loading_imports_no_heavy_library(measured):
    heavy = {"timm", "diffusers", "accelerate", "einops", "transformers", "pydantic"}
    assert not heavy & {name.split(".")[0] for name in measured["imported"]}


def test_a_missing_requirement_gives_one_line(measured):
    line, nodes = measured["missing"]
    assert "timm is missing" in line and "pip install" in line and nodes == "30 nodes"


def test_the_same_picture_as_the_command_line(measured):
    """Every strength, guidance, range, negative, size and batch, and two stacked controls: one weights file, one
    result."""
    assert len(measured["parity"]) == 11
    assert {str(p["case"]): p["difference"] for p in measured["parity"] if not p["difference"] <= CLOSE} == {}


def test_strength_zero_is_a_bypass(measured):
    assert measured["bypass"]


def test_chains_with_a_stock_controlnet_in_either_order(measured):
    assert measured["stacking"]["order"] <= CLOSE and measured["stacking"]["stock_matters"] > 0.01


def test_encodes_once_per_run_and_keeps_both_conditionings_in_one_batch(measured):
    assert measured["counts"] == {"control": 10, "encoder": 2}  # ten steps; the features and the trained null


def test_other_guiders_give_the_pictures_that_their_arithmetic_says(measured):
    """Dual CFG in its limits, Perp-Neg, Basic, conditionings swapped: who is the negative is known whatever its
    number."""
    result = dict(measured["guiders"])
    assert result.pop("calls") == 10 and result.pop("they differ") > 0.01  # three conditionings in one batch
    assert {name: value for name, value in result.items() if not value <= CLOSE} == {}


def test_two_guidances_are_the_command_line_s(measured):
    assert len(measured["two_scales"]) == 3 and max(p["difference"] for p in measured["two_scales"]) <= CLOSE


def test_the_best_of_many_are_kept_map_by_map(measured):
    result = measured["best"]
    assert abs(result["together"]) <= CLOSE  # Feature Similarity, too, takes the maps in turn
    assert (
        result["kept"] == 0 and result["text"][:-1] == result["expected"] and result["text"][-1].startswith("all 8: ")
    )
    assert (
        "7 images of 2 feature maps" in result["uneven"]
        and "8 images of 2 feature maps, 5 of each" in result["too few"]
    )


def test_guidance_by_the_gradient_makes_pictures_more_alike(measured):
    """As the command line's; the same with another guider; only in the model that the node gives."""
    result = measured["gradient"]
    assert result["moved"] > result["plain"] + 0.01 and result["bypass"] and result["after"] == 0
    assert max(result["dual"], result["one"]) <= CLOSE
    # Guided steps enlarge float32's differences: noise changed by 1e-5 moves these latents by 7e-6 without guidance,
    # by 6e-5 with it. 8.3e-5 is seen between host and program.
    assert result["command line"] <= 5e-4
    assert (
        "Use the same backbone" in result["other backbone"] and "3 latent channels, the model 24" in result["other vae"]
    )


def test_guidance_by_the_gradient_decodes_latents_in_the_autoencoders_own_scale(measured):
    """A model whose latents are scaled and shifted, as Stable Diffusion's are, is guided to the same pictures."""
    assert measured["scaled"]["same"] <= 5e-4  # each guided step enlarges the float32 differences; 1e-5 seen
    assert measured["scaled"]["scaled"] > 1


def test_the_guidance_sampler_draws_the_command_line_s_pictures_without_a_trained_model(measured):
    """Noise that is added back too; each step is reported as often as it is taken."""
    result = measured["untrained"]
    assert result["command line"] <= 5e-4  # as for Feature Guidance: moves enlarge float32's differences
    assert min(result["noise matters"], result["distance matters"]) > 0.05
    assert result["moved"] > result["plain"] + 0.1
    assert result["callbacks"] == [[step, 2, 3] for step in (0, 0, 1, 1)]
    assert result["masked"] == 0  # what a noise mask keeps is not moved
    assert result["quick"] == 0  # about 60 gradients: in 2 steps, each is taken 8 times


def test_the_guidance_sampler_guides_models_of_flows_and_refuses_what_adds_no_noise(measured):
    """The flow is the embedded model under the host's ModelSamplingSD3: not trained as one, so it knows no pictures."""
    result = measured["untrained"]
    assert result["flow, moved"] > result["flow, plain"] + 0.05
    assert "adds no noise" in result["no noise"] and result["no noise"].startswith("FeatInvError")
    assert (
        "Use the same backbone" in result["other backbone"] and "3 latent channels, the model 24" in result["other vae"]
    )


def test_says_whether_a_map_is_inside(measured):
    said = measured["scope"]
    assert said["scene"].startswith("inside (direction ")
    assert (
        said["noise"].startswith("0 of 3 maps inside; furthest is number ") and ": outside: direction" in said["noise"]
    )
    assert said["none"] == "no scope statistics in this weights file"


def test_a_run_of_paired_latents_is_the_command_line_s_feat_inv_viz(measured):
    """The same pictures, slopes and masks from one run of the stock sampler, turned down and up."""
    for case in ("0.25", "2.0"):
        result = measured["paired"][case]
        assert (
            result["pictures"] <= 1e-4 and abs(result["slope"]) <= 1e-4 and result["mask"] <= 1e-3
        )  # float32, other batch sizes
        assert result["report"] == result["expected"] and result["report"][1].startswith("sky + night: slope ")
        (k, height, width, _), heat, signed, mask = result["shapes"]
        assert (k, width) == (2, 256) and height > 256 and heat == signed == [2, 256, 256, 3] and mask == [2, 64, 64]
    # heat and sign as colours, and the mask of another threshold
    assert max(*measured["paired"]["maps"], measured["paired"]["stricter"]) <= 1e-3
    assert measured["paired"]["concept map"] <= 1e-3  # of the first map, a number below each


def test_the_closed_loop_is_the_command_line_s(measured):
    """The same factors commanded in as many rounds, the same slopes and pictures; FeatInv-Viz reads the same of it."""
    for rounds in ("1", "3"):
        result = measured["closed_loop"][rounds]
        (ours, theirs), (reached, expected, read) = result["commanded"], result["reached"]
        assert ours == theirs and abs(reached - expected) <= 1e-4 and abs(reached - read) <= 1e-4
        assert result["pictures"] <= 1e-4 and result["image"] and result["maps"] <= 1e-4  # float32, other batch sizes
        assert result["report"][0] == result["report"][1]
    assert measured["closed_loop"]["3"]["rounds"] == [2, 3]  # one passes, the other does not
    passed, failed = measured["closed_loop"]["3"]["report"][0]
    assert (
        passed.startswith("object: requested 0.25, applied -0.12, measured 0.")
        and "(as requested) in 2 rounds" in passed
    )
    assert "sky + night: requested 0.25, applied" in failed and "(NOT as requested" in failed


def test_a_closed_loop_without_what_it_needs(measured):
    assert "connect the positive and the negative of FeatInv ControlNet" in measured["closed_loop"]["no control"]
    assert "this edit is of 3 feature maps" in measured["closed_loop"]["several maps"]


def test_what_takes_long_can_be_cancelled(measured):
    """Whenever the user does it, with the next question whether to go on; and it asks often: for each layer of the
    backbone, each concept, each layer and step of the sampler's drawing."""
    result = measured["cancelled"]
    assert set(result) == {
        *("discover mcd", "discover nmf", "extract", "viz", "closed loop"),
        *("a backbone's first map", "guidance sampler"),
    }
    for name, work in result.items():
        assert work.pop("finished") == "no error" and work.pop("asked") > 20, name
        assert len(work) == 2, name
        for message, asked, last in work.values():
            assert message.startswith("InterruptProcessingException") and asked == last, (name, message)


def test_a_seed_has_the_same_noise_in_every_part(measured):
    """That of the command line, and of a latent that knows its number in a batch."""
    result = measured["paired"]
    assert result["noise"] and result["batch_index"] == [2, 3] * 3 and result["masks"]
    assert max(result["order"]) == 0


def test_an_edited_map_is_judged(measured):
    alone, inside, outside = measured["paired"]["scope"]
    assert alone == "connect the inversion model to see whether the map is still in scope"
    assert inside.startswith("inside (direction ") and outside.startswith(
        "1 of 2 maps inside; furthest is number 1: outside: "
    )  # the scene has no sky


def test_batches_of_any_number_of_maps(measured):
    assert max(measured["batches"].values()) <= CLOSE


def test_interrupted_sampling_leaves_nothing_behind(measured):
    assert measured["interruption"]["stopped"].startswith("InterruptProcessingException")
    assert measured["interruption"]["again"] == 0


def test_memory_returns_to_where_it_was(measured):
    assert measured["memory"]["20"] <= measured["memory"]["3"]


def test_encoded_maps_are_let_go_when_the_run_ends(measured):
    """Though the host keeps the conditioning: otherwise each graph's would stay in the graphics card's memory."""
    result = measured["encoded"]
    assert result["while"] > result["before"] == result["after"]


def test_models_are_managed_unloaded_and_come_back(measured):
    result = measured["unloading"]
    assert all(result["managed"].values()) and result["left"] == 0
    assert result["again"] == 0 and result["features"] == 0


def test_weights_may_be_cast_one_by_one(measured):
    assert measured["low_memory"]["modules"] > 50 and measured["low_memory"]["difference"] <= CLOSE


def test_plain_modules_are_loaded_whole_however_short_memory_is(measured):
    assert measured["low_memory"]["left behind"] == {"backbone": 0, "encoder": 0, "autoencoder": 0}


def test_masks_names_and_classes_are_what_the_user_meant(measured):
    result = measured["features_nodes"]
    assert result["fit"][0] <= CLOSE and result["fit"][1] > 0.01  # the whole picture where asked for, not its middle
    assert result["columns"] == [2, 3, 4, 5]  # of 8, as columns 16 to 48 of the 64 that the model saw
    assert result["names"][0] != result["names"][1] and result["names"][1].startswith(
        "saved features/cat[1]_00002.safetensors"
    )
    assert result["folders"] == 4  # a folder's picture replaced, one added below it, none named: each is another
    said, expected = result["classes"]  # the two best of each group of labels, of the middle and of the whole picture
    assert said == expected and said[0] != said[1]
    assert result["caption"] == 0 and 0 < result["similar"] <= 1
    assert (
        "covers no cell of the 8 x 8 feature map" in result["small mask"]
        and "2 masks and 1 feature maps" in result["masks"]
    )


def test_a_file_of_real_size_finds_its_place(measured):
    """SD 1.x architecture, random weights: the host's residuals equal diffusers'."""
    assert measured["real_size"]["residuals"] == 13 and measured["real_size"]["difference"] <= CLOSE


@pytest.mark.parametrize(
    "mistake, words",
    {
        "other backbone": ["vit_tiny_patch16_224.tiny_world", "resnet10t.tiny_world", "Use the same backbone"],
        "other layer": ["layer2 against last", "channels: 64 against 128"],
        "other pooling": ["pooled: True against False"],
        "unknown layer": ["no layer 'layer9'", "last, act1, layer1"],
        "other normalisation": ["mean: (0.4, 0.4, 0.4) against (0.5, 0.5, 0.5)"],
        "nan": ["NaN or infinite", "check the image"],
        "base model": ["width 320 in the weights file, 64 in the model", "context 768", "Load Checkpoint"],
        "concepts": ["the concepts", "vit_tiny_patch16_224.tiny_world"],
        "concept number": ["there are 8: 0 sky"],
        "no concept": ["no concept named", "sky, night"],
        "judged by another": ["the feature map", "the inversion model", "resnet10t.tiny_world"],
        "several maps": ["one image at a time; this edit is of 3 feature maps"],
        "several maps shown": ["one image at a time; this edit is of 3 feature maps"],
        "pictures": ["5 images for the original and 3 changed maps; expected a multiple of 4"],
        "read by another": ["the backbone (vit_tiny", "the feature map (resnet10t"],
        "truncated": ["cut.safetensors", "download or copy it again"],
        "foreign": ["foreign.safetensors", "no FeatInv weights file"],
        "missing": ["none.safetensors is not in", "featinv", "press R"],
        "no mask": ["needs a mask"],
        "mixed sources": ["layer: last against layer2"],
    }.items(),
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_mistake_is_named_on_both_sides(measured, mistake, words):
    message = measured["bad_inputs"][mistake]
    assert message.startswith("FeatInvError") and not [w for w in words if w not in message], message
