"""The feature ControlNet: the host's ControlNet, whose hint is a feature map read by the conditional encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.cldm.cldm
import comfy.conds
import comfy.controlnet
import comfy.model_base
import comfy.model_management as management
import comfy.ops
import torch
from torch import Tensor

from ..core.errors import FeatInvError
from ..core.feature_map import FeatureMap
from ..core.scope import Scope
from ..core.weights import InversionInfo, load_inversion, load_scope
from ..worlds import find_world
from .models import Whole, managed
from .notices import tell_counts
from .parts import WHOLE, Part, find_part, in_turn, recording
from .provenance import WAY, of_any_weights, require_unet
from .sizes import trained_size
from .steering import IN_AREAS, NEGATIVES, Steering, resized, share_over
from .unet import ldm_config, to_ldm

ENCODER_BATCH = 16  # maps that the encoder reads together
NEGATIVE = "featinv_negative"


def tag_negative(options: dict, negative: bool) -> dict:
    """A conditioning's options with a note of whether it is what guidance pushes away from.

    A guider numbers its conditionings as it likes, so the number does not tell. The note stands among the model's
    conditions, the one part that the host takes from the text when it makes a conditioning for an area's opposite.
    """
    return {
        **options,
        "model_conds": {**options.get("model_conds", {}), NEGATIVE: comfy.conds.CONDRegular(torch.tensor([negative]))},
    }


def before_a_run(share: float) -> float:
    """Stands in for the host's function from a share of the sampling process to the noise level, while none runs."""
    raise FeatInvError(f"a FeatInv ControlNet was asked for the noise level at {share:g} while no sampler runs")


