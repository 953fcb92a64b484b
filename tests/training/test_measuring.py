"""The programs that measure: both recipes learn the same, memory is counted, and images needed are read off a curve."""

import argparse
from dataclasses import replace

import pytest
import torch

from featinv_nodes.core.errors import FeatInvError
from training import benchmark
from training.config import CONFIGS, read_config
from training.experiments import transfer
from training.experiments.transfer import images_to_reach
from training.speed import real_size, step_memory
from training.speed.step_memory import Peak, step_gigabytes


@pytest.fixture
def small(monkeypatch):
    """The real architectures, narrow."""
    monkeypatch.setattr(real_size, "UNET", real_size.UNET | real_size.SMALL["unet"])
    monkeypatch.setattr(real_size, "VAE", real_size.VAE | real_size.SMALL["vae"])
    for key, value in real_size.SMALL["text"].items():
        monkeypatch.setitem(real_size.CLIP, key, value)
    return read_config(
        CONFIGS / "resnet50_last.yaml", {"backbone": "resnet10t", "encoder_width": "16", "precision": "fp32"}
    )


def test_both_recipes_learn_the_same_at_equal_settings(small, capsys):
    pictures = torch.rand(2, 3, 176, 176)
    benchmark.agreement(argparse.Namespace(config=small, device="cpu", agreement=3), pictures)
    output = capsys.readouterr().out
    assert float(output.split("at most ")[1].split()[0]) < 1e-4  # float32, summed in another order


def test_our_step_is_compiled_where_the_configuration_says_so(small, monkeypatch):
    """As train.py's is: the trained part, which takes the base model along."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    pictures = torch.rand(2, 3, 176, 176)
    for expected in (False, True):
        parts = real_size.build(replace(small, compile=expected), "cpu")
        assert real_size.our_step(parts, pictures)().isfinite()
        assert compiled == ([parts.model] if expected else [])


def test_a_profile_names_what_a_step_spends_its_time_in(small):
    step = real_size.our_step(real_size.build(small, "cpu"), torch.rand(2, 3, 176, 176))
    assert {"aten::convolution_backward", "aten::_fused_adamw_"} <= set(real_size.costliest(step, 1000).split())
    assert sum(line.lstrip().startswith("aten::") for line in real_size.costliest(step, 5).splitlines()) <= 5


def test_the_peak_is_what_is_held_at_once_each_storage_once():
    peak = Peak()
    with peak:
        a = torch.zeros(1024)  # 4,096 bytes
        b = a.view(2, 512)
        c = a + 1
        del a, b
        held = peak.now
        d = torch.zeros(100)  # 400 bytes in a block of 512
    assert held == 4096 and peak.now == 4096 + 512 and peak.peak == 8192 and len(c) + len(d) == 1124


def test_memory_of_a_step_grows_with_the_batch_and_falls_with_checkpointing_and_small_moments(small, monkeypatch):
    """With the amounts that follow from the parameters, and no storage made for any of it."""
    small = replace(small, precision="bf16", ema=0.0, batch=16)
    plain, checkpointed, larger = (
        step_gigabytes(replace(small, **changes)) for changes in ({}, {"checkpointing": True}, {"batch": 32})
    )
    parts = real_size.build(small, "meta")
    trained, frozen = (
        sum(p.numel() for m in modules for p in m.parameters())
        for modules in ((parts.model,), (parts.base.unet, parts.base.vae, parts.backbone))
    )
    resident = (16 * trained + 2 * frozen) / 1e9  # float32 weights, gradients, two moments; the frozen parts in bf16
    activations = plain - resident
    assert activations > 0 and checkpointed < plain
    assert larger - resident == pytest.approx(
        2 * activations, rel=0.06
    )  # gradients of the weights are there beside them, and a part that does not grow with the batch
    monkeypatch.setattr(step_memory, "activation_gigabytes", lambda *_: activations)  # the same whatever comes now
    assert step_gigabytes(replace(small, optimizer="adamw8bit")) == pytest.approx(plain - 6 * trained / 1e9, rel=1e-6)
    assert step_gigabytes(replace(small, ema=0.999)) == pytest.approx(plain + 4 * trained / 1e9, rel=1e-6)


def test_images_needed_are_read_off_the_curve():
    points = [(10, 0.2), (20, 0.6), (30, 0.5), (40, 0.8)]
    assert (
        images_to_reach(points, 0.4) == 15
        and images_to_reach(points, 0.1) == 10
        and images_to_reach(points, 0.9) is None
    )
    assert images_to_reach(points, 0.7) == pytest.approx(30 + 10 * 2 / 3)


def test_a_curve_that_was_stopped_goes_on_with_the_points_it_has(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        transfer, "train", lambda config, folder: measured.append(config.max_images) or config.max_images
    )
    monkeypatch.setattr(transfer, "held_out_cosine", lambda seen: seen / 100)
    config = read_config(CONFIGS / "tiny_vit_last.yaml")
    assert transfer.curve(config, tmp_path / "run", 20, 10) == [(10, 0.1), (20, 0.2)]
    assert transfer.curve(config, tmp_path / "run", 40, 10) == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert measured == [10, 20, 30, 40]
    assert transfer.curve(config, tmp_path / "run", 20, 10) == [(10, 0.1), (20, 0.2)]
    with pytest.raises(FeatInvError, match=r"another run \(lr differ\)"):
        transfer.curve(replace(config, lr=1.0), tmp_path / "run", 20, 10)
