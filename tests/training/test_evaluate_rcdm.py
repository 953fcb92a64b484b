"""RCDM's published checkpoints and the drawn world's: every tensor has its place, and the blocks compute what the
published ones do."""

import hashlib
import json

import pytest
import torch
from test_evaluate_suites import photographic as photographic
from test_evaluate_suites import run
from test_real_layout import stable_diffusion as stable_diffusion
from torch.nn import functional as F

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import read_metadata
from featinv_nodes.worlds import model_file, open_backbone
from training.evaluation.rcdm import HEADS, RCDM, load_rcdm, save_rcdm, translate
from training.evaluation.suites import rcdm as suite
from training.worlds.make_drawn import ship_rcdm
from training.worlds.rcdm import IMAGES, INVERSION_COST, INVERSION_IMAGES, RESOLUTION, WIDTHS

SMALL = (32, 32, 64, 96, 128)
#: SHA-256 of the lines "NAME (SHAPE)" of the state dict that the published code (facebookresearch/RCDM) makes with the
#: published flags and 2048 channels, sorted: 494 tensors, 422,603,782 numbers
PUBLISHED = "404d79df4dcb210fffeedeeae07b2ac9898d9af28258041b28d8c8342580575e"


def pair(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual(name, inside, outside, wide):
    result = (
        pair(f"{name}.in_layers.0", inside)
        | pair(f"{name}.in_layers.2", outside, inside, 3, 3)
        | pair(f"{name}.emb_layers.1", 2 * outside, wide)
    )
    result |= pair(f"{name}.out_layers.0", outside) | pair(f"{name}.out_layers.3", outside, outside, 3, 3)
    return result | (pair(f"{name}.skip_connection", outside, inside, 1, 1) if inside != outside else {})


def attention(name, width):
    return (
        pair(f"{name}.norm", width)
        | pair(f"{name}.qkv", 3 * width, width, 1)
        | pair(f"{name}.proj_out", width, width, 1)
    )


def layout(widths, channels):
    """Names and shapes of the published layout, block by block."""
    wide, first = 4 * widths[0], widths[0]
    result = pair("time_embed.0", wide, first) | pair("time_embed.2", wide, wide) | pair("ssl_emb", wide, channels)
    result |= pair("input_blocks.0.0", first, 3, 3, 3) | pair("out.0", first) | pair("out.2", 6, first, 3, 3)
    skips, width, n = [first], first, 1
    for level, out in enumerate(widths):
        for _ in range(2):
            result |= residual(f"input_blocks.{n}.0", width, out, wide) | (
                attention(f"input_blocks.{n}.1", out) if level >= 2 else {}
            )
            skips, width, n = [*skips, out], out, n + 1
        if level < len(widths) - 1:
            result |= residual(f"input_blocks.{n}.0", out, out, wide)
            skips, n = [*skips, out], n + 1
    result |= (
        residual("middle_block.0", width, width, wide)
        | attention("middle_block.1", width)
        | residual("middle_block.2", width, width, wide)
    )
    n = 0
    for level, out in reversed(list(enumerate(widths))):
        for layer in range(3):
            result |= residual(f"output_blocks.{n}.0", width + skips.pop(), out, wide) | (
                attention(f"output_blocks.{n}.1", out) if level >= 2 else {}
            )
            if level and layer == 2:
                result |= residual(f"output_blocks.{n}.{2 if level >= 2 else 1}", out, out, wide)
            width, n = out, n + 1
    return result


def state_dict(widths=SMALL, channels=48):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in layout(widths, channels).items()}


def test_every_tensor_of_the_published_layout_has_its_place():
    lines = sorted(f"{name} {shape}" for name, shape in layout((256, 256, 512, 768, 1024), 2048).items())
    assert len(lines) == 494 and hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED
    with torch.device("meta"):
        own = RCDM()
        state = {name: torch.empty(shape) for name, shape in layout((256, 256, 512, 768, 1024), 2048).items()}
    assert {k: v.shape for k, v in translate(state, 5).items()} == {k: v.shape for k, v in own.state_dict().items()}


