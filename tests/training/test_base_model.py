"""A base model opens from every layout it comes in, to the same model, and says what is wrong with others."""

import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds.drawn import DRAWN
from training.models import stable_diffusion
from training.models.base_model import load_base
from training.models.stable_diffusion import KNOWN, PROMPT, Tokens, build_text_encoder, load_single_file
from training.worlds.base import PROMPT as TINY_PROMPT

SMALL_UNET = {
    **stable_diffusion.UNET,
    "sample_size": 8,
    "block_out_channels": (32, 32, 64, 64),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
SMALL_VAE = {**stable_diffusion.VAE, "block_out_channels": (32, 32, 64, 64), "sample_size": 64}
SMALL_CLIP = {
    **stable_diffusion.CLIP,
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BLOCKS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet_name(name: str) -> str:
    """diffusers' name of a UNet tensor -> the original one, for four levels of two blocks."""
    head, *rest = name.split(".")
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if head in fixed:
        return ".".join([fixed[head], *rest])
    if head == "time_embedding":
        return f"time_embed.{ {'linear_1': 0, 'linear_2': 2}[rest[0]] }.{rest[1]}"
    kind, tail = (rest[1], rest[2:]) if head != "mid_block" else (rest[0], rest[1:])
    place = int(tail[0])
    if head == "mid_block":
        block = f"middle_block.{1 if kind == 'attentions' else 2 * place}"
    elif head == "down_blocks":
        first = 1 + 3 * int(rest[0])
        block = (
            f"input_blocks.{first + 2}.0.op"
            if kind == "downsamplers"
            else f"input_blocks.{first + place}.{int(kind == 'attentions')}"
        )
    else:
        last = 3 * int(rest[0]) + 2
        attends = int(rest[0]) > 0
        block = (
            f"output_blocks.{last}.{1 + attends}.conv"
            if kind == "upsamplers"
            else f"output_blocks.{last - 2 + place}.{int(kind == 'attentions')}"
        )
    inner = tail[1:]
    if kind.endswith("samplers"):
        return f"{block}.{inner[-1]}"
    if kind == "resnets":
        inner = [BLOCKS[inner[0]], *inner[1:]]
    return ".".join([block, *inner])


def ldm_vae_name(name: str) -> str:
    """The same for the autoencoder."""
    name = (
        name.replace("mid_block.attentions.0.", "mid.attn_1.")
        .replace("mid_block.resnets.0", "mid.block_1")
        .replace("mid_block.resnets.1", "mid.block_2")
    )
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"mid.attn_1.{new}.", f"mid.attn_1.{old}.")
    parts = name.split(".")
    if parts[1] == "down_blocks":
        return ".".join(
            [
                "encoder.down",
                parts[2],
                *(["downsample", *parts[5:]] if parts[3] == "downsamplers" else ["block", *parts[4:]]),
            ]
        ).replace("conv_shortcut", "nin_shortcut")
    if parts[1] == "up_blocks":
        level = str(3 - int(parts[2]))
        return ".".join(
            ["decoder.up", level, *(["upsample", *parts[5:]] if parts[3] == "upsamplers" else ["block", *parts[4:]])]
        ).replace("conv_shortcut", "nin_shortcut")
    return name.replace("conv_norm_out", "norm_out")


@pytest.fixture(scope="module")
def small():
    """Stable Diffusion's topology at small widths."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"UNET": SMALL_UNET, "VAE": SMALL_VAE, "CLIP": SMALL_CLIP}.items():
            patch.setattr(stable_diffusion, name, value)
        yield


@pytest.fixture(scope="module")
def parts(small):
    torch.manual_seed(0)
    unet, vae, text = UNet2DConditionModel(**SMALL_UNET), AutoencoderKL(**SMALL_VAE), build_text_encoder()
    return unet, vae, text


@pytest.fixture(scope="module")
def state(parts):
    """The same tensors under a single file's names."""
    unet, vae, text = parts
    result = {"model.diffusion_model." + ldm_unet_name(k): v for k, v in unet.state_dict().items()}
    for k, v in vae.state_dict().items():
        attention = "attentions" in k and k.endswith("weight") and v.ndim == 2
        result["first_stage_model." + ldm_vae_name(k)] = v[:, :, None, None] if attention else v
    for k, v in text.state_dict().items():
        result["cond_stage_model.transformer." + (k if k.startswith("text_model.") else f"text_model.{k}")] = v
    result["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {k: v.contiguous() for k, v in result.items()}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_is_the_same_model(parts, state, tmp_path, suffix):
    file = tmp_path / f"sd.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state, "global_step": 1}, file)
    else:
        save_file(state, file)
    result = load_single_file(file)
    for module, again in zip(parts, (result[0], result[1], result[3])):
        want, have = module.state_dict(), again.state_dict()
        assert want.keys() == have.keys() and all(torch.equal(want[k], have[k]) for k in want)
    alphas = stable_diffusion.DDIMScheduler(**stable_diffusion.SCHEDULE).alphas_cumprod
    if suffix == "safetensors":  # published files have their schedule too, some in half precision
        save_file(state | {"alphas_cumprod": alphas.half()}, file)
    base = load_base(file, PROMPT)
    assert {p: tuple(e.shape) for p, e in base.text.items()} == {"": (1, 77, 16), PROMPT: (1, 77, 16)}
    assert base.scheduler.config.prediction_type == "epsilon" and base.resolution == 64


def test_the_known_prompts_need_no_tokenizer():
    ids = Tokens()(["", PROMPT]).input_ids
    assert ids.shape == (2, 77) and ids[0, 0] == 49406 and (ids[0, 1:] == 49407).all()
    assert ids[1, 1:11].tolist() == KNOWN[PROMPT] and (ids[1, 11:] == 49407).all()
    with pytest.raises(FeatInvError, match="not in the hub's cache"):
        Tokens()(["a cat"])


def test_a_repository_in_the_hubs_cache_is_opened_by_its_name(tmp_path, monkeypatch):
    commit, folder = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--nobody--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(DRAWN.base_folder, folder / "snapshots" / commit)
    monkeypatch.setattr(
        "training.models.base_model.snapshot_download", partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    )
    result, expected = load_base("nobody/tiny", TINY_PROMPT), load_base("tiny", TINY_PROMPT)
    assert result.name == "nobody/tiny" and torch.equal(result.unet.conv_in.weight, expected.unet.conv_in.weight)


def test_a_single_file_in_the_hubs_cache(state, tmp_path, monkeypatch):
    commit, folder = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--nobody--sd"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    save_file(state, folder / "snapshots" / commit / "sd.safetensors")
    monkeypatch.setattr(
        "training.models.base_model.try_to_load_from_cache",
        partial(huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path),
    )
    assert load_base("nobody/sd/sd.safetensors", PROMPT).name == "nobody/sd/sd.safetensors"
    with pytest.raises(FeatInvError, match="does not exist"):
        load_base("nobody/sd/other.safetensors", PROMPT)


class Foreign:
    """Something that a pickle must not make."""


def test_what_is_not_a_base_model(state, tmp_path):
    other = {k: (torch.zeros(16, 4, 3, 3) if k.endswith("input_blocks.0.0.weight") else v) for k, v in state.items()}
    save_file(other, tmp_path / "other.safetensors")
    save_file({k: v for k, v in state.items() if "middle_block" not in k}, tmp_path / "part.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "part.safetensors").read_bytes()[:5000])
    torch.save({"state_dict": state, "callbacks": Foreign()}, tmp_path / "foreign.ckpt")
    (tmp_path / "empty.ckpt").touch()
    save_file(state | {"v_pred": torch.zeros(1)}, tmp_path / "velocity.safetensors")
    save_file(state | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, tmp_path / "schedule.safetensors")
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, message in {
        "other.safetensors": "not Stable Diffusion 1.x: first width 16",
        "part.safetensors": "lacks .* tensors of the UNet",
        "cut.safetensors": "not a complete",
        "foreign.ckpt": "foreign code",
        "empty.ckpt": "not a complete",
        "none.ckpt": "does not exist",
        "velocity.safetensors": "something else than noise .*v_pred",
        "schedule.safetensors": "another noise schedule",
        "pointer.ckpt": "Git LFS pointer",
    }.items():
        with pytest.raises(FeatInvError, match=message):
            load_base(tmp_path / name, PROMPT)
    for name in ("nowhere", "nobody/nothing"):
        with pytest.raises(FeatInvError, match="run.py download"):
            load_base(name, PROMPT)


def test_a_unet_with_another_text_width_is_refused(parts, tmp_path):
    unet, vae, _ = parts
    for name, part in {"unet": unet, "vae": vae}.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "scheduler").mkdir()
    stable_diffusion.DDIMScheduler(**stable_diffusion.SCHEDULE).save_pretrained(tmp_path / "scheduler")
    save_file({"p": torch.zeros(1, 77, 12), "": torch.zeros(1, 77, 12)}, tmp_path / "prompts.safetensors")
    with pytest.raises(FeatInvError, match="first width 32, context 16, text embeddings 12"):
        load_base(tmp_path, "p")
