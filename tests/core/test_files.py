"""Weights in 8 bits come back within half a step, all others as they were, and a file is there whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.encoders import ConvEncoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.files import SCALE, is_in_8_bits, read_weights, write_safetensors, write_weights
from featinv_nodes.core.scope import fit_scope
from featinv_nodes.core.weights import InversionInfo, load_inversion, load_scope, save_inversion, save_scope

SOURCE = FeatureSource("net.tag", "last", False, 6, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def some_weights():
    """Matrices and a kernel, their channels a millionfold apart and one of them zero; what is too small for 8 bits; and
    integers."""
    torch.manual_seed(0)
    spread = torch.logspace(-3, 3, 32)
    tensors = {
        "linear.weight": torch.randn(32, 48) * spread[:, None],
        "conv.weight": (torch.randn(32, 16, 3, 3) * spread[:, None, None, None]).to(memory_format=torch.channels_last),
        "half.weight": torch.randn(8, 20).half(),
        "linear.bias": torch.randn(32),
        "depthwise.weight": torch.randn(32, 1, 3, 3),  # 9 numbers to a channel: a scale for each would save nothing
        "mean": torch.randn(24, 1, 1),
        "number": torch.tensor(0.7),
    }
    tensors["linear.weight"][3] = 0
    return tensors | {
        "counter": torch.tensor(12345678901),
        "index": torch.arange(-70000, 70000),
        "mask": torch.tensor([True, False]),
    }


def test_8_bits_are_within_half_a_step_of_what_was_written(tmp_path):
    """A step is 1/127 of the largest number of its output channel, and each number goes to the nearest step."""
    expected, file = some_weights(), tmp_path / "w.safetensors"
    write_weights(file, expected, torch.int8)
    result, stored = read_weights(file), load_file(file)
    assert is_in_8_bits(file) and list(sorted(result)) == list(sorted(expected))
    for name in ("linear.weight", "conv.weight", "half.weight"):
        assert (
            stored[name].dtype == torch.int8
            and result[name].dtype == torch.float32
            and result[name].shape == expected[name].shape
        )
        step = expected[name].float().flatten(1).abs().amax(1) / 127
        error = (result[name] - expected[name].float()).flatten(1).abs().amax(1)
        assert (error <= step * (0.5 + 1e-5)).all()  # 1e-5: rounding in float32
        assert (
            error > step * 0.3
        ).float().mean() > 0.8  # among so many numbers some lie between two steps: it is 8 bits, not more
    assert result["linear.weight"][3].abs().max() == 0
    for name in ("linear.bias", "depthwise.weight", "mean", "number"):
        assert stored[name].dtype == torch.float16 and torch.equal(result[name], expected[name].half().float()), name
    for name in ("counter", "index", "mask"):
        assert result[name].dtype == expected[name].dtype and torch.equal(result[name], expected[name]), name


def test_8_bits_written_again_are_the_same(tmp_path):
    """A model that is opened and saved again does not wear off."""
    write_weights(tmp_path / "one.safetensors", some_weights(), torch.int8)
    once = read_weights(tmp_path / "one.safetensors")
    write_weights(tmp_path / "two.safetensors", once, torch.int8)
    twice = read_weights(tmp_path / "two.safetensors")
    assert all(
        (once[name] - twice[name]).abs().max() <= 1e-6 * once[name].abs().max()
        for name in once
        if once[name].is_floating_point()
    )
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one if not name.endswith(SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_precisions_are_what_they_say(tmp_path, dtype):
    expected, file = some_weights(), tmp_path / "w.safetensors"
    write_weights(file, expected, dtype)
    result, stored = read_weights(file), load_file(file)
    assert not is_in_8_bits(file) and list(sorted(stored)) == list(sorted(result)) == list(sorted(expected))
    for name, value in expected.items():
        if value.is_floating_point():
            assert stored[name].dtype == dtype and torch.equal(result[name], value.to(dtype).float()), name
        else:
            assert result[name].dtype == value.dtype and torch.equal(result[name], value), name


def test_what_is_skipped_is_not_read(tmp_path):
    write_weights(tmp_path / "w.safetensors", some_weights(), torch.int8)
    result = read_weights(tmp_path / "w.safetensors", skip="linear.")
    assert "conv.weight" in result and not [
        name for name in result if name.startswith("linear.") or name.endswith(SCALE)
    ]


def test_a_models_own_tensor_of_that_name_is_kept(tmp_path):
    """SCALE ends the names of other tensors, too; only the scale of a tensor in the file is one."""
    write_weights(
        tmp_path / "w.safetensors", {"layer" + SCALE: torch.ones(40), "norm.weight": torch.ones(8, 16)}, torch.int8
    )
    assert sorted(read_weights(tmp_path / "w.safetensors")) == ["layer" + SCALE, "norm.weight"]


def saved(file, dtype):
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
    save_inversion(file, info, {"controlnet_mid_block.weight": torch.randn(30, 30)}, encoder, dtype)
    return info, encoder


def test_an_encoder_in_8_bits_gives_the_same_hint(tmp_path):
    info, encoder = saved(tmp_path / "m.safetensors", torch.int8)
    again, controlnet, loaded = load_inversion(tmp_path / "m.safetensors")
    assert again == info and list(controlnet) == ["controlnet_mid_block.weight"]
    x = torch.randn(4, 6, 3, 4) * 3 + 1
    expected, got = encoder(x, (8, 8)), loaded(x, (8, 8))
    assert (
        0 < (expected - got).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()
    )  # steps of at most 1/127, errors independent


def test_scope_is_added_to_8_bits_and_they_stay(tmp_path):
    file = tmp_path / "m.safetensors"
    info, _ = saved(file, torch.int8)
    before, expected = load_file(file), load_inversion(file)
    maps = FeatureMap(torch.randn(200, 6, 3, 4, generator=torch.Generator().manual_seed(0)), SOURCE)
    scope = fit_scope(maps, centres=8)
    for _ in range(2):  # again: one set of statistics, not two
        save_scope(file, scope)
        after = load_file(file)
        assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
        assert all(k.startswith("scope.") for k in after.keys() - before.keys())
    again, controlnet, encoder = load_inversion(file)
    assert again == info and is_in_8_bits(file)
    assert all(torch.equal(controlnet[k], v) for k, v in expected[1].items())
    assert all(torch.equal(encoder.state_dict()[k], v) for k, v in expected[2].state_dict().items())
    assert torch.equal(load_scope(file).evaluate(maps).combined, scope.evaluate(maps).combined)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path, dtype, kept):
    file = tmp_path / "cut off.safetensors"
    write_weights(file, some_weights(), dtype)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        FeatInvError, match=r"cut off.safetensors is .*not a complete safetensors file .*download or copy it again$"
    ):
        read_weights(file)
    with pytest.raises(FeatInvError, match="none.safetensors does not exist"):
        read_weights(tmp_path / "none.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_on_a_full_disk_the_old_file_stays_and_nothing_else(tmp_path):
    file = tmp_path / "w.safetensors"
    write_weights(file, some_weights(), torch.int8)
    before = file.read_bytes()
    (tmp_path / "w.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        write_safetensors(file, {"a": torch.zeros(100_000)}, {"format": "pt"})
    assert error.value.errno == errno.ENOSPC
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("name", ["x" * 300, "ü" * 130, "x" * 239, "folder" * 50 + "/w", "a\0b"])
def test_a_name_that_no_disk_takes_is_said_before_anything_is_written(tmp_path, name):
    with pytest.raises(FeatInvError, match="has .* bytes; a name takes at most 250. Give a shorter one|a zero byte"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"a": torch.zeros(1)}, {"format": "pt"})
    assert not os.listdir(tmp_path)
    write_safetensors(tmp_path / f"{'x' * 238}.safetensors", {"a": torch.zeros(1)}, {"format": "pt"})


def test_8_bits_without_their_scale_are_named(tmp_path):
    save_file({"layer.weight": torch.ones(4, 20, dtype=torch.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(FeatInvError, match="w.safetensors: the tensor 'layer.weight' is stored in 8 bits"):
        read_weights(tmp_path / "w.safetensors")


def test_a_checkpoint_cut_off_anywhere_is_named(tmp_path):
    """A file of before PyTorch 1.6, whose reader raises something else at almost every length."""
    file = tmp_path / "cut.pth"
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    assert read_checkpoint(file)["a"].shape == (3,)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(FeatInvError, match="cut.pth"):
            read_checkpoint(file)
