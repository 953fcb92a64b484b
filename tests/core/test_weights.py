"""The weights file comes back as it was saved, or says what is wrong with it."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_nodes.core import files
from featinv_nodes.core.encoders import ConvEncoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.scope import fit_scope
from featinv_nodes.core.weights import InversionInfo, load_inversion, load_scope, read_info, save_inversion, save_scope

SOURCE = FeatureSource("net.tag", "last", False, 6, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def saved(tmp_path, dtype=torch.float32):
    torch.manual_seed(0)
    encoder = ConvEncoder(6, 8, width=10)
    torch.nn.init.normal_(encoder.block[-1].weight)
    encoder.standardise(torch.randn(50, 6, 3, 4) * 3 + 1)
    info = InversionInfo(
        SOURCE,
        encoder.settings,
        {"name": "b", "width": 8, "context": 4, "latent_channels": 4, "heads": 2},
        "a prompt",
        images_seen=7,
    )
    tensors = {"controlnet_mid_block.weight": torch.randn(3, 3)}
    own = {"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}  # a ControlNet's that reads pictures
    save_inversion(tmp_path / "m.safetensors", info, tensors | own, encoder, dtype)
    return info, tensors, encoder


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.0), (torch.float16, 2e-3)])  # fp16 keeps 11 bits
def test_round_trip(tmp_path, dtype, tolerance):
    info, tensors, encoder = saved(tmp_path, dtype)
    again, result, loaded = load_inversion(tmp_path / "m.safetensors")
    assert again == info
    assert list(result) == list(tensors)
    x = torch.randn(2, 6, 3, 4)
    expected, got = encoder(x, (8, 8)), loaded(x, (8, 8))
    assert (expected - got).abs().max() <= tolerance * expected.abs().max()
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_encoder_starts_at_zero_follows_the_latent_grid_and_tiles_pooled_maps():
    encoder = ConvEncoder(6, 8, width=10)
    assert encoder(torch.randn(2, 6, 3, 4), (8, 12)).abs().max() == 0
    torch.nn.init.normal_(encoder.block[-1].weight)
    assert encoder(torch.randn(2, 6, 3, 4), (8, 12)).shape == (2, 8, 8, 12)
    tiled = encoder(torch.randn(1, 6, 1, 1), (9, 9))
    assert torch.allclose(tiled[0, :, 3, 3], tiled[0, :, 5, 4], atol=1e-6)  # away from the padded border


def test_standardised_features_have_mean_zero_and_deviation_one():
    encoder, x = ConvEncoder(6, 8), torch.randn(50, 6, 3, 4) * torch.linspace(1, 9, 6)[:, None, None] - 2
    encoder.standardise(x)
    z = encoder.standardised(x)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5 and (z.std((0, 2, 3)) - 1).abs().max() < 0.01
    encoder.standardise(x.index_fill(1, torch.tensor([2]), 0.0))  # a channel that is always 0, as ReLUs leave some
    assert encoder.standardised(x).isfinite().all()


def rewrite_info(file, **changes):
    with files.safe_open(file, "pt") as opened:
        text = json.loads(opened.metadata()["featinv"])
    save_file(load_file(file), file, {"featinv": json.dumps(text | changes)})


def test_bad_files_are_explained(tmp_path):
    saved(tmp_path)
    file = tmp_path / "m.safetensors"
    whole = file.read_bytes()
    with pytest.raises(FeatInvError, match="does not exist"):
        read_info(tmp_path / "none.safetensors")
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FeatInvError, match="not a complete safetensors"):
        read_info(tmp_path / "short.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(FeatInvError, match="not a complete safetensors"):
        read_info(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FeatInvError, match="no FeatInv weights file"):
        read_info(tmp_path / "foreign.safetensors")
    rewrite_info(file, format=99)
    with pytest.raises(FeatInvError, match="version 99"):
        read_info(file)
    rewrite_info(file, format=1, encoder={"kind": "conv", "channels": 6, "out_channels": 8, "width": 11})
    with pytest.raises(FeatInvError, match="block.0.weight"):
        load_inversion(file)
    rewrite_info(file, encoder={"kind": "magic"})
    with pytest.raises(FeatInvError, match="magic"):
        read_info(file)


def test_nothing_half_written_stays_behind(tmp_path, monkeypatch):
    saved(tmp_path)
    before = (tmp_path / "m.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        saved(tmp_path, torch.float16)
    assert os.listdir(tmp_path) == ["m.safetensors"] and (tmp_path / "m.safetensors").read_bytes() == before


def test_source_mismatch_names_both_sides():
    with pytest.raises(FeatInvError, match="layer: last against stages.1"):
        SOURCE.require(replace(SOURCE, layer="stages.1"), "the file", "the map")


def some_maps(seed, source=SOURCE):
    return FeatureMap(torch.randn(200, 6, 3, 4, generator=torch.Generator().manual_seed(seed)), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scope_is_added_and_the_rest_stays(tmp_path, dtype):
    info, tensors, _ = saved(tmp_path, dtype)
    file = tmp_path / "m.safetensors"
    before = load_file(file)
    assert load_scope(file) is None
    scope = fit_scope(some_maps(0), centres=8)
    save_scope(file, scope)
    save_scope(file, scope)  # again: one set of statistics, not two
    again, result, _ = load_inversion(file)
    assert again == info and list(result) == list(tensors)
    after = load_file(file)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert torch.equal(load_scope(file).evaluate(some_maps(1)).combined, scope.evaluate(some_maps(1)).combined)
    save_scope(file, scope, tmp_path / "other.safetensors")
    other = load_file(tmp_path / "other.safetensors")  # not byte by byte: safetensors writes metadata in any order
    assert (
        other.keys() == after.keys()
        and all(torch.equal(after[k], other[k]) for k in after)
        and len(os.listdir(tmp_path)) == 2
    )
    kept = load_scope(tmp_path / "other.safetensors")
    assert torch.equal(kept.bank, scope.bank) and kept.bank.dtype == scope.bank.dtype == torch.float16
    assert read_info(tmp_path / "other.safetensors") == info


def test_scope_of_other_features_is_refused_and_a_broken_one_left_out_with_a_warning(tmp_path, caplog):
    saved(tmp_path)
    file = tmp_path / "m.safetensors"
    other = replace(SOURCE, layer="stages.1")
    with pytest.raises(FeatInvError, match="layer: stages.1 against last"):
        save_scope(file, fit_scope(some_maps(0, other), centres=8))
    assert load_scope(file) is None
    save_scope(file, fit_scope(some_maps(0), centres=8))
    with files.safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({k: v for k, v in load_file(file).items() if k != "scope.bank"}, file, about)
    assert load_scope(file) is None and "fit them again" in caplog.text
    with pytest.raises(FeatInvError, match="does not exist"):
        load_scope(tmp_path / "none.safetensors")
