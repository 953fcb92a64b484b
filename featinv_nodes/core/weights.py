"""The weights file: one safetensors file per inversion model, read alike by the nodes and the programs.

Tensors: the ControlNet in the diffusers layout, in 32, 16 or 8 bits (see files.write_weights), the conditional encoder
under `controlnet_cond_embedding.`, and the scope statistics, where the file has them, under `scope.`. Metadata: a JSON
text under the key "featinv", and one under "featinv_scope" with the statistics' quantiles.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .encoders import build_encoder
from .errors import FeatInvError
from .feature_map import FeatureSource
from .files import as_float, read_about, read_metadata, read_tensors, read_weights, write_safetensors, write_weights
from .sampling import PAPER_SAMPLING
from .scope import Scope

if TYPE_CHECKING:
    from .metadata import Inversion

FORMAT = 1
ENCODER_PREFIX = "controlnet_cond_embedding."
SCOPE_PREFIX, SCOPE_KEY = "scope.", "featinv_scope"


@dataclass
class InversionInfo:
    """What a weights file says of itself; metadata.Inversion checks it.

    source: the features it inverts. encoder: settings for build_encoder. base: {"name", "width" (first block),
    "context" (cross-attention width), "latent_channels", "heads" (attention heads), and in newer files "latent_size"
    and "resolution", the sides of the latents and the pictures in training, and "weights", the digest of the U-Net's
    weights (digests.digest)}. prompt: text of the positive prompt.
    recommended: {"strength", "guidance", "steps", "negative"}, "negative" being what guidance pushes away from:
    "text" or "features", and optionally "gradient" and "gradient_steps", the step of toward_features and in how many of
    the last steps (10), and "timestep_spacing" where it is "leading". images_seen: pictures in training. config: the
    training configuration. metrics: as measured when it was saved.
    """

    source: FeatureSource
    encoder: dict
    base: dict
    prompt: str
    recommended: dict = field(default_factory=PAPER_SAMPLING.copy)
    images_seen: int = 0
    config: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    format: int = FORMAT


def save_inversion(
    file: str | Path,
    info: InversionInfo,
    controlnet: dict[str, Tensor],
    encoder: nn.Module,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a weights file whole or not at all.

    controlnet: state dict in the diffusers layout without its own conditioning embedding. dtype: as write_weights takes
    it.
    """
    tensors = {k: v for k, v in controlnet.items() if not k.startswith(ENCODER_PREFIX)}
    tensors |= {ENCODER_PREFIX + k: v for k, v in encoder.state_dict().items()}
    write_weights(file, tensors, dtype, {"featinv": json.dumps(asdict(info))})


def read_info(file: str | Path) -> InversionInfo:
    """The metadata of a weights file, without its tensors.

    Raises FeatInvError for a missing, truncated or foreign file, a later format version, and wrong or missing fields,
    which it names. Fields that this release does not know are ignored.
    """
    return _info(_read_about(file))


def _read_about(file: str | Path) -> Inversion:
    from .metadata import Inversion  # pydantic takes tenths of a second

    about = read_about(file, "featinv", Inversion, "FeatInv weights file")
    source, encoder = about.source.made(), about.encoder
    for name, stated, needed in (
        ("encoder.channels", encoder.channels, source.channels),
        ("encoder.out_channels", encoder.out_channels, about.base.width),
    ):
        if stated != needed:
            raise FeatInvError(
                f"{file}: the field {name} is {stated}, but {source.describe()} and a base model of width"
                f" {about.base.width} need {needed}; download or copy the file again"
            )
    return about


def _info(about: Inversion) -> InversionInfo:
    return InversionInfo(
        about.source.made(),
        about.encoder.model_dump(mode="json", exclude_unset=True),
        about.base.model_dump(exclude_unset=True),
        about.prompt,
        about.recommended.made(),
        about.images_seen,
        about.config,
        about.metrics,
        about.format,
    )


def load_inversion(file: str | Path) -> tuple[InversionInfo, dict[str, Tensor], nn.Module]:
    """Reads a weights file: (info, ControlNet state dict in the diffusers layout, encoder), all float32 on the CPU.

    Raises FeatInvError as read_info does, and for encoder tensors that are missing, unexpected or misshapen.
    """
    about = _read_about(file)
    info = _info(about)
    tensors = read_weights(file, SCOPE_PREFIX)
    own = {
        k.removeprefix(ENCODER_PREFIX): as_float(tensors.pop(k), k, file)
        for k in list(tensors)
        if k.startswith(ENCODER_PREFIX)
    }
    for name, size in about.encoder.sizes().items():  # before an encoder of any stated size is made
        if name in own and own[name].shape != size:
            raise FeatInvError(
                f"{file}: the conditional encoder's tensors do not fit its settings: {name} has the shape"
                f" {list(own[name].shape)}, the settings state {list(size)}"
            )
        if name not in own:
            raise FeatInvError(f"{file}: the conditional encoder's tensor {name} is missing")
    encoder = build_encoder(info.encoder)
    try:
        encoder.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise FeatInvError(f"{file}: the conditional encoder's tensors do not fit its settings. {error}") from error
    return info, tensors, encoder.eval().requires_grad_(False)


def load_scope(file: str | Path) -> Scope | None:
    """The scope statistics of a weights file; None where it has none, which is no fault, and, with a warning in the
    log, where they cannot be used. Raises FeatInvError as read_info does."""
    from .metadata import ScopeStatistics, parse

    info, text = read_info(file), read_metadata(file).get(SCOPE_KEY)
    if text is None:
        return None
    try:
        about = parse(ScopeStatistics, text, file, "text about scope statistics")
        stored = read_tensors(file, SCOPE_PREFIX)
        tensors = {key.removeprefix(SCOPE_PREFIX): as_float(value, key, file) for key, value in stored.items()}
        half = [key for key in tensors if stored[SCOPE_PREFIX + key].dtype == torch.float16]
        tensors |= {key: tensors[key].half() for key in half}  # kept as they are, half of the memory
        return Scope.read(info.source, about.model_dump(), tensors)
    except FeatInvError as error:
        logging.getLogger(__name__).warning(
            "%s is opened without its scope statistics: %s", file, str(error).removeprefix(f"{file}: ")
        )
        return None


def save_scope(file: str | Path, scope: Scope, out: str | Path | None = None) -> None:
    """Writes a weights file again with other scope statistics and everything else as it was, to `out` or in its place,
    whole or not at all. Raises FeatInvError if the statistics are of other features than the file's."""
    scope.source.require(read_info(file).source, "the scope statistics", "the weights file")
    tensors = {key: value for key, value in read_tensors(file).items() if not key.startswith(SCOPE_PREFIX)}
    tensors |= {SCOPE_PREFIX + key: value.contiguous() for key, value in scope.tensors().items()}
    write_safetensors(out or file, tensors, read_metadata(file) | {SCOPE_KEY: json.dumps(scope.about())})
