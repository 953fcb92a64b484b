"""The parts of a diffusers folder: each is read whole, as the class that its configuration names, or refused in a line.

diffusers and transformers fill tensors that a file lacks at random and say so in a warning; here that is an error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from featinv_nodes.core.errors import FeatInvError, some_of
from featinv_nodes.core.files import is_in_8_bits, opened, read_weights
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.prediction import PREDICTIONS

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

#: weights files in order of preference: those of the moving average before others, of more bits before fewer
VARIANTS = ("", "fp32", "ema", "fp16", "bf16", "non_ema")
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<legacy>\w+))?"
    r"\.(?P<kind>safetensors|bin)"
)
#: Schedulers of diffusers for a model of noise or velocity on a schedule by betas. Which of them draws does not matter
#: here; flow matching and EDM's preconditioning have others.
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
#: fields of a U-Net's configuration that ask for an input besides latents, timestep and text
FURTHER_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)
#: where kinds of models that the programs do not open are of use
ELSEWHERE = "ComfyUI's node Feature Guidance Sampler inverts features with SDXL, SD 3, Flux and their like"
LFS = b"version https://git-lfs"


class WeightsFile(NamedTuple):
    """What to read of a part: the variant as diffusers names it ("" for none), "safetensors" or "bin", the files."""

    variant: str
    kind: str
    files: list[Path]


@contextmanager
def told_in_a_line(what: str) -> Iterator[None]:
    """Turns any exception of a library's reader into a FeatInvError of one line, and suppresses its output."""
    loggers, bars = (diffusers.utils.logging, transformers.utils.logging), transformers.utils.logging
    verbosity, has_bar = [logger.get_verbosity() for logger in loggers], bars.is_progress_bar_enabled()
    for logger in loggers:
        logger.set_verbosity(logging.CRITICAL)
    bars.disable_progress_bar()
    try:
        yield
    except FeatInvError:
        raise
    except Exception as error:  # readers raise whatever they stumble over
        reason = " ".join(str(error).split())[:300]
        raise FeatInvError(f"{what} cannot be opened ({type(error).__name__}: {reason})") from error
    finally:
        for logger, level in zip(loggers, verbosity):
            logger.set_verbosity(level)
        if has_bar:
            bars.enable_progress_bar()


def require_whole(file: Path) -> None:
    """Raises FeatInvError for a weights file that is a Git LFS pointer or cut off."""
    with file.open("rb") as handle:
        if handle.read(len(LFS)) == LFS:
            raise FeatInvError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull there, or download it")
    if file.suffix == ".safetensors":
        with opened(file):
            pass


def read_config(folder: Path, name: str = "config.json") -> dict:
    """A part's configuration. Raises FeatInvError if there is none, or it is no JSON object."""
    file = folder / name
    if not file.is_file():
        raise FeatInvError(f"{file} is missing; expected a part of a diffusers folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatInvError(f"{file} is no JSON that can be read: {error}") from error
    if not isinstance(config, dict):
        raise FeatInvError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    return config


def find_weights(folder: Path) -> WeightsFile:
    """The weights to read of a part's folder, by VARIANTS. Raises FeatInvError if there are none, or one is damaged."""
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := WEIGHTS.fullmatch(file.name):
            variant = match["variant"] or match["legacy"] or ""
            found.setdefault((variant, match["kind"]), []).append(file)
    if not found:
        raise FeatInvError(f"{folder} holds no weights; expected a .safetensors file, as diffusers names it, or .bin")
    ranks = {variant: rank for rank, variant in enumerate(VARIANTS)}
    variant, kind = min(found, key=lambda key: (ranks.get(key[0], len(ranks)), key[1] == "bin", key[0]))
    for file in found[variant, kind]:
        require_whole(file)
    return WeightsFile(variant, kind, found[variant, kind])


def load_part(kind: type, folder: Path, **options: bool) -> nn.Module:
    """A part by from_pretrained of its class, in float32 on the CPU. options: of from_pretrained. Raises FeatInvError
    for weights that are missing, damaged, or not exactly those of the class."""
    weights = find_weights(folder)
    with told_in_a_line(str(folder)):
        module, info = kind.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            variant=weights.variant or None,
            use_safetensors=weights.kind == "safetensors",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "misshapen": "mismatched_keys"}
    names = {name: [k if isinstance(k, str) else k[0] for k in info.get(key) or ()] for name, key in kinds.items()}
    wrong = {name: sorted(keys) for name, keys in names.items()}
    require_no_misfits(str(folder), wrong)
    return module


