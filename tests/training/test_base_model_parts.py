"""A diffusers folder opens in any variant; one that is damaged or of another kind is refused in a line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_nodes.core.errors import FeatInvError
from training import reconstruct
from training.cli import run
from training.models.base_model import load_base

PROMPT = "a b"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Stable Diffusion's folder with few and narrow blocks, at random weights."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    UNet2DConditionModel(**SMALL).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(folder / "vae")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **sizes, **ends)).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[1], "pad_token": words[1]}
    (folder / "tokenizer/tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special})
    )
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "base"))


def change(file, **values):
    """Sets fields of a JSON file; None takes one out."""
    fields = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def refused(folder, *words):
    with pytest.raises(FeatInvError) as error:
        load_base(folder, PROMPT)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "scheduler, predicts",
    [
        (DDPMScheduler(**SCHEDULE, prediction_type="sample"), "sample"),
        (UniPCMultistepScheduler(**SCHEDULE, prediction_type="flow_prediction", use_flow_sigmas=True), "flow sigmas"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
        (EDMEulerScheduler(), "EDMEulerScheduler"),
        (DDIMScheduler(**SCHEDULE, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (DDIMScheduler(**SCHEDULE | {"beta_schedule": "linear"}), None),
        (EulerDiscreteScheduler(**SCHEDULE, prediction_type="v_prediction"), None),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (str, type(None))) else value,
)
def test_only_noise_and_velocity_on_a_known_schedule_are_accepted(folder, scheduler, predicts):
    scheduler.save_pretrained(folder / "scheduler")
    if predicts:
        refused(folder, "scheduler_config.json", predicts)
        return
    own = load_base(folder, PROMPT).scheduler
    assert own.config.prediction_type == scheduler.config.prediction_type
    assert torch.allclose(own.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("part", FILES)
def test_weights_that_are_not_finite_are_refused(folder, part):
    file = folder / part / FILES[part]
    state = load_file(file)
    name = sorted(state)[3]
    save_file(state | {name: state[name] * torch.nan}, file, {"format": "pt"})
    refused(folder, "NaN or infinite values", "embedding of" if part == "text_encoder" else name)


def test_an_older_folder_that_states_no_prediction_predicts_noise(folder):
    change(folder / "scheduler/scheduler_config.json", prediction_type=None, _class_name="PNDMScheduler")
    assert load_base(folder, PROMPT).scheduler.config.prediction_type == "epsilon"


def test_an_unknown_schedule_is_named(folder):
    change(folder / "scheduler/scheduler_config.json", beta_schedule="my_own")
    refused(folder, "scheduler_config.json", "my_own")


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_a_folder_with_one_variant_alone_opens(whole, folder, variant, kind):
    expected = load_base(whole, PROMPT)
    for part, name in FILES.items():
        file = folder / part / name
        state = {key: value.half() for key, value in load_file(file).items()}
        file.unlink()
        if kind == "safetensors":
            save_file(state, file.with_name(name.replace(".", f".{variant}.")), {"format": "pt"})
        elif kind == "bin":
            stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
            torch.save(state, file.with_name(f"{stem}.{variant}.bin"))
        else:
            model = CLIPTextModel if part == "text_encoder" else {"unet": UNet2DConditionModel}.get(part, AutoencoderKL)
            model = model.from_pretrained(whole / part, torch_dtype=torch.float16)
            model.save_pretrained(folder / part, variant=variant, max_shard_size="100KB")
    base = load_base(folder, PROMPT)
    assert base.unet.dtype == torch.float32 == base.vae.dtype
    for own, other in ((base.unet, expected.unet), (base.vae, expected.vae)):
        for value, whole_value in zip(own.state_dict().values(), other.state_dict().values()):
            assert torch.equal(value, whole_value.half().float())
    assert torch.allclose(base.text[PROMPT], expected.text[PROMPT], atol=1e-2)  # of a rounded encoder


def test_the_moving_average_in_all_bits_goes_before_other_variants(folder):
    for part, name in FILES.items():
        state = {key: torch.zeros_like(value) for key, value in load_file(folder / part / name).items()}
        for variant in ("fp16", "non_ema"):
            save_file(state, folder / part / name.replace(".", f".{variant}."), {"format": "pt"})
    assert load_base(folder, PROMPT).unet.conv_in.weight.any()


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("damage", ["missing file", "cut off", "pointer", "missing tensor", "further tensor", "shape"])
def test_damaged_weights_are_named_and_nothing_is_left_at_random(folder, part, damage):
    file = folder / part / FILES[part]
    state = load_file(file)
    some = sorted(state)[3]
    if damage == "missing file":
        file.unlink()
        return refused(folder, part, "holds no weights")
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
        return refused(folder, str(file), "download or copy it again")
    if damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        return refused(folder, str(file), "Git LFS pointer", "git lfs pull")
    if damage == "missing tensor":
        state.pop(some)
    elif damage == "further tensor":
        state["another.weight"] = torch.zeros(2)
    else:
        state[some] = torch.zeros(7, 5)
    save_file(state, file, {"format": "pt"})
    refused(folder, part, {"further tensor": "another.weight"}.get(damage, some.removeprefix("text_model.")))


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
def test_a_missing_or_broken_configuration_is_named(folder, file):
    (folder / file).write_text("{")
    refused(folder, file, "no JSON")
    (folder / file).unlink()
    refused(folder, file, "is missing")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder, name):
    (folder / "tokenizer" / name).unlink()
    refused(folder, name, "vocabulary")


def test_a_vocabulary_of_another_text_encoder_is_refused(folder):
    words = json.loads((folder / "tokenizer/vocab.json").read_text())
    (folder / "tokenizer/vocab.json").write_text(json.dumps(words | {f"w{i}": 6 + i for i in range(9)}))
    refused(folder, "vocabulary of 15 tokens", "one of 6")


def test_parts_of_other_classes_are_refused_by_name(folder):
    change(folder / "text_encoder/config.json", architectures=["T5EncoderModel"])
    refused(folder, "text_encoder", "T5EncoderModel", "expected a CLIPTextModel")
    change(folder / "text_encoder/config.json", architectures=["CLIPTextModel"])
    VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=8).save_pretrained(folder / "vae")
    refused(folder, "autoencoder", "VQModel", "expected AutoencoderKL")
    change(folder / "unet/config.json", _class_name="UNet3DConditionModel")
    refused(folder, "U-Net", "UNet3DConditionModel", "expected UNet2DConditionModel")


def test_a_unet_with_further_inputs_and_latents_of_other_channels_are_refused(folder):
    change(folder / "unet/config.json", time_cond_proj_dim=16)
    refused(folder, "unet", "time_cond_proj_dim")
    change(folder / "unet/config.json", time_cond_proj_dim=None)
    AutoencoderKL(block_out_channels=(32,), latent_channels=8).save_pretrained(folder / "vae")
    refused(folder, "4 channels in", "8 in the latents")
    change(folder / "vae/config.json", shift_factor=0.1)
    refused(folder, "vae", "shift_factor")


def test_prompts_that_stand_in_for_a_text_encoder_are_checked(folder):
    file = folder / "prompts.safetensors"
    for texts, words in (
        ({PROMPT: torch.zeros(1, 5, 32)}, ["no embedding of the prompt ''"]),
        ({"": torch.zeros(1, 5, 32)}, [f"no embedding of the prompt '{PROMPT}'"]),
        ({"": torch.zeros(5, 32), PROMPT: torch.zeros(5, 32)}, ["(5, 32)", "expected the same [1, T, D]"]),
        ({"": torch.zeros(1, 4, 32), PROMPT: torch.zeros(1, 5, 32)}, ["(1, 4, 32)", "(1, 5, 32)"]),
    ):
        save_file(texts, file)
        refused(folder, str(file), *words)
    file.write_bytes(file.read_bytes()[:40])
    refused(folder, str(file), "not a complete safetensors file")


def test_another_pipeline_is_named(folder):
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refused(folder, "FluxPipeline", "no folder unet")


def test_what_exists_is_not_called_missing_and_no_address_is_made_up(folder, tmp_path):
    as_file = folder.rename(tmp_path / "sd.ckpt")  # a folder whose name looks like a file's
    assert load_base(as_file, PROMPT).resolution == 8
    odd = tmp_path / "sd.gguf"
    odd.write_bytes(b"GGUF")
    refused(odd, "file of an unknown kind", ".safetensors")
    upper = tmp_path / "SD.SAFETENSORS"
    save_file({"a": torch.zeros(1)}, upper)
    refused(upper, "not Stable Diffusion 1.x")
    for nowhere in (tmp_path / "none", tmp_path / "none.ckpt", "./no/where", "nobody", "a/b/c/d"):
        with pytest.raises(FeatInvError, match=r"does not exist(?!.*https:)"):
            load_base(nowhere, PROMPT)
    for name in ("nobody/nothing", "nobody/nothing/sd.ckpt"):
        with pytest.raises(FeatInvError, match=r"does not exist.*https://huggingface.co/nobody/nothing has it"):
            load_base(name, PROMPT)


def test_a_program_says_so_in_one_line(folder, capfd, monkeypatch):
    """Without what the libraries print in between."""
    state = load_file(folder / "text_encoder/model.safetensors")
    state.pop(sorted(state)[0])
    save_file(state, folder / "text_encoder/model.safetensors", {"format": "pt"})
    monkeypatch.setattr(
        sys, "argv", ["reconstruct.py", "--base", str(folder), "--image", "none.png", "--out", str(folder)]
    )
    with pytest.raises(SystemExit) as end:
        run(reconstruct.main)
    said = capfd.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and said[0].startswith("reconstruct.py: "), said