def test_blocks_compute_what_the_published_ones_do():
    state, model = state_dict(), RCDM(48, SMALL, 32).eval()
    model.load_state_dict(translate(state, 5))
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    qkv = F.conv1d(
        F.group_norm(x, 32, *params(state, "input_blocks.7.1.norm"), 1e-5).flatten(2),
        *params(state, "input_blocks.7.1.qkv"),
    )
    q, k, v = qkv.reshape(2 * HEADS, 3 * 16, 16).split(16, 1)
    mixed = torch.einsum("bts,bcs->bct", (torch.einsum("bct,bcs->bts", q, k) / 16**0.5).softmax(-1), v).reshape(
        2, 64, 16
    )
    expected = x + F.conv1d(mixed, *params(state, "input_blocks.7.1.proj_out")).reshape(x.shape)
    with torch.no_grad():
        assert torch.allclose(
            model.unet.down_blocks[2].attentions[0](x), expected, atol=1e-4
        )  # float32 sums over 64 channels
        x = torch.randn(2, 128, 4, 4)
        h = F.conv2d(
            F.silu(F.group_norm(x, 32, *params(state, "middle_block.0.in_layers.0"), 1e-5)),
            *params(state, "middle_block.0.in_layers.2"),
            padding=1,
        )
        scale, shift = F.linear(F.silu(emb), *params(state, "middle_block.0.emb_layers.1"))[..., None, None].chunk(2, 1)
        h = F.silu(F.group_norm(h, 32, *params(state, "middle_block.0.out_layers.0"), 1e-5) * (1 + scale) + shift)
        expected = x + F.conv2d(h, *params(state, "middle_block.0.out_layers.3"), padding=1)
        assert torch.allclose(model.unet.mid_block.resnets[0](x, emb), expected, atol=1e-4)


def params(state, name):
    return state[f"{name}.weight"], state[f"{name}.bias"]


def test_samples_depend_on_the_vector_and_the_noise():
    model = RCDM(48, SMALL, 32).eval()
    model.load_state_dict(translate(state_dict(), 5))
    vectors, noise = torch.randn(2, 48), torch.randn(2, 3, 32, 32)
    drawn = model.sample(vectors, noise, 2)
    assert drawn.shape == (2, 3, 32, 32) and 0 <= drawn.min() and drawn.max() <= 1
    # 1e-2: the first step of DDIM divides the rounding of float32 by the 0.6 % of the picture that is left at t = 999
    assert torch.allclose(drawn[:1], model.sample(vectors[:1], noise[:1], 2), atol=1e-2)
    assert not torch.allclose(drawn[:1], model.sample(vectors[1:], noise[:1], 2), atol=0.1)


