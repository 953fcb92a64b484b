"""Features without an inversion model, with the kinds of checkpoints that people have."""

import pytest


@pytest.mark.parametrize("decoder", ["own", "small"])
@pytest.mark.parametrize("kind", ["SD 1.x", "SDXL", "Flux"])
def test_guidance_makes_any_checkpoint_s_pictures_more_like_the_features(measured, kind, decoder):
    """Noise and flow, latents of 4 and 16 channels in their own scales, the model's autoencoder and TAESD by Load VAE.
    Weights are random: nothing but the moves can bring the features. 12 gradients; 0.03 and more is seen."""
    plain, moved = measured["checkpoints"]["cosines"][f"{kind}, {decoder}"]
    assert moved > plain + 0.015


def test_blocks_are_computed_again_where_memory_is_short_and_nothing_changes(measured):
    """2 latents, 2 steps taken twice, 3 moves each: 24 decodings."""
    result = measured["checkpoints"]["memory"]
    assert result["plenty"] == {"rows": 2, "runs": 24} and result["a row"] == {"rows": 1, "runs": 24}
    assert result["large backbone"] == result["too little for a row"] == {"rows": 1, "runs": 48}
    assert result["difference"] <= 1e-5
    # each row towards its own map; moves enlarge what float32 makes of batches of another size
    assert result["one by one"] <= 5e-4


def test_guidance_ends_at_the_next_layer_when_cancelled_and_leaves_nothing_behind(measured):
    """In the diffusion model, and in decoder and backbone forth and back: each takes seconds on a processor."""
    result = measured["checkpoints"]["cancelled"]
    assert len(result) == 10
    for where, seen in result.items():
        assert seen.pop("message").startswith("InterruptProcessingException"), where
        assert seen == {"later": 0, "left": False, "same": True}, where
    for message, later in measured["checkpoints"]["cancelled with a ControlNet"]:
        assert message.startswith("InterruptProcessingException") and later == 0


def test_a_device_is_not_told_to_compute_much_before_it_is_waited_for(measured):
    """It cannot be cancelled in what it was told. Layers without weights are counted, too."""
    assert measured["checkpoints"]["ahead"] <= 12


def test_what_runs_away_gives_the_last_finite_picture_and_says_what_to_lower(measured):
    result = measured["checkpoints"]["runs away"]
    assert result["last finite"] == 0 and result["finite"]
    for text, where in zip(result["said"], ("step 2 of 2", "step 1 of 2"), strict=True):
        assert f"a move in {where} gave values that are not finite; lower step" in text
        assert text.endswith("The image is the last finite one")
    assert result["at once"] == "no error"  # before any move there is what the model predicts


def test_the_bar_counts_predictions_and_moves(measured):
    """2 steps taken twice, with a prediction and 3 moves each; newer hosts leave out those that follow too soon."""
    shown = measured["checkpoints"]["progress"]
    assert {total for _, total in shown} == {16} and shown[-1][0] == 16 and len(shown) > 4
    assert [value for value, _ in shown] == sorted(value for value, _ in shown)


def test_a_decoding_that_is_larger_than_the_memory_is_refused_with_what_is_not(measured):
    said = measured["checkpoints"]["short"]
    assert said.startswith("FeatInvError: the gradient of a decoded image of 32 x 32 pixels needs"), said
    assert "of memory, and cpu has 0.001 GB. Use a small decoder (Load VAE: taesd" in said


def test_an_autoencoder_of_another_model_is_refused(measured, host):
    """By its channels; by its pixels per cell in hosts that know the model's; that of a checkpoint without one."""
    result = measured["checkpoints"]
    assert result["empty"].startswith("FeatInvError: the checkpoint has no autoencoder; connect")
    assert "16 latent channels, the model 4; connect the VAE that belongs to the model" in result["channels"]
    if not host.version.startswith("0.3."):
        assert "4 pixels per latent cell, the model 8" in result["downscale"]
