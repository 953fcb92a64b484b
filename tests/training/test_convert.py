"""Checkpoints of the paper's own code become weights files that do the same, and go back bit by bit."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from official_checkpoint import (
    ARGUMENTS,
    BACKBONE,
    CHANNELS,
    CONTEXT,
    HEADS,
    HIDDEN,
    WIDTHS,
    Reference,
    convert_here,
    official_layout,
    random_state,
    random_tensor,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file

from featinv_nodes.core.encoders import ConvEncoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.weights import ENCODER_PREFIX, load_inversion, read_info, save_inversion
from training import convert
from training.models.base_model import BaseModel
from training.models.controlnet import FeatureControlNet
from training.models.official import from_official


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    return save_checkpoint(state, tmp_path_factory.mktemp("official") / "control.ckpt")


@pytest.fixture(scope="module")
def converted(checkpoint):
    return convert_here(checkpoint)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDTHS, cross_attention_dim=CONTEXT, attention_head_dim=HEADS
    ).eval()
    with torch.no_grad():
        for name, value in unet.named_parameters():
            value.copy_(random_tensor(name, value.shape))
    return BaseModel("small", unet, PatchAutoencoder(8, 4), None, {})


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 4, 16, 16), torch.tensor([7, 901]), torch.randn(2, 5, CONTEXT), torch.randn(2, CHANNELS, 7, 7)


def difference(result, expected):
    return ((result - expected).abs().max() / expected.abs().max()).item()


def residuals(controlnet, x, t, context, hint):
    down, mid = controlnet(x, t, context, hint, return_dict=False)
    return [*down, mid]


@torch.inference_mode()
def test_same_residuals_and_same_steered_prediction_as_the_official_code(state, converted, base, inputs):
    x, t, context, features = inputs
    expected, model = Reference(state)(*inputs), FeatureControlNet.load(converted, base)[0]
    result = residuals(model.controlnet, x, t, context, model.hint(features, x.shape[2:]))
    assert len(expected) == len(result) == 13
    assert max(difference(f, w) for f, w in zip(result, expected)) <= 1e-5

    free = base.unet(x, t, context).sample
    for strength in (1.0, 1.5):
        scaled = [w * strength for w in expected]  # the official control_scales
        steered = base.unet(
            x, t, context, down_block_additional_residuals=scaled[:-1], mid_block_additional_residual=scaled[-1]
        ).sample
        assert difference(steered, free) > 0.1
        assert (
            difference(model.predict(base.unet, x, t, context, model.hint(features, x.shape[2:]), strength), steered)
            <= 1e-5
        )


def test_what_the_weights_file_says_of_itself(converted, checkpoint):
    info = read_info(converted)
    assert (
        info.source.backbone == BACKBONE
        and info.source.layer == "layer1"
        and not info.source.pooled
        and info.source.channels == CHANNELS
    )
    assert info.encoder == {
        "kind": "conv",
        "channels": CHANNELS,
        "out_channels": WIDTHS[0],
        "width": HIDDEN,
        "kernel": 3,
    }
    assert info.base == {"name": "miniSD", "width": WIDTHS[0], "context": CONTEXT, "latent_channels": 4, "heads": HEADS}
    official = {"strength": 1.0, "guidance": 1.75, "negative": "text", "steps": 50, "timestep_spacing": "leading"}
    assert info.recommended == official
    assert info.prompt == "a high-quality, detailed, and professional image"
    assert not {k.split(".")[0] for k in load_file(converted)} - {
        k.split(".")[0] for k in ControlNetModel(block_out_channels=WIDTHS).state_dict()
    }

    pooled = checkpoint.with_name("pooled.safetensors")
    convert.main(
        [
            str(checkpoint),
            str(pooled),
            *ARGUMENTS,
            "--pooled",
            "--input-size",
            "288",
            "--base",
            "/models/sd",
            "--prompt",
            "p",
            "--steps",
            "20",
            "--guidance",
            "3",
        ]
    )
    info = read_info(pooled)
    assert info.source.pooled and info.source.input_size == (288, 288) and info.source.grid == (72, 72)
    official = {"strength": 1.5, "guidance": 3.0, "negative": "text", "steps": 20, "timestep_spacing": "leading"}
    assert info.recommended == official
    assert info.base["name"] == "/models/sd" and info.prompt == "p"


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_there_and_back_is_bitwise_equal(state, converted, tmp_path, suffix):
    back = tmp_path / f"back{suffix}"
    convert.main([str(converted), str(back), "--to", "official"])
    result = torch.load(back, weights_only=True)["state_dict"] if suffix == ".ckpt" else load_file(back)
    assert result.keys() == state.keys() and all(torch.equal(result[k], state[k]) for k in state)
    again = tmp_path / "again.safetensors"
    convert.main([str(back), str(again), *ARGUMENTS])
    first, second = load_file(converted), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([back.name, again.name])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bare_state_dict_is_read_too(state, converted, tmp_path, suffix):
    file, out = tmp_path / f"bare{suffix}", tmp_path / "ours.safetensors"
    torch.save(state, file, _use_new_zipfile_serialization=False) if suffix == ".pth" else save_file(
        state, file
    )  # as before PyTorch 1.6
    convert.main([str(file), str(out), *ARGUMENTS])
    first, second = load_file(converted), load_file(out)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_stable_diffusion_at_its_real_size():
    shapes = official_layout((320, 640, 1280, 1280), 768, 1024, 512)
    assert len(shapes) == 330
    official = {k.removeprefix("control_model."): torch.empty(s, device="meta") for k, s in shapes.items()}
    settings, ours = from_official(official, 8, "file")
    assert settings == {"kind": "conv", "channels": 1024, "out_channels": 320, "width": 512, "kernel": 3}
    encoder = {k.removeprefix(ENCODER_PREFIX): ours.pop(k).shape for k in list(ours) if k.startswith(ENCODER_PREFIX)}
    with torch.device("meta"):
        model = ControlNetModel(cross_attention_dim=768).state_dict()
        expected = ConvEncoder(1024, 320).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in model.items() if not k.startswith(ENCODER_PREFIX)
    }
    assert encoder == {k: v.shape for k, v in expected.items() if k.startswith("block.")}
    assert len({id(v) for v in ours.values()}) == 324


@torch.inference_mode()
def test_the_diffusers_folder_opens_and_its_readme_runs(converted, base, inputs, tmp_path, monkeypatch, caplog):
    x, t, context, features = inputs
    folder = tmp_path / "folder"
    convert.main([str(converted), str(folder), "--to", "diffusers"])
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "ControlNetModel"
    [code] = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    assert not caplog.records
    model, _ = FeatureControlNet.load(converted, base)
    expected = residuals(model.controlnet, x, t, context, model.hint(features, x.shape[2:]))
    result = residuals(names["controlnet"].eval(), x, t, context, names["encode"](features, x.shape[2:]))
    # the page upsamples by F.interpolate
    assert all((r - e).abs().max() <= 1e-5 * e.abs().max() for r, e in zip(result, expected, strict=True))
    with pytest.raises(FeatInvError, match="exists already"):
        convert.main([str(converted), str(folder), "--to", "diffusers"])


@torch.inference_mode()
def test_shipped_models_go_to_diffusers_but_standardised_ones_not_back(tmp_path):
    convert.main(["tiny_cnn_last", str(tmp_path / "tiny"), "--to", "diffusers"])
    model = ControlNetModel.from_pretrained(tmp_path / "tiny")
    info, tensors, encoder = load_inversion(convert.model_file("tiny_cnn_last"))
    assert (
        all(torch.equal(model.state_dict()[k], v) for k, v in tensors.items())
        and model.config.attention_head_dim == info.base["heads"]
    )
    stored = load_file(tmp_path / "tiny" / convert.ENCODER_FILE)
    assert all(torch.equal(stored[k], v) for k, v in encoder.state_dict().items())
    with pytest.raises(FeatInvError, match="standardises its features"):
        convert.main(["tiny_cnn_last", str(tmp_path / "tiny.ckpt"), "--to", "official"])
    other = ConvEncoder(encoder.settings["channels"], encoder.settings["out_channels"], encoder.settings["width"])
    other.settings["kind"] = "conv_at_map"  # the same tensors, used otherwise
    save_inversion(tmp_path / "other.safetensors", replace(info, encoder=other.settings), tensors, other)
    with pytest.raises(FeatInvError, match="conv_at_map"):
        convert.main([str(tmp_path / "other.safetensors"), str(tmp_path / "tiny.ckpt"), "--to", "official"])
    assert not (tmp_path / "tiny.ckpt").exists()
