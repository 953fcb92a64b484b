"""The model that training trains: a ControlNet and its conditional encoder, in diffusers' classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.prediction import controlled_prediction
from featinv_nodes.core.weights import InversionInfo, load_inversion, save_inversion

from .base_model import BaseModel


class FeatureControlNet(nn.Module):
    """ControlNet and conditional encoder for one FeatureSource; what training trains."""

    def __init__(self, controlnet: ControlNetModel, encoder: nn.Module, source: FeatureSource) -> None:
        super().__init__()
        controlnet.controlnet_cond_embedding = nn.Identity()  # the hint is encoded once per run, outside
        self.controlnet, self.encoder, self.source = controlnet, encoder, source

    @classmethod
    def start(cls, base: BaseModel, source: FeatureSource, width: int = 512, kind: str = "conv") -> FeatureControlNet:
        """A copy of the base model's encoder with zero convolutions: at first the output equals the base model's."""
        controlnet = ControlNetModel.from_unet(base.unet)
        settings = {"kind": kind, "channels": source.channels, "out_channels": base.describe()["width"], "width": width}
        if kind == "conv_at_map" and source.pooled:
            settings |= {"kernel": 1}  # of a 1 x 1 map, a larger one sees the padding
        if kind == "perceiver":
            settings |= {"tokens": [1, 1] if source.pooled else list(source.grid), "queries": [base.latent_size] * 2}
        model = cls(controlnet, build_encoder(settings), source)
        return model.train().requires_grad_(True)

    @classmethod
    def load(cls, file: str | Path, base: BaseModel) -> tuple[FeatureControlNet, InversionInfo]:
        """Reads a weights file for a base model. Raises FeatInvError if the base model is of another kind or keys
        differ."""
        info, tensors, encoder = load_inversion(file)
        actual = base.describe()
        wrong = [
            f"{k}: {info.base[k]} in the weights file, {actual[k]} in the base model"
            for k in actual
            if k not in ("name", "latent_size", "resolution", "weights") and info.base[k] != actual[k]
        ]
        if wrong:
            raise FeatInvError(
                f"{file} was trained on {info.base['name']} and does not fit {base.name}. {'; '.join(wrong)}"
            )
        model = cls(ControlNetModel.from_unet(base.unet, load_weights_from_unet=False), encoder, info.source)
        try:
            model.controlnet.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise FeatInvError(f"{file}: ControlNet tensors do not fit the base model. {error}") from error
        return model.eval().requires_grad_(False), info

    def save(self, file: str | Path, info: InversionInfo, dtype: torch.dtype = torch.float32) -> None:
        """Writes a weights file whole or not at all; dtype: as write_weights takes it."""
        save_inversion(file, info, self.controlnet.state_dict(), self.encoder, dtype)

    def hint(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Feature values [B, C, h, w] -> hint for latents of grid `size`."""
        return self.encoder(values, size)

    def forward(self, unet: UNet2DConditionModel, noisy: Tensor, t: Tensor, context: Tensor, values: Tensor) -> Tensor:
        """The steered base model's prediction from feature values [B, C_f, h, w], as training calls it."""
        return self.predict(unet, noisy, t, context, self.hint(values, noisy.shape[2:]))

    def predict(
        self, unet: UNet2DConditionModel, noisy: Tensor, t: Tensor, context: Tensor, hint: Tensor, strength: float = 1.0
    ) -> Tensor:
        """The steered base model's prediction [B, C, H, W] for noisy latents at timesteps t, the hint encoded
        before."""
        return controlled_prediction(unet, self.controlnet, noisy, t, context, hint, strength)
