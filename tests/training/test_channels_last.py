"""Diffusers' blocks without copies: they compute what diffusers' do, and the kernels what torch's do, by Triton's
interpreter where there is no GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
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


@pytest.mark.parametrize(
    ("capability", "triton", "expected"), [((8, 0), 1, True), ((6, 1), 1, False), ((8, 0), None, False)]
)
def test_the_kernels_run_where_triton_makes_code_for_the_device(monkeypatch, capability, triton, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(channels_last, "find_spec", lambda name: triton)
    assert channels_last.has_kernels.__wrapped__(torch.device("cuda")) == expected


def test_fsdp_finds_the_blocks_that_it_shares_out():
    """By their classes' names, which are all that its configuration knows of them."""
    wrapped = yaml.safe_load((CONFIGS / "accelerate" / "fsdp.yaml").read_text())["fsdp_config"]
    model = ControlNetModel.from_unet(UNet2DConditionModel(**real_size.UNET | SMALL["unet"]))
    keep_channels_last(model)
    names = {type(part).__name__ for part in model.modules()}
    assert set(wrapped["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= names


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


def test_the_kernels_compile_where_there_is_no_gpu(tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from training.models import geglu_kernels, group_norm_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = group_norm_kernels.Plan(torch.empty(2, 320, 32, 32, device="meta"), 32)
    constants = {"SILU": True, "BLOCK": 1024, **plan.map_blocks, **plan.group_blocks}
    numbers = {"eps": "fp32"} | dict.fromkeys(("S", "C", "D", "chunks", "groups"), "i32")
    maps = dict.fromkeys(("x", "y", "dx", "dy", "bias"), "*bf16")
    for module, count in ((group_norm_kernels, 6), (geglu_kernels, 2)):
        kernels = [value for name, value in vars(module).items() if name.startswith(("group_norm", "geglu"))]
        assert len(kernels) == count
        for kernel in kernels:
            known = {name: constants[name] for name in kernel.arg_names if name in constants}
            types = {name: (numbers | maps).get(name, "*fp32") for name in kernel.arg_names}
            source = ASTSource(kernel, types | dict.fromkeys(known, "constexpr"), known)
            assert kernel.__name__ in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