class FeatureControl(comfy.controlnet.ControlNet):
    """A ControlNet steered by a FeatureMap.

    It chains with stock ControlNets in either order. The encoder runs once per sampling run and size. One map serves
    any batch; of more maps than latents the first are used, fewer are repeated in turn, as the host does with hint
    pictures, and the node says so. scope: what held-out maps are like, None where the weights file does not say.
    """

    def __init__(
        self,
        control_model: torch.nn.Module | None,
        encoder: Whole,
        info: InversionInfo,
        scope: Scope | None,
        **options,
    ) -> None:
        super().__init__(control_model, compression_ratio=1, **options)
        self.encoder, self.info, self.scope = encoder, info, scope
        self._steering: Steering | None = None
        self.encoded: dict[tuple[tuple[int, int], int], tuple[Tensor, Tensor | None]] = {}
        self.residual_mask: Tensor | None = None
        self.sigma_of: Callable[[float], float] = before_a_run
        self.started = False

    @property
    def steering(self) -> Steering:
        """Its settings. Raises FeatInvError if there are none yet."""
        if self._steering is None:
            raise FeatInvError(
                "a FeatInv ControlNet without features cannot steer; connect it to the sampler through FeatInv"
                " ControlNet, which gives it a feature map"
            )
        return self._steering

    @steering.setter
    def steering(self, steering: Steering) -> None:
        self._steering = steering

    def applied(self, steering: Steering) -> FeatureControl:
        """A copy with these settings. Raises FeatInvError for features of another source than the weights'."""
        steering.features.source.require(self.info.source, "the feature map", "the inversion model", WAY)
        control = self.copy()
        control.steering = steering
        control.strength, control.timestep_percent_range = steering.strength, steering.span
        control.extra_hooks = recording()
        return control

    def evaluate(self, features: FeatureMap) -> str:
        """One line about the scope of the map. Raises FeatInvError for another source."""
        features.source.require(self.info.source, "the feature map", "the inversion model", WAY)
        return self.scope.evaluate(features).describe() if self.scope else "no scope statistics in this weights file"

    def copy(self) -> FeatureControl:
        """As the host asks for one of each conditioning; the networks are shared."""
        other = FeatureControl(
            None,
            self.encoder,
            self.info,
            self.scope,
            load_device=self.load_device,
            manual_cast_dtype=self.manual_cast_dtype,
        )
        other.control_model, other.control_model_wrapped = self.control_model, self.control_model_wrapped
        other._steering = self._steering
        self.copy_to(other)
        return other

    def pre_run(self, model: comfy.model_base.BaseModel, percent_to_timestep_function) -> None:  # noqa: ANN001
        """The host's, before a run's first step. Raises FeatInvError as require_base does."""
        self.require_base(model)
        self.sigma_of, self.started = percent_to_timestep_function, False
        super().pre_run(model, percent_to_timestep_function)

    def require_base(self, model: comfy.model_base.BaseModel) -> None:
        """Raises FeatInvError if the base model is not of the kind that the weights were trained on, or has other
        weights, as far as both are known."""
        config = getattr(model.model_config, "unet_config", {})
        # an inpainting model takes more channels in, of which a ControlNet gets the latents alone
        have = {
            "width": config.get("model_channels"),
            "context": config.get("context_dim"),
            "latent_channels": model.latent_format.latent_channels,
        }
        wrong = [
            f"{key} {self.info.base[key]} in the weights file, {there} in the model"
            for key, there in have.items()
            if self.info.base[key] != there
        ]
        if wrong:
            name = self.info.base["name"]
            world = find_world(name)
            source = (
                f"Load World with {world.name!r}" if world else f"Load Checkpoint with {name} or another SD 1.x model"
            )
            raise FeatInvError(
                f"FeatInvControlNet and the sampler's model do not fit: {'; '.join(wrong)}. The weights were trained on"
                f" {name}; connect {source}"
            )
        require_unet(model, self.info)

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict, batched_number: int, transformer_options: dict
    ) -> dict | None:
        """The host's, with the hint of each conditioning: the encoded maps, or the encoded zeros where guidance pushes
        away from them, cut to what the latents x_noisy [conditionings * rows, C, H, W] are of the picture. Raises
        FeatInvError where the host does not say which part that is."""
        steering, rows = self.steering, x_noisy.shape[0] // batched_number
        height, width = x_noisy.shape[2:]
        size = height, width
        whole = transformer_options.get(WHOLE, x_noisy[:rows])
        if not self.started:
            self.start(whole, float(t[0]))
        part = find_part(rows, size, transformer_options, steering.shared)
        negatives = (
            cond[NEGATIVE].view(batched_number, -1)[:, 0].tolist() if NEGATIVE in cond else [False] * batched_number
        )
        chunks = []
        for negative, area in zip(negatives, part.areas):
            fits = area is not None and steering.in_areas == IN_AREAS[0]
            steered, null = self.hints(size if fits else part.size, len(whole))
            hint = in_turn(null if null is not None and negative else steered, part.rows)
            chunks.append(hint if fits else part.cut(hint, area))
        if any(tuple(chunk.shape[2:]) != size for chunk in chunks):
            raise FeatInvError(
                f"the sampler processes {size[1]} x {size[0]} latent cells of {part.size[1]} x {part.size[0]}, and"
                " FeatInv ControlNet is not told which. Use ComfyUI's own areas or Context Windows, or sample the image"
                " as a whole"
            )
        dtype = self.manual_cast_dtype or self.control_model.dtype
        self.cond_hint = torch.cat(chunks).to(x_noisy.device, dtype)
        self.residual_mask = self.mask_of(part)
        if steering.curve != (1.0,):
            self.strength = steering.strength_at(share_over(float(t[0]), self.sigma_of))
        return super().get_control(x_noisy, t, cond, batched_number, transformer_options)

    def start(self, latents: Tensor, sigma: float) -> None:
        """At a run's first step: refuses latents that do not belong to the features, and shows other problems."""
        self.started = True
        steering, (number, _, *cells) = self.steering, latents.shape
        steering.require_pairs(latents, sigma >= 0.99 * float(self.model_sampling_current.sigma_max))
        batches = [(len(steering.features), "feature map")]
        if steering.mask is not None:
            batches.append((len(steering.mask), "mask"))
        wrong = []
        if (trained := trained_size(self.info)) and cells != [trained.cells] * 2:
            scale = trained.pixels // trained.cells
            wrong.append(
                f"The latents are {cells[1]} x {cells[0]} cells, {cells[1] * scale} x {cells[0] * scale} pixels. The"
                f" inversion model was trained at {trained.describe()}, and inverts other sizes less faithfully. Empty"
                " Latent for FeatInv gives that size."
            )
        tell_counts(steering.node, number, batches, wrong)

    def hints(self, size: tuple[int, int], rows: int) -> tuple[Tensor, Tensor | None]:
        """The encoded features [M, C_d, *size] of the first M maps, as many as there are or `rows` latents use, and the
        encoded zeros [1, C_d, *size] where guidance pushes away from them; computed once per run and size."""
        if (size, rows) not in self.encoded:
            values = self.steering.features.values[:rows].to(self.encoder.load_device)
            encoder = self.encoder.model
            null = encoder(torch.zeros_like(values[:1]), size) if self.steering.negative == NEGATIVES[0] else None
            self.encoded[size, rows] = (torch.cat([encoder(part, size) for part in values.split(ENCODER_BATCH)]), null)
        return self.encoded[size, rows]

    def mask_of(self, part: Part) -> Tensor | None:
        """The mask [rows of all conditionings, 1, h, w] over what the network sees; None where there is none."""
        if self.steering.mask is None:
            return None
        mask = in_turn(resized(self.steering.mask[:, None].float(), part.size), part.rows)
        return torch.cat([part.cut(mask, area) for area in part.areas])

    def control_merge(self, control: dict, control_prev: dict | None, output_dtype: torch.dtype | None) -> dict:
        """The host's, with the residuals masked."""
        if self.residual_mask is not None:
            control = {
                key: [None if x is None else x * resized(self.residual_mask, x.shape[2:]).to(x) for x in residuals]
                for key, residuals in control.items()
            }
        return super().control_merge(control, control_prev, output_dtype)

    def get_models(self) -> list:
        return [*super().get_models(), self.encoder]

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Bytes, an estimate: the ControlNet's activations are about half of the base model's, which the host knows;
        the encoder's are its widest layers on a 64 x 64 latent, float32."""
        widest = self.info.encoder["channels"] + 2 * self.info.encoder.get("width", 512)
        return super().inference_memory_requirements(dtype) + 4 * 64 * 64 * widest * min(
            len(self.steering.features), ENCODER_BATCH
        )

    def cleanup(self) -> None:
        self.encoded, self.residual_mask, self.sigma_of = {}, None, before_a_run
        super().cleanup()


