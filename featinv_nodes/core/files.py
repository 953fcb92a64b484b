"""safetensors files with a JSON text about themselves in their metadata: weights, concepts, feature maps; and foreign
PyTorch checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .feature_map import FeatInvError

#: where files of models have their pages
HUB = "https://huggingface.co"


def write_safetensors(file: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(save(tensors, metadata))  # save_file would make a file that only its owner can read
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def read_about(file: str | Path, key: str, kind: str) -> dict:
    """The JSON under `key` in a file's metadata, without its tensors. kind: what such a file is called in messages.

    Raises FeatInvError for a missing, truncated or foreign file.
    """
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(key)
    except FileNotFoundError as error:
        raise FeatInvError(f"{kind} {file} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error
    if text is None:
        raise FeatInvError(f"{file} is no {kind}: its metadata has no entry {key!r}")
    return json.loads(text)


def read_metadata(file: str | Path) -> dict[str, str]:
    """All texts in the metadata of a file that read_about accepted."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def read_tensors(file: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file that read_about accepted, or those whose names begin with `prefix`, on the CPU."""
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The state dict of a foreign .ckpt, .pth or .pt file, of a Lightning checkpoint too. Objects besides tensors are
    never made. Raises FeatInvError for a file that is damaged, holds such objects, or no state dict."""
    try:
        # mapped, so that what is left behind is not read either; files of before PyTorch 1.6 are no zip and cannot be
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported (global: GLOBAL \S+|.*)|$", str(error))[0] or type(error).__name__
        raise FeatInvError(
            f"{file} was not opened, because it is damaged or holds objects besides tensors, which could run foreign"
            f" code ({reason}). If you trust its origin, save its state_dict alone where it was made:"
            " torch.save({'state_dict': model.state_dict()}, ...)"
        ) from error
    except Exception as error:  # of a file that is cut off, the reader raises whatever it stumbles over
        raise FeatInvError(
            f"{file} is not a complete PyTorch checkpoint ({type(error).__name__}: {str(error)[:120]}); download or"
            " copy it again"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise FeatInvError(
            f"{file} holds a {type(state).__name__}; expected a state dict, or a Lightning checkpoint with one"
        )
    return state


SCALE = ".scale"  # after the name of a tensor in 8 bits: what each output channel is multiplied by


def write_weights(
    file: str | Path, tensors: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str] | None = None
) -> None:
    """Writes the weights of a model whole or not at all. dtype: of the floating-point tensors; torch.int8 for 8 bits
    with a scale per output channel in matrices and kernels, and fp16 for the rest."""
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu()
        if not value.is_floating_point():
            stored[name] = value.contiguous()
        elif dtype != torch.int8:
            stored[name] = value.to(dtype).contiguous()
        elif value.ndim < 2 or value[0].numel() < 16:
            stored[name] = value.half().contiguous()
        else:
            scale = value.float().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            stored[name] = (value.float() / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8).contiguous()
            stored[name + SCALE] = scale
    write_safetensors(file, stored, metadata or {"format": "pt"})


def read_weights(file: str | Path, skip: str | None = None) -> dict[str, Tensor]:
    """What write_weights wrote, or any other safetensors file: floating-point tensors in float32, on the CPU; skip:
    without those whose names begin so. Raises FeatInvError for a file that is missing or cut off."""
    try:
        stored = read_tensors(file)
    except (SafetensorError, OSError) as error:
        raise FeatInvError(
            f"{file} is missing or not a complete safetensors file ({error}); download or copy it again"
        ) from error
    weights = {}
    for name, value in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored or skip and name.startswith(skip):
            continue
        if value.dtype == torch.int8:
            value = value.float() * stored[name + SCALE].view(-1, *[1] * (value.ndim - 1))
        weights[name] = value.float() if value.is_floating_point() else value
    return weights


def is_in_8_bits(file: str | Path) -> bool:
    """Whether a safetensors file holds tensors with a scale, as write_weights stores 8 bits. Raises FeatInvError for a
    file that is cut off."""
    try:
        with safe_open(file, "pt") as opened:
            return any(name.endswith(SCALE) for name in opened.keys())
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error
