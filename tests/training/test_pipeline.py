"""The diffusion side: ControlNet starts as nothing, steers as told, and reads and writes the weights file."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.prediction import predicted_clean
from featinv_nodes.core.sampling import Sampling, sample_latents
from featinv_nodes.core.weights import InversionInfo
from featinv_nodes.worlds import model_file, open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training.config import DEFAULT, read_config
from training.loop.objective import cycle_distance, training_loss
from training.models.base_model import load_base
from training.models.controlnet import FeatureControlNet
from training.models.pipeline import load_pipeline
from training.models.sampling import noise, round_trip, sample

PROMPT = "a drawing of the small world"


@pytest.fixture(scope="module")
def base():
    return load_base("tiny", PROMPT)


@pytest.fixture(scope="module")
def backbone():
    return open_backbone("tiny-cnn")


@pytest.fixture
def controlnet(base, backbone):
    """An untrained model whose zero convolutions are filled, so that control matters."""
    torch.manual_seed(0)
    model = FeatureControlNet.start(base, backbone.source(), width=32).eval().requires_grad_(False)
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture(scope="module")
def features(backbone):
    with torch.inference_mode():
        return backbone(draw(0, torch.arange(2), "held-out").image)


def test_at_first_the_output_is_exactly_the_base_models(base, backbone, features):
    model = FeatureControlNet.start(base, backbone.source(), width=32).eval()
    sampling, start = Sampling(steps=3, guidance=2.0), noise(base, 0, 2)
    assert torch.equal(
        sample(base, model, features, start, sampling, PROMPT), sample(base, None, None, start, sampling, PROMPT)
    )


def test_a_cast_base_model_is_not_taken_back_to_float32_by_autocast(base, controlnet, features):
    cast, modes = deepcopy(base.unet).bfloat16(), set()
    for norm in (m for m in cast.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.register_forward_hook(
            lambda _, given, made: modes.add((torch.is_autocast_enabled("cpu"), given[0].dtype, made.dtype))
        )
    given = noise(base, 0, 2), torch.tensor([400, 700]), base.text[PROMPT].expand(2, -1, -1), features.values
    exact = controlnet(base.unet, *given)
    with torch.autocast("cpu", torch.bfloat16):
        result = controlnet(cast, *given)
    assert modes == {(False, torch.bfloat16, torch.bfloat16)}
    assert (result - exact).norm() < 2**-5 * exact.norm()  # bf16 has eight bits, and dozens of layers round


def test_strength_zero_and_an_empty_range_bypass_the_control(base, controlnet, features):
    start = noise(base, 0, 2)
    alone = sample(base, None, None, start, Sampling(steps=3), PROMPT)
    for change in ({"strength": 0.0}, {"start": 0.5, "end": 0.5}):
        assert torch.equal(sample(base, controlnet, features, start, Sampling(steps=3, **change), PROMPT), alone)
    assert not torch.allclose(sample(base, controlnet, features, start, Sampling(steps=3), PROMPT), alone)


def test_guidance_follows_its_formula(base, controlnet, features):
    """One step by hand: eps = eps(null) + g (eps(features) - eps(null))."""
    start, scheduler = noise(base, 0, 2), base.scheduler
    with torch.inference_mode():
        for negative in ("text", "features"):
            got = sample(base, controlnet, features, start, Sampling(1, 0.7, 3.0, negative), PROMPT)
            scheduler.set_timesteps(1)
            (t,) = scheduler.timesteps
            null = torch.zeros_like(features.values) if negative == "features" else features.values
            context = [base.text[p].expand(2, -1, -1) for p in (PROMPT, "")]
            out = [
                controlnet.predict(base.unet, start, t, c, controlnet.hint(v, (8, 8)), 0.7)
                for v, c in zip((features.values, null), context)
            ]
            expected = scheduler.step(out[1] + 3.0 * (out[0] - out[1]), t, start).prev_sample
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32, batches of 4 against 2


def test_rows_of_a_batch_do_not_touch_each_other(base, controlnet, features):
    """Of latents that are not square, either."""
    start, sampling = noise(base, 0, 2, (6, 12)), Sampling(steps=3, guidance=2.0, negative="features")
    both = sample(base, controlnet, features, start, sampling, PROMPT)
    second = sample(base, controlnet, features.select(1), start[1:], sampling, PROMPT)
    assert (both[1:] - second).abs().max() <= 1e-4 * both.abs().max()  # float32, batches of another size


def test_noise_is_the_hosts(base):
    for size, (height, width) in ((None, (8, 8)), ((6, 12), (6, 12))):
        expected = torch.randn(3, 24, height, width, generator=torch.Generator().manual_seed(5))
        assert torch.equal(noise(base, 5, 3, size), expected)


def test_weights_file_gives_the_same_pictures(base, controlnet, features, tmp_path):
    info = InversionInfo(controlnet.source, controlnet.encoder.settings, base.describe(), PROMPT)
    controlnet.save(tmp_path / "m.safetensors", info)
    again, _ = FeatureControlNet.load(tmp_path / "m.safetensors", base)
    sampling, start = Sampling(steps=2, guidance=2.0), noise(base, 0, 2)
    assert torch.equal(
        sample(base, controlnet, features, start, sampling, PROMPT),
        sample(base, again, features, start, sampling, PROMPT),
    )


def test_the_size_of_training_is_kept_and_binds_no_one(base, controlnet, tmp_path):
    """In the weights file; a file that lacks it, or says another, opens all the same."""
    about = base.describe()
    assert (about.pop("latent_size"), about.pop("resolution")) == (8, 64)
    for case in (about, {**about, "latent_size": 64, "resolution": 512}):
        controlnet.save(
            tmp_path / "m.safetensors", InversionInfo(controlnet.source, controlnet.encoder.settings, case, PROMPT)
        )
        _, info = FeatureControlNet.load(tmp_path / "m.safetensors", base)
        assert info.base == case


def test_what_does_not_fit_is_refused(base, backbone, controlnet, features, tmp_path):
    other = {**base.describe(), "context": 768}
    controlnet.save(
        tmp_path / "m.safetensors", InversionInfo(controlnet.source, controlnet.encoder.settings, other, PROMPT)
    )
    with pytest.raises(FeatInvError, match="context: 768 in the weights file, 64"):
        FeatureControlNet.load(tmp_path / "m.safetensors", base)
    with pytest.raises(FeatInvError, match="layer2"):
        sample(base, controlnet, backbone(torch.rand(1, 3, 64, 64), "layer2"), noise(base, 0), Sampling(), PROMPT)
    with pytest.raises(FeatInvError, match="prompt"):
        load_base("tiny", "another prompt")
    with pytest.raises(FeatInvError, match="unet"):
        load_base(tmp_path, PROMPT)
    for wrong in ({"steps": 0}, {"negative": "x"}, {"start": 0.6, "end": 0.5}):
        with pytest.raises(FeatInvError):
            Sampling(**wrong)


def test_loss_of_perfect_velocity_is_zero_and_dropout_uses_the_null(base, backbone, features):
    """The objective is the base model's own, and a dropped sample sees zeros and the empty prompt."""
    seen = {}

    class Perfect(torch.nn.Module):
        def forward(self, unet, noisy, t, context, values):
            a = base.scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
            s = (1 - base.scheduler.alphas_cumprod[t]).sqrt()[:, None, None, None]
            eps = (noisy - a * latents) / s
            seen.update(context=context, values=values)
            return a * eps - s * latents

    latents = torch.randn(2, 24, 8, 8)
    config = read_config(DEFAULT, {"dropout": "1.0"})
    assert training_loss(base, backbone, Perfect(), latents, features.values, config) < 1e-6
    assert seen["values"].abs().max() == 0 and torch.equal(seen["context"][0], base.text[""][0])
    training_loss(base, backbone, Perfect(), latents, features.values, read_config(DEFAULT, {"dropout": "0.0"}))
    assert torch.equal(seen["values"], features.values) and torch.equal(seen["context"][1], base.text[PROMPT][0])


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_clean_latents_follow_from_a_perfect_prediction(base, kind):
    clean, noise_, t = torch.randn(4, 24, 8, 8), torch.randn(4, 24, 8, 8), torch.tensor([0, 300, 700, 999])
    scheduler = DDIMScheduler.from_config(base.scheduler.config, prediction_type=kind)
    result = scheduler.get_velocity(clean, noise_, t) if kind == "v_prediction" else noise_
    noisy = scheduler.add_noise(clean, noise_, t)
    again = predicted_clean(scheduler, noisy, result, t)
    assert (again - clean).abs().max() < 1e-3  # at t = 999 the noise hides all but 1/15 of the signal


