"""Feature spaces in which sets of pictures are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.feature_map import FeatInvError


class Space(Protocol):
    """name: as figures are named after it. Called with pictures [B, 3, h, w] in 0..1, it gives vectors [B, D], float32,
    on the CPU."""

    name: str

    def __call__(self, pictures: Tensor) -> Tensor: ...


class TimmSpace:
    """The averaged last map of a timm model, of pictures scaled whole to its input."""

    def __init__(self, backbone: Backbone) -> None:
        self.name, self._backbone = f"{backbone.name}, pooled", backbone

    def __call__(self, pictures: Tensor) -> Tensor:
        return (
            self._backbone.extract(self._backbone.preprocess(pictures, "stretch"), pooled=True).values.flatten(1).cpu()
        )


class Scaled:
    """Another space, of pictures scaled whole to `side` pixels first."""

    def __init__(self, space: Space, side: int) -> None:
        self.name, self._space, self._side = f"{space.name}, at {side} pixels", space, (side, side)

    def __call__(self, pictures: Tensor) -> Tensor:
        return self._space(
            pictures
            if pictures.shape[2:] == self._side
            else F.interpolate(pictures, self._side, mode="bilinear", antialias=True)
        )


class Inception:
    """The 2048 channels that FID and KID are defined on: torch-fidelity's Inception v3 at weights from a local file."""

    name = "Inception"

    def __init__(self, file: str | Path, device: torch.device | str = "cpu") -> None:
        """Raises FeatInvError where torch-fidelity is not installed, and for a file that is missing or another
        network's."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise FeatInvError("--inception needs the package torch-fidelity: pip install torch-fidelity") from error
        if not Path(file).is_file():
            raise FeatInvError(
                f"--inception {file}: there is no such file; torch-fidelity's releases have it as"
                " weights-inception-2015-12-05-6726825d.pth"
            )
        if read_checkpoint(file).replaced:  # torch-fidelity itself would run whatever code the file holds
            raise FeatInvError(f"--inception {file} holds objects besides tensors, and is not torch-fidelity's file")
        try:
            self._network = FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=str(file)
            ).to(device)
        except RuntimeError as error:
            raise FeatInvError(
                f"--inception {file} does not hold torch-fidelity's Inception v3: {str(error)[:300]}"
            ) from error
        self._device = device

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self._network((pictures * 255).round().byte().to(self._device))[0].float().cpu()
