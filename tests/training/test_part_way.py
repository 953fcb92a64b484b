"""Drawing that begins part way through the schedule, from an image."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from test_methods import stand_in

from featinv_nodes import feature_decoders as decoders
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import SOLVERS, PartWay, Sampling
from featinv_nodes.feature_decoders import open_feature_decoder
from featinv_nodes.worlds.drawn.scenes import draw
from training import reconstruct
from training.models.pipeline import load_pipeline
from training.models.sampling import latents_of, sample
from training.models.untrained import UntrainedPipeline, UntrainedSampling, load_untrained
from training.report import to_image

SEEDS = [3, 8]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny_cnn_last")


@pytest.fixture(scope="module")
def alone(pipeline):
    return UntrainedPipeline(pipeline.base, pipeline.backbone, pipeline.info.prompt)


@pytest.fixture(scope="module")
def scenes():
    return draw(0, torch.arange(2), "held-out").image


@pytest.fixture(scope="module")
def features(pipeline, scenes):
    return pipeline.features(pipeline.backbone.preprocess(scenes))


def latents(pipeline, features, sampling, part_way=None):
    return sample(
        pipeline.base,
        pipeline.model,
        features,
        pipeline.noise(SEEDS),
        sampling,
        pipeline.info.prompt,
        pipeline.backbone,
        part_way,
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_whole_schedule_is_sampling_from_noise(pipeline, alone, features, scenes):
    whole = PartWay(latents_of(pipeline.base, scenes), 1.0)
    for solver in SOLVERS:
        sampling = Sampling(2, solver=solver)
        assert torch.equal(latents(pipeline, features, sampling, whole), latents(pipeline, features, sampling))
    sampling = UntrainedSampling(1, 0.1, 2, steps=2)
    assert torch.equal(alone.draw_each(features, sampling, SEEDS, whole), alone.draw_each(features, sampling, SEEDS))


def test_part_way_takes_the_last_steps_from_the_picture_with_their_noise(pipeline, alone, features, scenes):
    """10 steps, the last 3: at timesteps 299, 199 and 99, from what diffusers' scheduler makes of picture and noise."""
    part_way, seen, unet = PartWay(latents_of(pipeline.base, scenes), 0.3), [], pipeline.base.unet.forward

    def watched(x, t, *rest, **named):
        seen.append((x.clone(), int(t)))
        return unet(x, t, *rest, **named)

    expected = pipeline.base.scheduler.add_noise(part_way.clean, pipeline.noise(SEEDS), torch.tensor([299, 299]))
    with patch.object(pipeline.base.unet, "forward", watched):
        latents(pipeline, features, Sampling(10, guidance=1.0), part_way)
        alone.draw_each(features, UntrainedSampling(moves=0, steps=10), SEEDS, part_way)
    assert [t for _, t in seen] == [299, 199, 99] * 2
    assert relative(seen[0][0], expected) < 1e-6 and relative(seen[3][0], expected) < 1e-6  # float32


def test_less_noise_leaves_more_of_the_picture_with_every_solver(pipeline, features, scenes):
    """0.1 is a third of what the picture itself and one drawn from noise are apart; a solver at a wrong place of its
    schedule leaves noise or blur."""
    clean = latents_of(pipeline.base, scenes)
    for solver in SOLVERS:
        sampling = Sampling(10, negative="features", guidance=1.5, solver=solver)
        none, half, little = (
            relative(latents(pipeline, features, sampling, PartWay(clean, share)), clean) for share in (1.0, 0.5, 0.1)
        )
        assert little < half - 0.1 and half < none - 0.1, (solver, none, half, little)


def test_each_row_begins_from_its_own_picture_whatever_the_batch(pipeline, features, scenes):
    part_way = PartWay(latents_of(pipeline.base, scenes), 0.3)
    whole, single = (
        pipeline.draw(features, Sampling(3, guidance=1.0), pipeline.noise(SEEDS), batch, part_way=part_way)
        for batch in (2, 1)
    )
    assert (whole - single).abs().max() < 1e-3  # float32, batches of another size


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(FeatInvError, match="expected a number above 0 and up to 1"):
        PartWay(torch.zeros(1, 4, 8, 8), share)


