"""Checkpoints of the paper's own code become weights files that do the same, and go back bit by bit."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from featinv_nodes.core.encoders import ConvEncoder
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.weights import ENCODER_PREFIX, load_inversion, read_info, save_inversion
from training import convert
from training.models.base_model import BaseModel
from training.models.controlnet import FeatureControlNet
from training.models.official import from_official

BACKBONE = "resnet10t"
CHANNELS, HIDDEN, CONTEXT, HEADS = 64, 24, 48, 8  # layer1 of that backbone has 64 channels
WIDTHS = (32, 64, 128, 128)
ARGUMENTS = ["--backbone", BACKBONE, "--layer", "layer1"]


def official_layout(widths, context, channels, hidden, latents=4):
    """{name: shape} of the official ControlNet: SD 1.x's levels of two blocks, attention in all but the last."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"control_model.{name}.weight"], shapes[f"control_model.{name}.bias"] = shape, shape[:1]

    def residual(name, before, after):
        layer(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", after, widths[0] * 4)
        layer(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def transformer(name, width):
        layer(f"{name}.norm", width)
        layer(f"{name}.proj_in", width, width, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, other in (("attn1", width), ("attn2", context)):
            for part, size in (("to_q", width), ("to_k", other), ("to_v", other)):
                shapes[f"control_model.{block}.{attention}.{part}.weight"] = (width, size)
            layer(f"{block}.{attention}.to_out.0", width, width)
        layer(f"{block}.ff.net.0.proj", width * 8, width)
        layer(f"{block}.ff.net.2", width, width * 4)
        for norm in ("norm1", "norm2", "norm3"):
            layer(f"{block}.{norm}", width)
        layer(f"{name}.proj_out", width, width, 1, 1)

    layer("time_embed.0", widths[0] * 4, widths[0])
    layer("time_embed.2", widths[0] * 4, widths[0] * 4)
    layer("input_blocks.0.0", widths[0], latents, 3, 3)
    out, before, number = [widths[0]], widths[0], 1
    for level, width in enumerate(widths):
        for _ in range(2):
            residual(f"input_blocks.{number}.0", before, width)
            if level < len(widths) - 1:
                transformer(f"input_blocks.{number}.1", width)
            out, before, number = [*out, width], width, number + 1
        if level < len(widths) - 1:
            layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            out, number = [*out, width], number + 1
    for number, width in enumerate(out):
        layer(f"zero_convs.{number}.0", width, width, 1, 1)
    residual("middle_block.0", before, before)
    transformer("middle_block.1", before)
    residual("middle_block.2", before, before)
    layer("middle_block_out.0", before, before, 1, 1)
    for number, sizes in ((1, (hidden, channels)), (3, (hidden, hidden)), (5, (widths[0], hidden))):
        layer(f"input_hint_block.block.{number}", *sizes, 3, 3)
    return shapes


def random_tensor(name, shape):
    if len(shape) > 1:
        return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape) * 0.2 + (1 if name.endswith("weight") else 0)


class Reference:
    """The forward pass of the official code, ldm's ControlNet with the feature encoder, on its state dict."""

    def __init__(self, state):
        self.state = {k.removeprefix("control_model."): v for k, v in state.items()}

    def pair(self, name):
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def conv(self, name, x, stride=1):
        return F.conv2d(x, *self.pair(name), stride, padding=self.state[f"{name}.weight"].shape[-1] // 2)

    def linear(self, name, x):
        return F.linear(x, *self.pair(name))

    def norm(self, name, x, eps=1e-5):
        return (
            F.group_norm(x, 32, *self.pair(name), eps)
            if x.ndim == 4
            else F.layer_norm(x, x.shape[-1:], *self.pair(name))
        )

    def residual(self, name, x, emb):
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", h)))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x)

    def attention(self, name, x, context):
        q, k, v = (
            self.linear(f"{name}.{part}", y).unflatten(2, (HEADS, -1))
            for part, y in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(f"{name}.to_out.0", torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))

    def transformer(self, name, x, context):
        h = self.conv(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6)).flatten(2).transpose(1, 2)
        block = f"{name}.transformer_blocks.0"
        own = self.norm(f"{block}.norm1", h)
        h = h + self.attention(f"{block}.attn1", own, own)
        h = h + self.attention(f"{block}.attn2", self.norm(f"{block}.norm2", h), context)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.norm(f"{block}.norm3", h)).chunk(2, -1)
        h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + self.conv(f"{name}.proj_out", h.transpose(1, 2).unflatten(2, x.shape[2:]))

    def hint(self, features, size):
        x = F.interpolate(features, size, mode="bilinear")
        x = F.silu(self.conv("input_hint_block.block.1", x))
        x = F.silu(self.conv("input_hint_block.block.3", x))
        return self.conv("input_hint_block.block.5", x)

    def block(self, name, x, emb, context):
        if f"{name}.0.op.weight" in self.state:
            return self.conv(f"{name}.0.op", x, stride=2)
        x = self.residual(f"{name}.0", x, emb)
        return self.transformer(f"{name}.1", x, context) if f"{name}.1.norm.weight" in self.state else x

    def __call__(self, x, t, context, features):
        width = self.state["time_embed.0.weight"].shape[1]
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", emb)))
        h, out = self.conv("input_blocks.0.0", x) + self.hint(features, x.shape[2:]), []
        for number in range(12):
            h = h if number == 0 else self.block(f"input_blocks.{number}", h, emb, context)
            out.append(self.conv(f"zero_convs.{number}.0", h))
        h = self.residual("middle_block.2", self.block("middle_block", h, emb, context), emb)
        return [*out, self.conv("middle_block_out.0", h)]


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {k: random_tensor(k, s) for k, s in official_layout(WIDTHS, CONTEXT, CHANNELS, HIDDEN).items()}


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    """As Lightning writes it: the other models and the optimizer's state are in there too."""
    file = tmp_path_factory.mktemp("official") / "control.ckpt"
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(4, 4),
        "first_stage_model.a": torch.randn(4),
        "cond_stage_model.b": torch.zeros(4, dtype=torch.long),
        "betas": torch.rand(10),
    }
    optimizer = [{"state": {0: {"step": 5, "exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 1e-5}]}]
    torch.save(
        {"state_dict": others | state, "optimizer_states": optimizer, "callbacks": {"ModelCheckpoint": {"best": None}}},
        file,
    )
    return file


@pytest.fixture(scope="module")
def converted(checkpoint):
    file = checkpoint.with_name("ours.safetensors")
    convert.main([str(checkpoint), str(file), *ARGUMENTS])
    return file


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


def keep(state, condition):
    return {k: v for k, v in state.items() if condition(k)}


ZERO, PROJ, HINT = (
    "control_model.zero_convs.5.0.bias",
    "control_model.input_blocks.4.1.proj_in.weight",
    "control_model.input_hint_block.block.5.weight",
)
EXTRA = "control_model.label_emb.0.0.weight"
BAD_STATES = {
    "missing": (lambda s: keep(s, lambda k: k not in (ZERO, PROJ)), rf"missing: .*{ZERO}.*"),
    "many missing": (
        lambda s: keep(s, lambda k: ".attn1." not in k),
        r"missing: (control_model\S+, ){7}control_model\S+ and 27 more",
    ),
    "unexpected": (lambda s: {**s, EXTRA: torch.zeros(2, 2)}, f"unexpected: {EXTRA}"),
    "misshapen": (
        lambda s: {**s, HINT: torch.zeros(64, HIDDEN, 3, 3)},
        r"misshapen: .*block\.5\.weight \(64, 24, 3, 3\) instead of \(32, 24, 3, 3\)",
    ),
    "linear projections (SD 2)": (lambda s: {**s, PROJ: s[PROJ][:, :, 0, 0]}, rf"misshapen: {PROJ} \(64, 64\) instead"),
    "no downsampler": (lambda s: keep(s, lambda k: "blocks.3.0.op" not in k), r"levels of \[5, 2, 2\] residual blocks"),
    "for pictures": (
        lambda s: {k.replace("block.block", "block"): v for k, v in s.items()},
        r"input_hint_block\.block\.1\.weight is missing",
    ),
    "no middle": (lambda s: keep(s, lambda k: "middle" not in k), r"middle_block\.1\.\S+ is missing"),
    "base model only": (
        lambda s: {k.replace("control_model", "model.diffusion_model"): v for k, v in s.items()},
        r"no tensors control_model\.\*; it has model\.diffusion_model\.",
    ),
    "nothing": (lambda s: {}, "none at all"),
    "no tensors": (lambda s: [1, 2], "holds a list; expected a state dict"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_checkpoint_that_does_not_fit_is_named_tensor_by_tensor(state, tmp_path, case):
    change, message = BAD_STATES[case]
    torch.save(change(state), tmp_path / "bad.ckpt")
    with pytest.raises(FeatInvError, match=message):
        convert.main([str(tmp_path / "bad.ckpt"), str(tmp_path / "out" / "ours.safetensors"), *ARGUMENTS])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_checkpoint_of_a_training_that_failed_is_refused(state, converted, tmp_path, suffix):
    wrong = {**state, HINT: state[HINT] * math.nan, ZERO: state[ZERO] + math.inf}
    file, out = tmp_path / f"bad{suffix}", tmp_path / "ours.safetensors"
    torch.save({"state_dict": wrong}, file) if suffix == ".ckpt" else save_file(wrong, file)
    with pytest.raises(FeatInvError, match="bad.* holds NaN or infinite values in control_model") as error:
        convert.main([str(file), str(out), *ARGUMENTS])
    assert HINT in str(error.value) and ZERO in str(error.value) and PROJ not in str(error.value) and not out.exists()
    info, tensors, encoder = load_inversion(converted)
    save_inversion(out, info, tensors | {"conv_in.bias": tensors["conv_in.bias"] * math.nan}, encoder)
    for to in ("official", "diffusers"):
        with pytest.raises(FeatInvError, match=r"ours.safetensors holds NaN or infinite values in conv_in\.bias;"):
            convert.main([str(out), str(tmp_path / f"{to}.ckpt"), "--to", to])


class Foreign:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_foreign_code_in_a_pickle_is_refused_and_not_run(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "callbacks": Foreign()}, "bad.ckpt")
    with pytest.raises(FeatInvError, match=r"could run foreign code \(.*open.*state_dict"):
        convert.main(["bad.ckpt", "ours.safetensors", *ARGUMENTS])
    assert [f.name for f in tmp_path.iterdir()] == ["bad.ckpt"]


@pytest.mark.parametrize("share", [0.0, 3e-7, 0.001, 0.9])
def test_a_truncated_file_is_reported(checkpoint, state, tmp_path, share):
    new, old = tmp_path / "new.safetensors", tmp_path / "old.pth"
    save_file(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    for whole in (checkpoint, new, old):
        content, bad = whole.read_bytes(), tmp_path / f"cut{whole.suffix}"
        bad.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(FeatInvError, match="is not a complete"):
            convert.main([str(bad), str(tmp_path / "ours.safetensors"), *ARGUMENTS])


BAD_ARGUMENTS = {
    "another layer": (
        ["--backbone", BACKBONE, "--layer", "layer2"],
        r"features of 64 channels, but resnet10t, layer layer2, 128 channels",
    ),
    "another backbone": (
        ["--backbone", "resnet18"],
        r"features of 64 channels, but resnet18, layer last, 512 channels",
    ),
    "no backbone": ([], "give --backbone"),
    "unknown backbone": (["--backbone", "resnet10z"], "similar names: .*resnet10t"),
    "unknown tag": (["--backbone", "resnet10t.nobody"], "timm knows no 'resnet10t.nobody'"),
    "unknown layer": (["--backbone", BACKBONE, "--layer", "layer9"], "no layer 'layer9'"),
    "fixed size": (["--backbone", "tiny-vit", "--input-size", "288"], "cannot be set to 288"),
    "size too small": (
        ["--backbone", "vit_tiny_patch16_224", "--input-size", "8"],
        "timm cannot run vit_tiny_patch16_224 at 8 pixels",
    ),
    "heads": ([*ARGUMENTS, "--heads", "5"], r"widths are \[32, 64, 128, 128\].* 5 attention heads"),
    "settings": ([*ARGUMENTS, "--steps", "0"], "steps >= 1"),
    "direction": (["--to", "official"], "reads a FeatInv weights file"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_arguments_that_do_not_fit_the_checkpoint(checkpoint, tmp_path, case):
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(FeatInvError, match=message):
        convert.main([str(checkpoint), str(tmp_path / "ours.safetensors"), *arguments])
    assert not list(tmp_path.iterdir())


def test_files_at_odds_with_the_direction(checkpoint, converted, tmp_path):
    for arguments, message in (
        ([converted, tmp_path / "out.safetensors", *ARGUMENTS], "is a FeatInv weights file already"),
        ([checkpoint, tmp_path / "out.ckpt", *ARGUMENTS], "ends in .safetensors"),
        ([converted, tmp_path / "out", "--to", "official"], "ends in one of"),
        ([converted, converted, "--to", "official"], "would overwrite the input"),
        ([tmp_path / "none.ckpt", tmp_path / "out.safetensors", *ARGUMENTS], "does not exist"),
        ([tmp_path / "none.safetensors", tmp_path / "out.ckpt", "--to", "official"], "neither a file"),
    ):
        with pytest.raises(FeatInvError, match=message):
            convert.main([str(a) for a in arguments])


def test_a_damaged_weights_file_is_not_passed_on(converted, tmp_path):
    tensors = load_file(converted)
    tensors["down_blocks.0.resnets.0.odd.weight"] = tensors.pop("conv_in.bias")
    info, _, encoder = load_inversion(converted)
    convert.save_inversion(tmp_path / "odd.safetensors", info, tensors, encoder)
    for to, out in (("official", "out.ckpt"), ("diffusers", "out")):
        with pytest.raises(
            FeatInvError, match=r"missing: conv_in\.bias; unexpected: down_blocks\.0\.resnets\.0\.odd\.weight"
        ):
            convert.main([str(tmp_path / "odd.safetensors"), str(tmp_path / out), "--to", to])
        assert not (tmp_path / out).exists()
