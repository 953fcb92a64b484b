"""What convert.py refuses: checkpoints that do not fit, damaged or foreign files, arguments at odds with them."""

import math

import pytest
import torch
from official_checkpoint import ARGUMENTS, BACKBONE, HIDDEN, convert_here, random_state, save_checkpoint
from safetensors.torch import load_file, save_file

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import load_inversion, save_inversion
from training import convert


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    return save_checkpoint(state, tmp_path_factory.mktemp("official") / "control.ckpt")


@pytest.fixture(scope="module")
def converted(checkpoint):
    return convert_here(checkpoint)


def keep(state, condition):
    return {k: v for k, v in state.items() if condition(k)}


ZERO, PROJ, HINT = (
    "control_model.zero_convs.5.0.bias",
    "control_model.input_blocks.4.1.proj_in.weight",
    "control_model.input_hint_block.block.5.weight",
)


ZERO, PROJ, HINT = (
    "control_model.zero_convs.5.0.bias",
    "control_model.input_blocks.4.1.proj_in.weight",
    "control_model.input_hint_block.block.5.weight",
)
EXTRA = "control_model.label_emb.0.0.weight"
BAD_STATES = {
    "missing": (lambda s: keep(s, lambda k: k not in (ZERO, PROJ)), rf"missing .*{ZERO}.*"),
    "many missing": (
        lambda s: keep(s, lambda k: ".attn1." not in k),
        r"missing (control_model\S+, ){7}control_model\S+ and 27 more",
    ),
    "unexpected": (lambda s: {**s, EXTRA: torch.zeros(2, 2)}, f"unexpected {EXTRA}"),
    "misshapen": (
        lambda s: {**s, HINT: torch.zeros(64, HIDDEN, 3, 3)},
        r"misshapen .*block\.5\.weight \[64, 24, 3, 3\] instead of \[32, 24, 3, 3\]",
    ),
    "linear projections (SD 2)": (lambda s: {**s, PROJ: s[PROJ][:, :, 0, 0]}, rf"misshapen {PROJ} \[64, 64\] instead"),
    "no downsampler": (lambda s: keep(s, lambda k: "blocks.3.0.op" not in k), r"levels of \[5, 2, 2\] residual blocks"),
    "for images": (
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
    "settings": ([*ARGUMENTS, "--steps", "0"], "steps 0: expected at least 1"),
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
            FeatInvError, match=r"missing conv_in\.bias; unexpected down_blocks\.0\.resnets\.0\.odd\.weight"
        ):
            convert.main([str(tmp_path / "odd.safetensors"), str(tmp_path / out), "--to", to])
        assert not (tmp_path / out).exists()
