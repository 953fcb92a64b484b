"""A converted checkpoint draws the images of the paper's code, whose sampler is that of Stable Diffusion."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.sampling import SOLVERS, SPACINGS, Sampling, set_timesteps
from training.models.base_model import BaseModel
from training.models.controlnet import FeatureControlNet
from training.models.sampling import sample, solver_of
from training.models.stable_diffusion import SCHEDULE

SOURCE = FeatureSource("net.tag", "last", False, 6, (2, 2), (32, 32), (0.5,) * 3, (0.5,) * 3)
SAMPLING = Sampling(steps=50, guidance=1.75, strength=1.0, negative="text", timestep_spacing="leading")


@pytest.fixture(scope="module")
def base():
    """Stable Diffusion's noise schedule and prediction, a few random blocks."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()
    text = {"": torch.randn(1, 5, 16), "a": torch.randn(1, 5, 16)}
    return BaseModel("random", unet, PatchAutoencoder(8, 4), DDIMScheduler(**SCHEDULE), text)


@pytest.fixture(scope="module")
def model(base):
    """Random where training begins with zeros."""
    model = FeatureControlNet.start(base, SOURCE, width=16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def official_ddim(predict, x, steps=50, scale=1.75):
    """DDIMSampler of the official code (Rombach et al. 2022), uniform timesteps and eta 0, written from its formulas.

    predict: (x, t) -> (noise without the prompt, noise with it).
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    timesteps = np.arange(0, 1000, 1000 // steps) + 1
    alphas, previous = alphas_cumprod[timesteps], alphas_cumprod[[0, *timesteps[:-1]]]
    for t, alpha, alpha_previous in reversed(list(zip(timesteps, alphas, previous))):
        without, prompted = predict(x, torch.tensor(t))
        noise = without + scale * (prompted - without)
        clean = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        x = alpha_previous**0.5 * clean + (1 - alpha_previous) ** 0.5 * noise
    return x


@torch.inference_mode()
def test_all_fifty_steps_are_those_of_the_official_sampler(base, model):
    features = FeatureMap(torch.randn(2, 6, 2, 2), SOURCE)
    start = torch.randn(2, 4, 8, 8)
    hint = model.hint(features.values, (8, 8))

    def predict(x, t):
        return (model.predict(base.unet, x, t, base.text[prompt].expand(2, -1, -1), hint) for prompt in ("", "a"))

    expected = official_ddim(predict, start)
    off = [
        ((sample(base, model, features, start, sampling, "a") - expected).norm() / expected.norm()).item()
        for sampling in (SAMPLING, replace(SAMPLING, timestep_spacing="trailing"))
    ]
    # float32 over fifty steps, alphas in float64 there and in float32 here; trailing takes other timesteps
    assert off[0] <= 1e-5 and off[1] > 1e-2, off


@pytest.mark.parametrize("solver", SOLVERS)
def test_leading_begins_below_the_last_timestep_and_takes_the_steps_asked_for(base, solver):
    made = solver_of(base, replace(SAMPLING, solver=solver, steps=30))
    set_timesteps(made, 30)
    assert len(made.timesteps) == 30 and 900 < made.timesteps[0] < 999 and made.timesteps[-1] >= 1


def test_more_steps_than_the_spacing_has_are_refused(base):
    made = solver_of(base, SAMPLING)
    set_timesteps(made, 999)
    assert made.timesteps.max() == 999
    with pytest.raises(FeatInvError, match="steps 1000: .* 999"):
        set_timesteps(made, 1000)


def test_an_unknown_spacing_is_refused():
    assert Sampling.chosen({"timestep_spacing": "leading"}, {"steps": 7}) == Sampling(7, timestep_spacing="leading")
    with pytest.raises(FeatInvError, match=f"expected one of {', '.join(SPACINGS)}"):
        Sampling(timestep_spacing="linspace")