def load_feature_control(file: Path, other_weights: bool = False) -> FeatureControl:
    """Opens a weights file. other_weights: it works with a backbone and a base model of any weights. Raises
    FeatInvError for anything but a complete file whose tensors all find their place."""
    info, tensors, encoder = load_inversion(file)
    config = ldm_config(tensors, info.base["heads"])
    own = to_ldm(tensors, config)
    device = management.get_torch_device()
    dtype = management.unet_dtype(model_params=-1, supported_dtypes=[torch.float16, torch.bfloat16, torch.float32])
    cast = management.unet_manual_cast(dtype, device)
    config |= {
        "dtype": dtype,
        "device": management.unet_offload_device(),
        "operations": comfy.ops.pick_operations(dtype, cast, disable_fast_fp8=True),
    }
    config["hint_channels"] = 3  # the stock hint block, replaced below
    config.pop("out_channels")
    model = comfy.cldm.cldm.ControlNet(**config)
    # hints arrive encoded
    model.input_hint_block = comfy.ldm.modules.diffusionmodules.openaimodel.TimestepEmbedSequential()
    missing, unexpected = model.load_state_dict(own, strict=False)
    if missing or unexpected:
        raise FeatInvError(
            f"{file} does not fit the SD 1.x architecture: missing {missing[:4]}, unexpected {unexpected[:4]}"
        )
    scope = load_scope(file)
    if other_weights:
        info = of_any_weights(info)
        scope = scope and replace(scope, source=info.source)
    return FeatureControl(
        model.eval().requires_grad_(False),
        managed(encoder),
        info,
        scope,
        load_device=device,
        manual_cast_dtype=cast,
    )
