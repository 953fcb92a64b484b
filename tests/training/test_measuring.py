"""The programs that measure: both recipes learn the same, and images needed are read off a curve."""

import argparse

import pytest
import torch

from training import benchmark, real_size, transfer
from training.config import CONFIGS, read_config
from training.transfer import images_to_reach

SMALL_UNET = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "sample_size": 8, "attention_head_dim": 4, "cross_attention_dim": 64}
SMALL_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def small(monkeypatch):
    """The real architectures, narrow."""
    monkeypatch.setattr(real_size, "UNET", real_size.UNET | SMALL_UNET)
    monkeypatch.setattr(real_size, "VAE", real_size.VAE | SMALL_VAE)
    for key, value in SMALL_TEXT.items():
        monkeypatch.setitem(real_size.CLIP, key, value)
    return read_config(CONFIGS / "resnet50_last.yaml", {"backbone": "resnet10t", "encoder_width": "16", "precision": "fp32"})


def test_both_recipes_learn_the_same_at_equal_settings(small, capsys):
    pictures = torch.rand(2, 3, 176, 176)
    benchmark.agreement(argparse.Namespace(config=small, device="cpu", agreement=3), pictures)
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) < 1e-4  # float32, summed in another order


def test_images_needed_are_read_off_the_curve():
    points = [(10, 0.2), (20, 0.6), (30, 0.5), (40, 0.8)]
    assert images_to_reach(points, 0.4) == 15 and images_to_reach(points, 0.1) == 10 and images_to_reach(points, 0.9) is None
    assert images_to_reach(points, 0.7) == pytest.approx(30 + 10 * 2 / 3)


def test_a_curve_that_was_stopped_goes_on_with_the_points_it_has(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(transfer, "train", lambda config, folder: measured.append(config.max_images) or config.max_images)
    monkeypatch.setattr(transfer, "held_out_cosine", lambda seen: seen / 100)
    config = read_config(CONFIGS / "tiny_vit_last.yaml")
    assert transfer.curve(config, tmp_path / "run", 20, 10) == [(10, 0.1), (20, 0.2)]
    assert transfer.curve(config, tmp_path / "run", 40, 10) == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert measured == [10, 20, 30, 40]
    assert transfer.curve(config, tmp_path / "run", 20, 10) == [(10, 0.1), (20, 0.2)]
