"""Scale factor, shift, variance and resolution of a base model's latents, which the embedded worlds do not have."""

import pytest
import scaled
import torch
from PIL import Image
from scaled import FACTOR, PROMPT, SHIFT, SIDE
from torch.nn import functional as F

from featinv_nodes.core.guidance import feature_distance, toward_features
from featinv_nodes.core.objective import latents_from
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training.config import DEFAULT, read_config
from training.loop import run as running
from training.loop.objective import cycle_distance, moments_of, observe, sample_noise
from training.loop.training import train
from training.models.controlnet import FeatureControlNet
from training.models.sampling import round_trip, sample


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return scaled.opened(tmp_path_factory.mktemp("scaled"), "v_prediction")


@pytest.fixture(scope="module")
def backbone():
    return open_backbone("tiny-cnn")


@pytest.fixture(scope="module")
def scenes():
    """[2, 3, 64, 64], larger than the base model's own pictures."""
    return draw(0, torch.arange(2), "held-out").image


def small(scenes):
    return F.interpolate(scenes, (SIDE, SIDE), mode="area")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


def test_latents_are_drawn_with_the_autoencoders_mean_and_deviation_times_its_factor(base, scenes):
    posterior, noise = scaled.posterior_of(base, small(scenes)), normal(2, 4, 8, 8)
    assert posterior.std.min() > 0.3 and abs(posterior.mean.mean() - SHIFT) < 1
    drawn = latents_from(moments_of(base, small(scenes)), noise)
    assert apart(drawn, (posterior.mean + posterior.std * noise) * FACTOR) < 1e-5  # float32


def test_a_step_encodes_the_crop_of_the_base_models_resolution_and_reads_features_of_the_other(base, backbone, scenes):
    batch = {"pictures": scenes, "target": small(scenes)}
    moments, features = observe(base, backbone, batch, read_config(DEFAULT))
    assert torch.equal(moments, moments_of(base, small(scenes))) and moments.shape == (2, 8, 8, 8)
    _, pooled = observe(base, backbone, batch, read_config(DEFAULT, {"pooled": "true"}))
    with torch.no_grad():
        assert apart(features, backbone(scenes).values) < 1e-5
        assert pooled.shape == (2, 128, 1, 1) and apart(pooled, backbone(scenes, pooled=True).values) < 1e-5


def test_a_share_of_the_samples_is_dropped_and_every_timestep_of_the_base_model_occurs(base):
    moments, config = torch.zeros(1, 8, 2, 2), read_config(DEFAULT, {"dropout": "0.3"})
    torch.manual_seed(0)
    sample = sample_noise(20_000, moments, base, config)
    assert abs(sample.dropped.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    assert sorted(set(sample.t.tolist())) == list(range(1000)) and sample.latent.shape == (20_000, 4, 2, 2)


def test_a_run_trains_on_drawn_latents_not_on_their_means(tmp_path, monkeypatch):
    """All crops of a picture of one colour are alike, so only the posterior's variance tells rows apart."""
    folder, real, seen = scaled.save(tmp_path / "base"), running.training_loss, []
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), (200, 120, 40)).save(tmp_path / "pictures" / "one.png")

    def recorded(base, backbone, model, latents, *rest):
        seen.append((base, latents))
        return real(base, backbone, model, latents, *rest)

    monkeypatch.setattr(running, "training_loss", recorded)
    changes = {"base": str(folder), "data": str(tmp_path / "pictures"), "prompt": PROMPT, "max_images": "32"}
    small_run = {"batch": "32", "encoder_width": "16", "precision": "fp32", "panel_every": "1000", "cycle": "0.0"}
    train(read_config(DEFAULT, changes | small_run), tmp_path / "run")
    ((base, latents),) = seen
    pixel = torch.tensor([200, 120, 40]).view(1, 3, 1, 1) / 255
    posterior = scaled.posterior_of(base, pixel.expand(1, 3, SIDE, SIDE))
    assert apart(latents.mean(0), posterior.mean[0] * FACTOR) < 0.2  # of 32 rows the mean is off by a sixth of it
    ratio = latents.std(0) / (posterior.std[0] * FACTOR)
    assert ratio.mean().item() == pytest.approx(1, rel=0.05)  # 256 deviations of 32 rows each


def test_pictures_of_latents_are_the_autoencoders(base, scenes):
    with torch.no_grad():
        latents = base.encode(small(scenes))
        assert apart(latents, scaled.posterior_of(base, small(scenes)).mean * FACTOR) < 1e-5
        assert apart(base.decode(latents), scaled.picture_of(base, latents)) < 1e-5
        assert apart(scaled.picture_of(base, latents * FACTOR), scaled.picture_of(base, latents)) > 0.01  # it matters


def test_the_round_trip_of_a_table_is_at_the_base_models_resolution(base, scenes):
    with torch.no_grad():
        alike = F.interpolate(scenes, (SIDE, SIDE), mode="bilinear", antialias=True)
        expected = scaled.picture_of(base, scaled.posterior_of(base, alike).mean * FACTOR)
    assert apart(round_trip(base, scenes), expected) < 1e-5


def test_guidance_by_the_gradient_looks_at_the_picture_that_the_latents_stand_for(base, backbone, scenes):
    """One step of DDIM ends in the clean latents themselves, which guidance has moved. The way back through the
    prediction divides by the signal's share at t = 999, a fifteenth, which float32 feels."""
    torch.manual_seed(0)
    model = FeatureControlNet.start(base, backbone.source(), width=16).eval().requires_grad_(False)
    features, start = backbone.extract(scenes), normal(2, 4, 8, 8)
    sampling = {"steps": 1, "guidance": 1.0, "gradient_steps": 1}
    plain, moved = (
        sample(base, model, features, start, Sampling(gradient=step, **sampling), PROMPT, backbone)
        for step in (0.0, 0.3)
    )

    def move(picture_of):
        return toward_features(plain, picture_of, backbone, features, 0.3) - plain

    expected = move(lambda latents: scaled.picture_of(base, latents))
    assert apart(move(lambda latents: scaled.picture_of(base, latents * FACTOR)), expected) > 0.1  # it matters
    assert apart(moved - plain, expected) < 0.01


def test_cycle_consistency_looks_at_the_picture_that_the_latents_stand_for(base, backbone, scenes):
    latents, values = normal(2, 4, 8, 8) * 0.5, backbone.extract(scenes).values
    with torch.no_grad():
        expected = feature_distance(scaled.picture_of(base, latents), backbone, values, "last", False)
        wrong = feature_distance(scaled.picture_of(base, latents * FACTOR), backbone, values, "last", False)
        result = cycle_distance(base, backbone, latents, values, read_config(DEFAULT))
        mean, config = values.mean((2, 3), keepdim=True), read_config(DEFAULT, {"pooled": "true"})
        seen = backbone(backbone.preprocess(scaled.picture_of(base, latents), "stretch"), pooled=True).values
        pooled = cycle_distance(base, backbone, latents, mean, config)
    assert apart(result, expected) < 1e-5 < 1e-3 < apart(wrong, expected)
    assert apart(pooled, 1 - F.cosine_similarity(seen, mean).flatten()) < 1e-5
