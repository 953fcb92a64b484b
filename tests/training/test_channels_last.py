"""Diffusers' blocks without copies: they compute what diffusers' do, and the kernels what torch's do, by Triton's
interpreter where there is no GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from training.config import CONFIGS, read_config
from training.loop.flops import step_gmac
from training.models import channels_last
from training.models.channels_last import keep_channels_last
from training.models.stable_diffusion import VAE
from training.speed import real_size

ROOT = Path(__file__).parents[2]
SMALL = real_size.SMALL | {"unet": real_size.SMALL["unet"] | {"block_out_channels": (32, 64, 64, 64)}}


def test_the_kernels_equal_torch_with_every_gradient_and_keep_the_layout():
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "training" / "triton_equal.py"], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr


def computed(change):
    """What Stable Diffusion's architecture, narrow, predicts in float64, and the gradients of its ControlNet."""
    config = read_config(CONFIGS / "convnext_last.yaml", {"backbone": "resnet10t", "input_size": "64"})
    parts = real_size.build(replace(config, encoder_width=16), "cpu", SMALL)
    unet, model = parts.base.unet.double(), parts.model.double()
    for p in model.parameters():
        if not p.any():  # what starts at zero would hide the rest
            nn.init.normal_(p, std=0.1)
    if change:
        keep_channels_last(unet)
        keep_channels_last(model)
    torch.manual_seed(1)
    noisy, context, values = (
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 16, 16), (2, 77, 64), (2, 512, 2, 2))
    )
    predicted = model(unet, noisy, torch.tensor([10, 900]), context, values)
    predicted.square().mean().backward()
    return predicted, {name: p.grad for name, p in model.named_parameters()}


def test_the_blocks_compute_what_diffusers_do():
    """With every gradient; float64 leaves only what is summed in another order."""
    (theirs, their_gradients), (ours, gradients) = computed(False), computed(True)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    largest = max(gradient.abs().max() for gradient in their_gradients.values())
    for name, gradient in their_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-6, atol=1e-10 * largest), name


def test_a_step_is_counted_the_same_on_tensors_without_storage():
    """As each run and benchmark.py count it, before any step."""
    config = read_config(CONFIGS / "convnext_last.yaml", {"backbone": "resnet10t", "input_size": "64"})
    parts = real_size.build(replace(config, encoder_width=16), "cpu", SMALL)
    before = step_gmac(parts.base, parts.backbone, parts.model, parts.config)
    real_size.lay_out(parts, "cuda")
    assert step_gmac(parts.base, parts.backbone, parts.model, parts.config) == pytest.approx(before, rel=1e-9)


def test_every_block_of_stable_diffusion_is_replaced_and_weights_keep_their_names():
    for model in (
        UNet2DConditionModel(**real_size.UNET | SMALL["unet"]),
        AutoencoderKL(**VAE | SMALL["vae"]),
    ):
        names = list(model.state_dict())
        keep_channels_last(model)
        left = [part for part in model.modules() if type(part) in channels_last.BLOCKS]
        assert left and all(type(part) is nn.Conv2d and part.kernel_size == (3, 3) for part in left)
        assert list(model.state_dict()) == names


def test_what_is_not_stable_diffusions_stays_as_it_is():
    """A block that scales its sum, and one that changes the size of its map."""
    from diffusers.models.resnet import ResnetBlock2D

    for settings in (
        {"output_scale_factor": 2.0},
        {"up": True},
        {"time_embedding_norm": "scale_shift"},
        {"dropout": 0.5},
    ):
        block = ResnetBlock2D(in_channels=32, temb_channels=8, **settings)
        x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
        before = block.eval()(x, temb)
        keep_channels_last(block)
        assert type(block) is ResnetBlock2D and torch.equal(block(x, temb), before)
