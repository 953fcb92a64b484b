"""Stable Diffusion 1.x: its architecture, and single checkpoint files of it, as MiniSD (Pinkney 2023) is published."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn

from featinv_nodes.core import checkpoints
from featinv_nodes.core.errors import FeatInvError

from .parts import require_whole

UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
#: the paper's prompt, and CLIP's tokens for it without their frame
PROMPT = "a high-quality, detailed, and professional image"
KNOWN = {"": [], PROMPT: [320, 1400, 268, 3027, 267, 12609, 267, 537, 4774, 2867]}
TOKENIZER = "openai/clip-vit-large-patch14"
#: what ComfyUI reads off a single file that does not predict noise on SCHEDULE
OTHER_OBJECTIVES = ("v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max")
UNET_PREFIX, CLIP_PREFIX = "model.diffusion_model.", "cond_stage_model.transformer."


def build_text_encoder(**changes: int) -> nn.Module:
    """CLIP ViT-L/14's text model at random weights. changes: of CLIP's fields."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**CLIP | changes))


class Tokens:
    """CLIP's tokenizer where a single file brings none: the hub's cache has it, or the texts are KNOWN."""

    def __call__(self, texts: list[str], **kwargs) -> SimpleNamespace:
        """-> input_ids [N, 77]. Raises FeatInvError for an unknown text without a tokenizer."""
        if all(text in KNOWN for text in texts):
            start, end = CLIP["bos_token_id"], CLIP["eos_token_id"]
            rows = [[start, *KNOWN[text], end] for text in texts]
            return SimpleNamespace(
                input_ids=torch.tensor([row + [end] * (CLIP["max_position_embeddings"] - len(row)) for row in rows])
            )
        from transformers import CLIPTokenizer

        cached = try_to_load_from_cache(TOKENIZER, "vocab.json")  # transformers would go on without a vocabulary
        if not isinstance(cached, str):
            raise FeatInvError(
                f"a single file has no tokenizer, and {TOKENIZER} is not in the hub's cache; without it the prompt is"
                f" {PROMPT!r}"
            )
        return CLIPTokenizer.from_pretrained(Path(cached).parent)(texts, **kwargs)


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The state dict of a single-file checkpoint (.safetensors, .ckpt). A pickle is opened with weights_only=True.

    Raises FeatInvError for an unreadable file, for one that is not Stable Diffusion 1.x, and for another objective or
    noise schedule.
    """
    require_whole(file)
    state = load_file(file) if file.suffix.lower() == ".safetensors" else checkpoints.read_checkpoint(file)
    shapes = [
        tuple(state[UNET_PREFIX + key].shape) if UNET_PREFIX + key in state else None
        for key in ("input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    ]
    width, context = UNET["block_out_channels"][0], UNET["cross_attention_dim"]
    if shapes != [(width, UNET["in_channels"], 3, 3), (width, context)]:
        there = (shapes[0][0] if shapes[0] else "none", shapes[1][1] if shapes[1] else "none")
        raise FeatInvError(
            f"{file} is not Stable Diffusion 1.x: first width {there[0]}, context {there[1]}; expected {width} and"
            f" {context}, with 4 latent channels"
        )
    if marks := [name for name in OTHER_OBJECTIVES if name in state]:
        raise FeatInvError(
            f"{file} predicts something else than noise (it is marked {', '.join(marks)}); give a diffusers folder of"
            " it, whose scheduler says what"
        )
    own, schedule = state.get("alphas_cumprod"), DDIMScheduler(**SCHEDULE).alphas_cumprod
    if own is not None and (own.shape != schedule.shape or (own.float() - schedule).abs().max() > 1e-3):  # fp16 rounds
        raise FeatInvError(
            f"{file} has another noise schedule than Stable Diffusion 1.x; give a diffusers folder of it"
        )
    return state


def _filled(module: nn.Module, state: dict[str, Tensor], file: Path, part: str) -> nn.Module:
    expected = module.state_dict().keys()
    missing = sorted(expected - state.keys())
    if missing:
        raise FeatInvError(f"{file} lacks {len(missing)} tensors of the {part}, such as {', '.join(missing[:4])}")
    module.load_state_dict({k: state[k].float() for k in expected})
    return module


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_single_file(file: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, DDIMScheduler, nn.Module]:
    """(unet, vae, scheduler, text encoder) of a single-file checkpoint, float32 on the CPU. Raises FeatInvError."""
    state = read_checkpoint(file)
    unet, vae, text = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), build_text_encoder()
    _filled(unet, convert_ldm_unet_checkpoint(state, {**unet.config}), file, "UNet")
    _filled(vae, convert_ldm_vae_checkpoint(state, {**vae.config}), file, "autoencoder")
    own = _part(state, CLIP_PREFIX)
    plain = not any(k.startswith("text_model.") for k in text.state_dict())  # newer transformers dropped the prefix
    _filled(text, _part(own, "text_model.") if plain else own, file, "text encoder")
    return unet, vae, DDIMScheduler(**SCHEDULE), text
