"""The frozen diffusion model that a ControlNet steers, from local files of any common layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn

from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.files import HUB, is_in_8_bits, read_weights
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.worlds import find_world

from . import stable_diffusion

#: unet, vae, scheduler, text embeddings
Loaded = tuple[UNet2DConditionModel, AutoencoderKL | PatchAutoencoder, DDIMScheduler, dict[str, Tensor]]


@dataclass
class BaseModel:
    """A frozen latent diffusion model in diffusers' classes.

    text: prompt -> embedding [1, T, D], with "" for the empty prompt.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL | PatchAutoencoder
    scheduler: DDIMScheduler
    text: dict[str, Tensor]

    @property
    def latent_size(self) -> int:
        """Side of the latents the base model was trained at."""
        return self.unet.config.sample_size

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        patches = isinstance(self.vae, PatchAutoencoder)
        return self.vae.patch if patches else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the base model was trained at."""
        return self.latent_size * self.downscale

    def describe(self) -> dict:
        """What a weights file records to recognise a base model that fits."""
        c = self.unet.config
        heads = c.num_attention_heads or c.attention_head_dim  # diffusers' older name for the same number
        return {
            "name": self.name,
            "width": c.block_out_channels[0],
            "context": c.cross_attention_dim,
            "latent_channels": c.in_channels,
            "heads": heads,
        }

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, h, w] in 0..1 -> scaled latents: the mean of the autoencoder's posterior."""
        x = pictures * 2 - 1
        if isinstance(self.vae, PatchAutoencoder):
            return self.vae.encode(x)
        return self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, h, w] in 0..1."""
        if isinstance(self.vae, PatchAutoencoder):
            x = self.vae.decode(latents)
        else:
            x = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BaseModel:
        self.unet.to(device, dtype, memory_format=torch.channels_last)
        self.vae.to(device, dtype, memory_format=torch.channels_last)
        self.text = {prompt: value.to(device, dtype) for prompt, value in self.text.items()}
        return self


def load_base(path: str | Path, prompt: str) -> BaseModel:
    """Reads a base model from local files; the network is never asked.

    path: an embedded world's base model, by its name; a diffusers folder (unet/, vae/, scheduler/ and either
    text_encoder/ and tokenizer/ or prompts.safetensors, which holds an embedding per prompt); a single .safetensors or
    .ckpt file of Stable Diffusion 1.x; or a repository in the hub's cache, owner/name, or owner/name/FILE for a single
    file. The text encoder is used once and let go. Raises FeatInvError for what is none of these, lacks a part, or is
    another architecture.
    """
    if str(path).endswith((".safetensors", ".ckpt")):
        unet, vae, scheduler, text = _from_file(Path(path), prompt)
    else:
        unet, vae, scheduler, text = _from_folder(
            world.base_folder if (world := find_world(str(path))) else _folder(str(path)), prompt
        )
    c = unet.config
    if (
        c.addition_embed_type
        or c.class_embed_type
        or c.in_channels != c.out_channels
        or text[prompt].shape[2] != c.cross_attention_dim
    ):
        raise FeatInvError(
            f"base model {path} is not of the kind of Stable Diffusion 1.x: first width {c.block_out_channels[0]},"
            f" context {c.cross_attention_dim}, text embeddings {text[prompt].shape[2]}, {c.in_channels} channels in,"
            f" {c.out_channels} out; expected one text encoder and no further input"
        )
    for module in (unet, vae):
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return BaseModel(str(path), unet, vae, scheduler, text)


def _folder(path: str) -> Path:
    """A diffusers folder, or the snapshot of owner/name in the hub's cache."""
    if not Path(path).is_dir() and path.count("/") == 1 and not path.startswith((".", "/")):
        try:
            return Path(snapshot_download(path, local_files_only=True))
        except OSError:
            pass
    if not Path(path).is_dir():
        raise FeatInvError(
            f"there is no base model {path!r}: no folder, no file, not in the hub's cache; python3 run.py download"
            f" CONFIG fetches a configuration's, see {HUB}/{path}"
        )
    return Path(path)


def _from_folder(folder: Path, prompt: str) -> Loaded:
    file = folder / "prompts.safetensors"
    texts = () if file.is_file() else ("text_encoder", "tokenizer")
    missing = [part for part in ("unet", "vae", "scheduler", *texts) if not (folder / part).is_dir()]
    if missing:
        raise FeatInvError(
            f"base model {folder}: no folder {', '.join(missing)}; expected a diffusers folder, as python3 run.py"
            " download CONFIG fetches it"
        )
    unet = _load_unet(folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(
        folder / "scheduler", timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    if file.is_file():
        text = {name: value.float() for name, value in load_file(file).items()}
        if prompt not in text:
            raise FeatInvError(f"{file} has no embedding of the prompt {prompt!r}; it has {sorted(text)}")
    else:
        from transformers import CLIPTextModel, CLIPTokenizer

        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
        text = _embeddings(encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer"), prompt)
    return unet, load_vae(folder / "vae"), scheduler, text


def _load_unet(folder: Path) -> UNet2DConditionModel:
    """diffusers' own reader, or for 8 bits, which it does not know, ours."""
    file = folder / "diffusion_pytorch_model.safetensors"
    if not file.is_file() or not is_in_8_bits(file):
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    unet.load_state_dict(read_weights(file))
    return unet


def _from_file(file: Path, prompt: str) -> Loaded:
    if not file.is_file() and len(file.parts) == 3 and not file.is_absolute():
        cached = try_to_load_from_cache("/".join(file.parts[:2]), file.parts[2])
        file = Path(cached) if isinstance(cached, str) else file
    if not file.is_file():
        raise FeatInvError(
            f"base model {file} does not exist; python3 run.py download CONFIG --base OWNER/NAME/FILE fetches one"
        )
    unet, vae, scheduler, encoder = stable_diffusion.load_single_file(file)
    return unet, vae, scheduler, _embeddings(encoder, stable_diffusion.Tokens(), prompt)


@torch.inference_mode()
def _embeddings(encoder: nn.Module, tokenizer: Callable, prompt: str) -> dict[str, Tensor]:
    """Last hidden states [1, 77, D] of the empty text and the prompt."""
    tokens = tokenizer(["", prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty, prompted = encoder(tokens)[0].clone().split(1)
    return {"": empty, prompt: prompted}


def load_vae(folder: Path) -> AutoencoderKL | PatchAutoencoder:
    """The autoencoder of a base model folder, by its config.json."""
    if json.loads((folder / "config.json").read_text())["_class_name"] != "PatchAutoencoder":
        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    return PatchAutoencoder.load(folder)
