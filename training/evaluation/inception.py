"""The feature space of FID and KID as published: torch-fidelity's Inception v3, at weights from a local file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.digests import digest
from featinv_nodes.core.errors import FeatInvError

#: torch-fidelity's own file of the weights of Heusel et al. 2017; its name ends with the first digits of its SHA-256
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class Inception:
    """The 2048 channels that FID and KID are defined on. weights: their digest."""

    name, side = "Inception", None

    def __init__(self, file: str | Path, device: torch.device | str = "cpu") -> None:
        """Raises FeatInvError where torch-fidelity is not installed, and for a file that is missing or another
        network's."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise FeatInvError("--inception needs the package torch-fidelity: pip install torch-fidelity") from error
        if not Path(file).is_file():
            raise FeatInvError(
                f"--inception {file}: there is no such file. python3 run.py download inception fetches it and says"
                f" where it is, or fetch {URL}"
            )
        if read_checkpoint(file).replaced:  # torch-fidelity itself would run whatever code the file holds
            raise FeatInvError(f"--inception {file} holds objects besides tensors, and is not torch-fidelity's file")
        try:
            self._network = FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=str(file)
            ).to(device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise FeatInvError(f"--inception {file} does not hold torch-fidelity's Inception v3: {reason}") from error
        self.weights = digest(self._network)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Vectors [B, 2048] of pictures [B, 3, h, w] in 0..1, rounded to 8 bits as in a PNG file."""
        return self._network((pictures * 255).round().byte().to(self._device))[0].float().cpu()