def test_cycle_distance_sees_the_features_and_reaches_the_latents(base, backbone):
    scenes = draw(0, torch.arange(8), "held-out").image
    with torch.inference_mode():
        values = backbone(scenes).values
    config, latents = read_config(DEFAULT), base.encode(scenes).detach().clone().requires_grad_(True)
    distance = cycle_distance(base, backbone, latents, values.clone(), config)
    other = cycle_distance(base, backbone, latents.detach().flip(0), values.clone(), config)
    assert (
        distance.shape == (8,) and distance.max() < 0.05 < 0.3 < other.mean()
    )  # the autoencoder's round trip against unrelated pictures
    distance.sum().backward()
    assert latents.grad.abs().max() > 0 and all(
        p.grad is None for p in [*backbone.parameters(), *base.vae.parameters()]
    )


def test_cycle_weight_adds_the_distance_of_what_is_shown(base, backbone, features):
    class Same(torch.nn.Module):
        def forward(self, unet, noisy, t, context, values):
            return torch.zeros_like(noisy)

    def loss(**changes):
        torch.manual_seed(0)
        return training_loss(
            base,
            backbone,
            Same(),
            torch.zeros(2, 24, 8, 8),
            features.values,
            read_config(DEFAULT, {"cycle": "0.0"} | changes),
        ).item()

    plain = loss(dropout="0.0")
    assert loss(dropout="0.0", cycle="1.0") > plain + 0.1
    assert loss(dropout="0.0", cycle="1.0", cycle_below="1") == plain
    assert loss(dropout="1.0", cycle="1.0") == loss(dropout="1.0")