def test_the_vectors_are_those_that_it_was_trained_on():
    backbone = untrained_backbone("resnet10t", 64)
    pixel_values, model = torch.rand(2, 3, 64, 64), RCDM(512, SMALL, 32)
    for mean, std in (
        (model.mean, model.std),
        (backbone.mean, backbone.std),
    ):  # the published ones, and the backbone's own
        model.mean, model.std = mean, std
        normalised = (pixel_values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        with torch.inference_mode():
            expected = backbone.model.forward_features(normalised).mean((2, 3))
        assert torch.allclose(
            model.vectors(backbone, pixel_values), expected, rtol=1e-3, atol=1e-5
        )  # float32, scaled there and back


def test_published_checkpoints_take_pictures_from_minus_one_to_one():
    assert RCDM.mean == RCDM.std == (0.5, 0.5, 0.5) and RCDM.source is None


def small_world(file, seed=0):
    """An untrained RCDM of the drawn world's size and features."""
    torch.manual_seed(seed)
    source = open_backbone("tiny-cnn").source("last", True)
    model = RCDM(source.channels, WIDTHS, RESOLUTION)
    save_rcdm(file, model, source, {"steps": 2, "images_seen": 0})
    return model.eval()


def test_its_own_file_holds_the_same_model(tmp_path):
    model, loaded = small_world(tmp_path / "rcdm.safetensors"), load_rcdm(tmp_path / "rcdm.safetensors")
    assert loaded.steps == 2 and loaded.source.backbone == "resnet10t.tiny_world" and loaded.mean == loaded.source.mean
    for (name, expected), result in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(expected.half().float(), result), name
    with pytest.raises(FeatInvError, match="no RCDM"):
        load_rcdm(model_file("tiny_cnn_last"))


def test_a_finished_checkpoint_is_shipped_without_training(tmp_path, capsys):
    model = RCDM(128, WIDTHS, RESOLUTION)
    average = {name: value + 1 for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save(
        {"model": model.state_dict(), "average": average, "optimizer": optimizer, "seen": IMAGES}, tmp_path / "rcdm.pt"
    )
    ship_rcdm(tmp_path, "cpu", IMAGES, tmp_path / "rcdm.safetensors")
    assert torch.equal(load_rcdm(tmp_path / "rcdm.safetensors").vector.bias, average["vector.bias"].half().float())
    about = json.loads(read_metadata(tmp_path / "rcdm.safetensors")["rcdm"])
    assert about["images_seen"] == IMAGES and tuple(about["widths"]) == WIDTHS and about["source"]["pooled"]
    # as much compute as the model of pooled features had, to within a batch of each
    assert about["gmac"] == pytest.approx(INVERSION_IMAGES * INVERSION_COST, rel=1e-3)


def test_the_embedded_world_compares_without_arguments(tmp_path, monkeypatch):
    small_world(tmp_path / "rcdm.safetensors")
    monkeypatch.setattr(suite, "EMBEDDED", tmp_path / "rcdm.safetensors")
    result, text = run(tmp_path, "rcdm", count=2)
    for condition in ("unconditional", "RCDM", "tiny_cnn_pooled", "tiny_cnn_last", "round trip"):
        for name in ("cosine", "cosine_pooled", "top1_match", "top5_match"):
            assert result[condition][name]["n"] == result[condition][f"native: {name}"]["n"] == 2
    assert result["sampling"]["RCDM"]["steps"] == 2 and "32 pixels, RCDM's own" in text
    # an untrained network's pictures are no reconstructions
    assert (
        result["RCDM"]["cosine"]["value"]
        < result["tiny_cnn_pooled"]["cosine"]["value"]
        < result["tiny_cnn_last"]["cosine"]["value"]
    )
    with pytest.raises(FeatInvError, match="give --rcdm FILE"):
        run(tmp_path / "vit", "rcdm", "--model", "tiny_vit_last")


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(FeatInvError, match="does not exist"):
        load_rcdm(tmp_path / "none.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(FeatInvError, match="no layer ssl_emb"):
        load_rcdm(tmp_path / "other.pt")


def test_the_suite_scores_both_at_both_resolutions(photographic, tmp_path, monkeypatch):
    model = RCDM(512, SMALL, 32).eval()
    model.load_state_dict(translate(state_dict(channels=512), 5))
    (tmp_path / "rcdm.pt").write_bytes(b"in its place")
    monkeypatch.setattr(suite, "load_rcdm", lambda file: model)
    result, text = run(
        tmp_path, "rcdm", *photographic, "--rcdm", str(tmp_path / "rcdm.pt"), "--rcdm-steps", "2", count=2
    )
    for condition in ("RCDM", photographic[1], "unconditional", "round trip"):
        assert result[condition]["cosine"]["n"] == result[condition]["native: cosine"]["n"] == 2
    assert result["RCDM"]["native: cosine"] != result["RCDM"]["cosine"] and "32 pixels, RCDM's own" in text
    assert json.loads((tmp_path / "rcdm" / "settings.json").read_text())["files"]["rcdm"]
    with pytest.raises(FeatInvError, match="512 channels of the last layer"):
        run(tmp_path / "other", "rcdm", "--rcdm", str(tmp_path / "rcdm.pt"))