def test_at_least_one_step_is_taken():
    assert [PartWay(torch.zeros(1), share).first(10) for share in (0.01, 0.28, 0.5, 1.0)] == [9, 7, 5, 0]


def test_a_seed_each_draws_what_each_seed_draws_alone(alone, features):
    sampling = UntrainedSampling(1, 0.1, 2, steps=2)
    together = alone.draw_each(features, sampling, SEEDS)
    for row, seed in enumerate(SEEDS):
        single = alone.draw(features.select(row), sampling, seed)[0]
        assert (together[row] - single).abs().max() < 0.02  # ReLUs tip over by the size of a batch; another seed: > 0.3
    assert (together[1] - alone.draw(features.select(1), sampling, SEEDS[0])[0]).abs().max() > 0.3


@pytest.fixture
def picture(tmp_path, scenes):
    to_image(scenes[0]).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def test_reconstruct_begins_from_the_decoders_picture(pipeline, features, picture, tmp_path):
    decoder, out = stand_in(pipeline.source), tmp_path / "out"
    words = ["--image", picture, "--out", str(out), "--seed", "3", "--device", "cpu", "--start-from", "decoder"]
    with (
        patch.object(decoders, "DECODERS", ["embedded"]),
        patch.object(decoders, "find_decoder", lambda name: name),
        patch.object(decoders, "_source", lambda *_: decoder.source),
        patch.object(decoders, "open_feature_decoder", lambda *_, **__: decoder),
    ):
        reconstruct.main([*words, "--start-share", "0.2"])
    result = json.loads((out / "results.json").read_text())
    assert result["start"] == {"from": "decoder", "share": 0.2}
    assert "Started from a feature decoder's image, with 0.2 of the steps." in result["note"]
    own = pipeline.features(pipeline.backbone.preprocess(torch.from_numpy(_pixels(picture))))
    part_way = PartWay(latents_of(pipeline.base, decoder.decode(own)), 0.2)
    expected = pipeline.draw(own, pipeline.recommended(), pipeline.noise([3]), part_way=part_way)
    drawn = torch.from_numpy(_pixels(out / "000_scene_0.png"))
    assert (drawn - expected).abs().max() < 0.02  # 8 bits, and ReLUs that tip over


def test_reconstruct_begins_there_without_an_inversion_model_too(picture, tmp_path):
    """With the embedded decoder, on the maps of its own backbone."""
    out, decoder = tmp_path / "out", open_feature_decoder("decoder_tiny_vit_last")
    words = [
        "--untrained",
        "--backbone",
        "tiny-vit",
        "--steps",
        "4",
        "--moves",
        "1",
        "--recurrence",
        "1",
        "--seed",
        "3",
    ]
    reconstruct.main(["--image", picture, "--out", str(out), "--device", "cpu", *words, "--start-from", "decoder"])
    pipeline = load_untrained("drawn", "tiny-vit")
    own = pipeline.features(pipeline.backbone.preprocess(torch.from_numpy(_pixels(picture))))
    part_way = PartWay(latents_of(pipeline.base, decoder.decode(own)), 0.5)
    expected = pipeline.draw_each(own, UntrainedSampling(1, 0.1, 1, steps=4), [3], part_way)
    drawn = torch.from_numpy(_pixels(out / "000_scene_0.png"))
    assert (drawn - expected).abs().max() < 0.02  # 8 bits, and ReLUs that tip over
    assert json.loads((out / "results.json").read_text())["start"] == {"from": "decoder", "share": 0.5}


def _pixels(file):
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--start-from", "decoder", "--model", "tiny_cnn_pooled"], "no feature decoder of .* pooled is embedded"),
        (["--start-from", "nowhere"], "no feature decoder 'nowhere'"),
        (["--start-share", "0.5"], "--start-share goes with --start-from"),
        (["--start-from", "decoder", "--decoder", "decoder_tiny_vit_last"], "--decoder gives no other"),
    ],
)
def test_a_start_that_means_nothing_is_refused(picture, tmp_path, options, words):
    with pytest.raises(FeatInvError, match=words):
        reconstruct.main(["--image", picture, "--out", str(tmp_path / "out"), "--device", "cpu", *options])
    assert not list((tmp_path / "out").glob("*"))