def test_round_trip_keeps_the_picture(base):
    scenes = draw(0, torch.arange(20), "held-out").image
    error = (round_trip(base, scenes) - scenes).square().mean()
    assert -10 * error.log10() > 25  # dB; a broken decoder gives less than 15


def test_in_bf16_the_diffusion_model_is_rounded_and_nothing_else(features):
    """It draws nearly the same picture, with the gradient and alone."""
    full, half = load_pipeline("tiny_cnn_last"), load_pipeline("tiny_cnn_last", precision="bf16")
    cast = {half.base.unet.dtype, half.model.controlnet.dtype}
    kept = {next(part.parameters()).dtype for part in (half.base.vae, half.model.encoder, half.backbone)}
    assert cast == {torch.bfloat16} and kept == {torch.float32}
    settings = full.recommended(steps=3, gradient_steps=1)
    for given in (features, None):
        pictures, rounded = (p.draw(given, settings, p.noise([0, 1])) for p in (full, half))
        difference = (pictures - rounded).abs().mean()
        assert 0 < difference < 0.01  # bf16 has 8 bits; pictures of other seeds are 0.06 and 0.3 apart


def test_guidance_weighs_predictions_in_bf16_without_rounding_them_again():
    """One step of a solver that gives back what it is told: 1.3 (1 + 1/128) - 0.3."""
    text = {True: torch.tensor([[[1 + 2**-7]]]), False: torch.ones(1, 1, 1)}
    config = SimpleNamespace(timestep_spacing="trailing", num_train_timesteps=10)
    solver = SimpleNamespace(config=config, timesteps=torch.tensor([9]), set_timesteps=lambda steps: None)
    solver.step = lambda pred, t, x: SimpleNamespace(prev_sample=pred)

    class Half:
        dtype, device = torch.bfloat16, torch.device("cpu")

        def __call__(self, x, t, context):
            return SimpleNamespace(sample=context[..., None].expand_as(x))

    result = sample_latents(Half(), None, {}, solver, torch.zeros(2, 1, 1, 1), text, Sampling(1, guidance=1.3))
    assert torch.allclose(result, torch.tensor(1 + 1.3 / 128), atol=1e-5)  # float32; bf16 is off by 0.002


def test_an_inversion_model_in_8_bits_draws_the_same_pictures(tmp_path):
    """A trained one: each picture within 1/50 of the whole range of what it is in 16 bits, on average over its
    pixels."""
    pipeline = load_pipeline("tiny_cnn_last")
    features = pipeline.extract(draw(0, torch.arange(4), "held-out").image)
    sampling, start = pipeline.recommended(steps=10, gradient=0.0), pipeline.noise(range(4))
    expected = pipeline.draw(features, sampling, start)
    pipeline.model.save(tmp_path / "small.safetensors", pipeline.info, torch.int8)
    pipeline.model, info = FeatureControlNet.load(tmp_path / "small.safetensors", pipeline.base)
    result = pipeline.draw(features, sampling, start)
    assert (
        info == pipeline.info
        and (tmp_path / "small.safetensors").stat().st_size < 0.6 * model_file("tiny_cnn_last").stat().st_size
    )
    assert 0 < (result - expected).abs().mean((1, 2, 3)).max() < 0.02
    assert (expected[0] - expected[1]).abs().mean() > 0.1  # as far as two pictures are apart
