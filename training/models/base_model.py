"""The frozen diffusion model that a ControlNet steers, from local files of any common layout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download, try_to_load_from_cache
from torch import Tensor

from featinv_nodes.core.digests import digest
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import HUB, require_finite
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.worlds import find_world

from . import parts, stable_diffusion
from .channels_last import move

#: names of single files of Stable Diffusion
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
#: owner/name of a repository, and of a file in it
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

#: unet, vae, scheduler, text embeddings
Loaded = tuple[UNet2DConditionModel, AutoencoderKL | PatchAutoencoder, DDIMScheduler, dict[str, Tensor]]


@dataclass
class BaseModel:
    """A frozen latent diffusion model in diffusers' classes.

    text: prompt -> embedding [1, T, D], with "" for the empty prompt. weights: digest of the U-Net's weights as they
    were opened, empty where it is not known.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL | PatchAutoencoder
    scheduler: DDIMScheduler
    text: dict[str, Tensor]
    weights: str = ""

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
        return {
            "name": self.name,
            "width": c.block_out_channels[0],
            "context": c.cross_attention_dim,
            "latent_channels": c.in_channels,
            "heads": c.attention_head_dim,  # what diffusers' U-Net calls their number
            "latent_size": self.latent_size,
            "resolution": self.resolution,
            **({"weights": self.weights} if self.weights else {}),
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

    def to(self, device: torch.device | str) -> BaseModel:
        """Moves U-Net, autoencoder and embeddings, and returns itself, as nn.Module.to does."""
        move(self.unet, device)
        move(self.vae, device)
        self.text = {prompt: value.to(device) for prompt, value in self.text.items()}
        return self


def load_base(path: str | Path, prompt: str) -> BaseModel:
    """Reads a base model from local files; nothing is downloaded.

    path: an embedded world's base model, by its name; a diffusers folder (unet/, vae/, scheduler/ and either
    text_encoder/ and tokenizer/ or prompts.safetensors, which holds an embedding per prompt), in any variant; a single
    file of Stable Diffusion 1.x, by SUFFIXES; or a repository in the hub's cache, owner/name, or owner/name/FILE for a
    single file. The text encoder is used once and let go. Raises FeatInvError for what is none of these, lacks a part
    or a tensor, has values that are not finite, is another architecture, or predicts neither noise nor velocity.
    """
    world = find_world(str(path))
    found = world.base_folder if world else find_base(str(path))
    unet, vae, scheduler, text = (_from_folder if found.is_dir() else _from_file)(found, prompt)
    c, latent_channels = unet.config, vae.config.latent_channels if isinstance(vae, AutoencoderKL) else vae.latents
    if (
        c.in_channels != c.out_channels
        or c.in_channels != latent_channels
        or text[prompt].shape[2] != c.cross_attention_dim
    ):
        raise FeatInvError(
            f"base model {path} is not of the kind of Stable Diffusion 1.x: first width {c.block_out_channels[0]},"
            f" context {c.cross_attention_dim}, text embeddings {text[prompt].shape[2]}, {c.in_channels} channels in,"
            f" {c.out_channels} out, {latent_channels} in the latents; expected one text encoder and no further input"
        )
    if not isinstance(c.sample_size, int):
        raise FeatInvError(f"base model {path} has sample_size {c.sample_size}; expected the side of its latents")
    for module in (unet, vae):
        require_finite(module.state_dict(), f"base model {path}, {type(module).__name__},")
    require_finite({f"the embedding of {words!r}": value for words, value in text.items()}, f"base model {path}")
    for module in (unet, vae):
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return BaseModel(str(path), unet, vae, scheduler, text, digest(unet))


def find_base(path: str) -> Path:
    """The folder or file that a path or a name in the hub's cache means. Raises FeatInvError if there is none."""
    there = Path(path).expanduser()
    if there.is_dir():
        return there
    if there.is_file():
        if there.suffix.lower() not in SUFFIXES:
            raise FeatInvError(
                f"base model {path} is a file of an unknown kind; expected a diffusers folder, or a file of Stable"
                f" Diffusion 1.x whose name ends in {', '.join(SUFFIXES)}"
            )
        return there
    is_file = there.suffix.lower() in SUFFIXES
    repository, file = _split(path)
    if REPOSITORY.fullmatch(repository) and (is_file or not file):
        if cached := _cached(repository, file):
            return cached
        fetch = f" or in the hub's cache; {HUB}/{repository} has it if the name is right, and python3 run.py download"
        fetch += f" CONFIG --base {path}" if is_file else " CONFIG fetches a configuration's"
    else:
        fetch = "; python3 run.py download CONFIG fetches a configuration's base model"
    kind = "file" if is_file else "folder or file"
    raise FeatInvError(f"base model {path} does not exist: there is no such {kind}{fetch}")


def _split(path: str) -> tuple[str, str]:
    """owner/name/FILE -> (owner/name, FILE)."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    return f"{owner}/{name}", file


def _cached(repository: str, file: str) -> Path | None:
    """A file of a repository in the hub's cache, or the whole of it for no file; None where it is not there."""
    if file:
        cached = try_to_load_from_cache(repository, file)
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a repository
        return None


def _from_folder(folder: Path, prompt: str) -> Loaded:
    file = folder / "prompts.safetensors"
    texts = () if file.is_file() else ("text_encoder", "tokenizer")
    missing = [part for part in ("unet", "vae", "scheduler", *texts) if not (folder / part).is_dir()]
    if missing:
        index = parts.read_config(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
        kind = f" of the pipeline {index['_class_name']}" if "_class_name" in index else ""
        other = (folder / "transformer").is_dir()
        raise FeatInvError(
            f"base model {folder}{kind}: no folder {', '.join(missing)}; expected a diffusers folder of Stable"
            " Diffusion 1.x, as python3 run.py download CONFIG fetches it"
            f"{f'. {parts.ELSEWHERE}' if other else ''}"
        )
    scheduler = parts.load_scheduler(folder / "scheduler")
    if file.is_file():
        text = parts.load_prompts(file, prompt)
    else:
        encoder = parts.load_text_encoder(folder / "text_encoder")
        tokenizer = parts.load_tokenizer(folder / "tokenizer", encoder.config.vocab_size)
        text = parts.embeddings(encoder, tokenizer, prompt)
    return parts.load_unet(folder / "unet"), parts.load_vae(folder / "vae"), scheduler, text


def _from_file(file: Path, prompt: str) -> Loaded:
    unet, vae, scheduler, encoder = stable_diffusion.load_single_file(file)
    return unet, vae, scheduler, parts.embeddings(encoder, stable_diffusion.Tokens(), prompt)