def require_no_misfits(what: str, wrong: dict[str, list[str]]) -> None:
    """Raises FeatInvError that names some tensors of each kind, where there are any."""
    texts = [f"{name} {some_of(keys, 4)}" for name, keys in wrong.items() if keys]
    if texts:
        raise FeatInvError(
            f"{what}: the weights are not those of its configuration: {'; '.join(texts)}; download or copy them again"
        )


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The U-Net of a base model's folder, from 8 bits too, which diffusers does not know. Raises FeatInvError for
    another class, for one that reads more than latents, timestep and text, and as load_part does."""
    config = _config_of(folder, "U-Net", ("UNet2DConditionModel",))
    if further := [name for name in FURTHER_INPUTS if config.get(name)]:
        sdxl = config.get("addition_embed_type") == "text_time"
        raise FeatInvError(
            f"{folder} reads more than latents, timestep and text ({', '.join(further)}), which is not of the kind of"
            f" Stable Diffusion 1.x{f'. {ELSEWHERE}' if sdxl else ''}"
        )
    weights = find_weights(folder)
    if weights.kind == "bin" or not is_in_8_bits(weights.files[0]):
        return load_part(UNet2DConditionModel, folder)
    with told_in_a_line(str(folder)):
        unet = UNet2DConditionModel.from_config(config)
        unet.load_state_dict(read_weights(weights.files[0]))
    return unet


def load_vae(folder: Path) -> AutoencoderKL | PatchAutoencoder:
    """The autoencoder of a base model's folder. Raises FeatInvError for another class, and as load_part does."""
    config = _config_of(folder, "autoencoder", ("AutoencoderKL", "PatchAutoencoder"))
    if config["_class_name"] == "PatchAutoencoder":
        with told_in_a_line(str(folder)):
            return PatchAutoencoder.load(folder)
    if shifts := [name for name in ("shift_factor", "latents_mean", "latents_std") if config.get(name)]:
        raise FeatInvError(f"{folder} shifts its latents ({', '.join(shifts)}); expected a scaling_factor alone")
    return load_part(AutoencoderKL, folder)


def load_small_decoder(folder: Path) -> AutoencoderTiny:
    """A small autoencoder, such as TAESD, in place of a base model's. Raises FeatInvError for another class, and as
    load_part does."""
    _config_of(folder, "small decoder", ("AutoencoderTiny",))
    return load_part(AutoencoderTiny, folder)


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """CLIP's text model. Raises FeatInvError for another class, and as load_part does."""
    from transformers import CLIPTextModel

    named = read_config(folder).get("architectures") or ["CLIPTextModel"]
    if named != ["CLIPTextModel"]:
        raise FeatInvError(f"{folder} is a {', '.join(map(str, named))}; expected a CLIPTextModel")
    return load_part(CLIPTextModel, folder, ignore_mismatched_sizes=True)  # or it would not name them


def load_tokenizer(folder: Path, known: int) -> CLIPTokenizer:
    """CLIP's tokenizer. known: tokens of its text encoder. Raises FeatInvError for one without a vocabulary, with
    which transformers would go on and read every text as the same."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise FeatInvError(f"{folder / name} is missing: a tokenizer needs its vocabulary")
    with told_in_a_line(str(folder)):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        size = len(tokenizer.get_vocab())
    if not known / 2 <= size <= known:
        raise FeatInvError(f"{folder} has a vocabulary of {size} tokens, its text encoder one of {known}")
    return tokenizer


def load_scheduler(folder: Path) -> DDIMScheduler:
    """The scheduler of a base model's folder, for our sampling. Raises FeatInvError, which names it, for other
    predictions than noise or velocity and other schedules than betas."""
    file, config = folder / "scheduler_config.json", read_config(folder, "scheduler_config.json")
    name, predicts = config.get("_class_name", "DDIMScheduler"), config.get("prediction_type", PREDICTIONS[0])
    if name not in SCHEDULERS or config.get("use_flow_sigmas"):
        flow = " with flow sigmas" if config.get("use_flow_sigmas") else ""
        raise FeatInvError(
            f"{file}: the base model's scheduler is {name}{flow}; expected noise or velocity prediction on a schedule"
            " of betas, as with DDIMScheduler"
        )
    if predicts not in PREDICTIONS:
        raise FeatInvError(
            f"{file}: the base model has prediction_type {predicts!r}; expected {' or '.join(PREDICTIONS)}"
        )
    if predicts == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise FeatInvError(f"{file}: rescale_betas_zero_snr needs the prediction_type v_prediction, not epsilon")
    with told_in_a_line(str(file)):
        return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)


def load_prompts(file: Path, prompt: str) -> dict[str, Tensor]:
    """Embeddings [1, T, D] by their prompts, from a file that stands in for a text encoder. Raises FeatInvError for a
    damaged file, one without the empty prompt or this one, and embeddings of another or different shapes."""
    require_whole(file)
    text = {name: value.float() for name, value in load_file(file).items()}
    if missing := [name for name in ("", prompt) if name not in text]:
        raise FeatInvError(
            f"{file} has no embedding of the prompt {' and '.join(map(repr, missing))}; it has {sorted(text)}"
        )
    shapes = {name: tuple(text[name].shape) for name in ("", prompt)}
    if len(shapes[""]) != 3 or shapes[""][0] != 1 or len(set(shapes.values())) > 1:
        raise FeatInvError(f"{file}: the embeddings have the shapes {shapes}; expected the same [1, T, D] of each")
    return text


@torch.inference_mode()
def embeddings(encoder: nn.Module, tokenizer: Callable, prompt: str) -> dict[str, Tensor]:
    """Last hidden states [1, 77, D] of the empty text and the prompt."""
    tokens = tokenizer(["", prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty, prompted = encoder(tokens)[0].clone().split(1)
    return {"": empty, prompt: prompted}


def _config_of(folder: Path, part: str, known: tuple[str, ...]) -> dict:
    config = read_config(folder)
    if (name := config.get("_class_name")) not in known:
        raise FeatInvError(f"the {part} in {folder} is a {name}; expected {' or '.join(known)}")
    return config
