"""The weights file: one safetensors file per inversion model, read alike by the nodes and the programs.

Tensors: the ControlNet in the diffusers layout, in 32, 16 or 8 bits (see files.write_weights), the conditional encoder
under `controlnet_cond_embedding.`, and the scope statistics, where the file has them, under `scope.`. Metadata: a JSON
text under the key "featinv", and one under "featinv_scope" with the statistics' quantiles.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .encoders import KINDS, build_encoder
from .feature_map import FeatInvError, FeatureSource
from .files import read_about, read_metadata, read_tensors, read_weights, write_safetensors, write_weights
from .scope import Scope

FORMAT = 1
ENCODER_PREFIX = "controlnet_cond_embedding."
SCOPE_PREFIX, SCOPE_KEY = "scope.", "featinv_scope"


@dataclass
class InversionInfo:
    """What a weights file says of itself.

    source: the features it inverts. encoder: settings for build_encoder. base: {"name", "width" (first block),
    "context" (cross-attention width), "latent_channels", "heads" (attention heads)}. prompt: text of the positive
    prompt. recommended: {"strength", "guidance", "steps", "negative"}, "negative" being what guidance pushes away from:
    "text" or "features", and optionally "gradient" and "gradient_steps", the step of toward_features and in how many of
    the last steps (10), and "timestep_spacing" where it is "leading". images_seen: pictures in training. config: the
    training configuration. metrics: as measured when it was saved.
    """

    source: FeatureSource
    encoder: dict
    base: dict
    prompt: str
    recommended: dict = field(
        default_factory=lambda: {"strength": 1.0, "guidance": 1.75, "negative": "text", "steps": 50}
    )
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

    Raises FeatInvError for a missing, truncated or foreign file, another format version, or an unknown encoder.
    """
    about = read_about(file, "featinv", "FeatInv weights file")
    if about.get("format") != FORMAT:
        raise FeatInvError(f"{file} has format version {about.get('format')}; this release reads version {FORMAT}")
    info = InversionInfo(**{**about, "source": FeatureSource.from_dict(about["source"])})
    if info.encoder.get("kind") not in KINDS:
        raise FeatInvError(
            f"{file} needs the conditional encoder {info.encoder.get('kind')!r}; known: {', '.join(KINDS)}"
        )
    return info


def load_inversion(file: str | Path) -> tuple[InversionInfo, dict[str, Tensor], nn.Module]:
    """Reads a weights file: (info, ControlNet state dict in the diffusers layout, encoder), all float32 on the CPU.

    Raises FeatInvError as read_info does, and for encoder tensors that are missing, unexpected or misshapen.
    """
    info = read_info(file)
    tensors = read_weights(file, SCOPE_PREFIX)
    encoder = build_encoder(info.encoder)
    own = {k.removeprefix(ENCODER_PREFIX): tensors.pop(k) for k in list(tensors) if k.startswith(ENCODER_PREFIX)}
    try:
        encoder.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise FeatInvError(f"{file}: the conditional encoder's tensors do not fit its settings. {error}") from error
    return info, tensors, encoder.eval().requires_grad_(False)


def load_scope(file: str | Path) -> Scope | None:
    """The scope statistics of a weights file; None where it has none, which is no fault. Raises FeatInvError as
    read_info does, and for statistics that do not fit the file's features."""
    info, text = read_info(file), read_metadata(file).get(SCOPE_KEY)
    if text is None:
        return None
    tensors = {key.removeprefix(SCOPE_PREFIX): value for key, value in read_tensors(file, SCOPE_PREFIX).items()}
    return Scope.read(info.source, json.loads(text), tensors)


def save_scope(file: str | Path, scope: Scope, out: str | Path | None = None) -> None:
    """Writes a weights file again with other scope statistics and everything else as it was, to `out` or in its place,
    whole or not at all. Raises FeatInvError if the statistics are of other features than the file's."""
    scope.source.require(read_info(file).source, "the scope statistics", "the weights file")
    tensors = {key: value for key, value in read_tensors(file).items() if not key.startswith(SCOPE_PREFIX)}
    tensors |= {SCOPE_PREFIX + key: value.contiguous() for key, value in scope.tensors().items()}
    write_safetensors(out or file, tensors, read_metadata(file) | {SCOPE_KEY: json.dumps(scope.about())})
