"""safetensors files with JSON metadata: weights, concepts, feature maps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .digests import COUNTER
from .errors import FeatInvError, some_of

if TYPE_CHECKING:
    from .metadata import Kind

#: where files of models have their pages
HUB = "https://huggingface.co"
LONGEST = 250  # bytes of a file's name: file systems take 255, of which the temporary name needs five


def require_name(file: str | Path) -> None:
    """Raises FeatInvError for a path that no file system takes, before any work is done for it."""
    for part in Path(file).parts:
        size = len(part.encode(errors="replace"))
        if size > LONGEST:
            raise FeatInvError(
                f"the name {part[:40]}... has {size} bytes; a name takes at most {LONGEST}. Give a shorter one"
            )
    if "\0" in str(file):
        raise FeatInvError(f"the name {str(file)!r} holds a zero byte; give one without")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside a file or a folder, and renames it to that at the end: it is there whole or not at
    all, and what is there already stays until then. Where writing fails, nothing is left under the temporary name."""
    part = path.with_name(path.name + ".part")
    if part.is_dir():  # of a process that was killed
        shutil.rmtree(part)
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_safetensors(file: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it. Raises FeatInvError for a name that is too
    long."""
    require_name(file)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part:
        part.write_bytes(save(tensors, metadata))  # save_file would make a file that only its owner can read


@contextmanager
def opened(file: str | Path, kind: str = "file") -> Iterator[safe_open]:
    """A safetensors file. kind: its name in messages. Raises FeatInvError if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise FeatInvError(f"{kind} {file} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error


def read_about(file: str | Path, key: str, model: type[Kind], kind: str) -> Kind:
    """The JSON under `key` in a file's metadata, without its tensors. model: its fields, from metadata.py. kind: what
    such a file is called in messages.

    Raises FeatInvError for a missing, truncated or foreign file, one of a later format, and for wrong fields.
    """
    from .metadata import parse  # pydantic takes tenths of a second

    text = read_metadata(file, kind).get(key)
    if text is None:
        raise FeatInvError(f"{file} is no {kind}: its metadata has no entry {key!r}")
    return parse(model, text, file, kind)


def read_metadata(file: str | Path, kind: str = "file") -> dict[str, str]:
    """All texts in the metadata of a file. Raises FeatInvError as opened does."""
    with opened(file, kind) as handle:
        return handle.metadata() or {}


def read_tensors(file: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file, or those whose names begin with `prefix`, on the CPU. Raises FeatInvError as opened
    does."""
    with opened(file) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys() if key.startswith(prefix)}


def as_float(value: Tensor, name: str, file: str | Path) -> Tensor:
    """A tensor of a file in float32. Raises FeatInvError for one that holds no floating-point numbers (8 bits of these
    are read too), or some that are NaN or infinite in float32."""
    if not value.is_floating_point():
        raise FeatInvError(
            f"{file}: the tensor {name!r} holds {_kind(value)}; expected floating-point numbers, such as float32"
        )
    value = _widened(value, name, file)
    if not value.isfinite().all():
        raise FeatInvError(f"{file}: the tensor {name!r} holds NaN or infinite values; write the file again")
    return value


def require_finite(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Raises FeatInvError, naming up to eight tensors, for NaN and infinite values: a model that holds them draws
    nothing, and training that met them has failed."""
    suspects = [name for name, value in tensors.items() if not value.sum(dtype=torch.float32).isfinite()]  # fast
    wrong = [name for name in suspects if not tensors[name].isfinite().all()]
    if wrong:
        raise FeatInvError(
            f"{file} holds NaN or infinite values in {some_of(wrong, 8)}; its training failed, or it is damaged. Give"
            " an earlier checkpoint, or copy it again"
        )


def misfits(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> str:
    """Which tensors differ by name or shape, a few of each kind by name; without BatchNorm's counters. "" for none."""
    wanted, found = ({k: v.shape for k, v in d.items() if not k.endswith(COUNTER)} for d in (expected, actual))
    reshaped = [k for k in wanted if k in found and found[k] != wanted[k]]
    kinds = {
        "missing": [k for k in wanted if k not in found],
        "unexpected": [k for k in found if k not in wanted],
        "misshapen": [f"{k} {list(found[k])} instead of {list(wanted[k])}" for k in reshaped],
    }
    kinds = {kind: keys for kind, keys in kinds.items() if keys}
    return "; ".join(f"{kind} {some_of(keys, 8 // len(kinds))}" for kind, keys in kinds.items())


def _widened(value: Tensor, name: str, file: str | Path) -> Tensor:
    try:
        return value.float()
    except NotImplementedError as error:  # of the 4 bits that safetensors knows
        raise FeatInvError(f"{file}: PyTorch cannot read the tensor {name!r} of {_kind(value)}") from error


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


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


def read_weights(file: str | Path, skip: str | None = None, only: str = "") -> dict[str, Tensor]:
    """What write_weights wrote, or any other safetensors file: floating-point tensors in float32, on the CPU; skip:
    without those whose names begin so; only: none but those. Raises FeatInvError for a file that is missing or cut off,
    and for 8 bits without their scale."""
    stored = read_tensors(file, only)
    weights = {}
    for name, value in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored or skip and name.startswith(skip):
            continue
        if value.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            if scale is None or scale.shape != value.shape[:1]:
                raise FeatInvError(
                    f"{file}: the tensor {name!r} is stored in 8 bits, but {name + SCALE!r} holds no scale for each of"
                    " its channels; download or copy the file again"
                )
            value = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        weights[name] = _widened(value, name, file) if value.is_floating_point() else value
    return weights


def is_in_8_bits(file: str | Path) -> bool:
    """Whether a safetensors file holds tensors with a scale, as write_weights stores 8 bits. Raises FeatInvError for a
    file that is cut off."""
    with opened(file) as handle:
        return any(name.endswith(SCALE) for name in handle.keys())
