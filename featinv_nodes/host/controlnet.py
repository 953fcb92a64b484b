"""The feature ControlNet: the host's ControlNet, whose hint is a feature map read by the conditional encoder."""

from __future__ import annotations

from pathlib import Path

import comfy.cldm.cldm
import comfy.conds
import comfy.controlnet
import comfy.hooks
import comfy.model_management as management
import comfy.ops
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ..core.feature_map import FeatInvError, FeatureMap
from ..core.scope import Scope
from ..core.weights import InversionInfo, load_inversion, load_scope
from ..worlds import find_world
from .models import managed
from .unet import ldm_config, to_ldm

#: What guidance pushes away from: the same features with the negative text (the paper), or zero features as well,
#: the combination that training drops to. The node repeats the names: at start-up this module is too heavy for it.
NEGATIVES = ("text and features", "text")
AREAS = "featinv_areas"
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


def record_areas(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):  # noqa: ANN001, ANN201
    """A wrapper around the host's batching: writes down the whole latent's size and the area of each conditioning,
    which the host does not tell a ControlNet when it hands it a cut-out."""
    areas = {c["uuid"]: c.get("area") for group in conds if group for c in group}
    model_options.setdefault("transformer_options", {})[AREAS] = {"size": tuple(x.shape[2:]), "areas": areas}
    return executor(model, conds, x, timestep, model_options)


def _hooks() -> comfy.hooks.HookGroup:
    wrappers = {comfy.patcher_extension.WrappersMP.CALC_COND_BATCH: {AREAS: [record_areas]}}
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}))
    return group


class FeatureControl(comfy.controlnet.ControlNet):
    """A ControlNet steered by a FeatureMap.

    It chains with stock ControlNets in either order. The encoder runs once per sampling run, for the whole latent;
    cut-outs (area conditioning) take their part of the result. One map serves any batch; of more maps than latents
    the first are used, fewer are repeated in turn, as the host does with hint pictures. scope: what held-out maps are
    like, None where the weights file does not say.
    """

    def __init__(
        self,
        control_model: torch.nn.Module | None,
        encoder: torch.nn.Module | None,
        info: InversionInfo,
        scope: Scope | None,
        **options,
    ) -> None:
        super().__init__(control_model, compression_ratio=1, **options)
        self.encoder = None if encoder is None else managed(encoder)
        self.info, self.scope = info, scope
        self.features: FeatureMap | None = None
        self.negative = NEGATIVES[0]
        self.encoded: dict[tuple[tuple[int, int], int], tuple[Tensor, Tensor | None]] = {}

    def applied(
        self, features: FeatureMap, strength: float, span: tuple[float, float], negative: str
    ) -> FeatureControl:
        """A copy that steers towards `features`; span: start and end as shares of the sampling process."""
        features.source.require(self.info.source, "the feature map", "the inversion model")
        if negative not in NEGATIVES:
            raise FeatInvError(f"negative {negative!r}: expected one of {NEGATIVES}")
        control = self.copy()
        control.features, control.negative = features, negative
        control.strength, control.timestep_percent_range = strength, span
        control.extra_hooks = _hooks()
        return control

    def evaluate(self, features: FeatureMap) -> str:
        """One line: whether the map is inside what the inversion model knows. Raises FeatInvError for another
        source."""
        features.source.require(self.info.source, "the feature map", "the inversion model")
        return self.scope.evaluate(features).describe() if self.scope else "no scope statistics in this weights file"

    def copy(self) -> FeatureControl:
        other = FeatureControl(
            None, None, self.info, self.scope, load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype
        )
        other.control_model, other.control_model_wrapped, other.encoder = (
            self.control_model,
            self.control_model_wrapped,
            self.encoder,
        )
        other.features, other.negative = self.features, self.negative
        self.copy_to(other)
        return other

    def pre_run(self, model: torch.nn.Module, percent_to_timestep_function) -> None:  # noqa: ANN001
        self.require_base(model)
        super().pre_run(model, percent_to_timestep_function)

    def require_base(self, model: torch.nn.Module) -> None:
        """Raises FeatInvError if the base model is not of the kind that the weights were trained on."""
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

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict, batched_number: int, transformer_options: dict
    ) -> dict | None:
        recorded = transformer_options.get(AREAS, {"size": tuple(x_noisy.shape[2:]), "areas": {}})
        per_chunk = x_noisy.shape[0] // batched_number
        steered, null = self.hints(recorded["size"], per_chunk)
        negatives = (
            cond[NEGATIVE].view(batched_number, -1)[:, 0].tolist() if NEGATIVE in cond else [False] * batched_number
        )
        chunks = []
        for negative, uuid in zip(negatives, transformer_options["uuids"]):
            hint = null if null is not None and negative else steered
            chunks.append(comfy.utils.repeat_to_batch_size(cut(hint, recorded["areas"].get(uuid)), per_chunk))
        dtype = self.manual_cast_dtype or self.control_model.dtype
        self.cond_hint = torch.cat(chunks).to(x_noisy.device, dtype)
        return super().get_control(x_noisy, t, cond, batched_number, transformer_options)

    def hints(self, size: tuple[int, int], rows: int) -> tuple[Tensor, Tensor | None]:
        """The encoded features [M, C_d, *size] of the first M maps, as many as there are or `rows` latents use, and the
        encoded zeros [1, C_d, *size] where guidance pushes away from them; computed once per run and size."""
        if (size, rows) not in self.encoded:
            values = self.features.values[:rows].to(self.encoder.load_device)
            encoder = self.encoder.model
            null = encoder(torch.zeros_like(values[:1]), size) if self.negative == NEGATIVES[0] else None
            self.encoded[size, rows] = (torch.cat([encoder(part, size) for part in values.split(ENCODER_BATCH)]), null)
        return self.encoded[size, rows]

    def get_models(self) -> list:
        return [*super().get_models(), self.encoder]

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Bytes, an estimate: the ControlNet's activations are about half of the base model's, which the host knows;
        the encoder's are its widest layers on a 64 x 64 latent, float32."""
        widest = self.info.encoder["channels"] + 2 * self.info.encoder.get("width", 512)
        return super().inference_memory_requirements(dtype) + 4 * 64 * 64 * widest * min(
            len(self.features), ENCODER_BATCH
        )

    def cleanup(self) -> None:
        self.encoded = {}
        super().cleanup()


def cut(hint: Tensor, area: list[int] | tuple[int, ...] | None) -> Tensor:
    """The part of a hint [M, C, H, W] under an area (h, w, y, x) in latent cells, clipped as the host clips."""
    if area is None:
        return hint
    h, w, y, x = area
    return hint[:, :, y : y + h, x : x + w]


def load_feature_control(file: Path) -> FeatureControl:
    """Opens a weights file. Raises FeatInvError for anything but a complete file whose tensors all find their place."""
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
    model.input_hint_block = (
        comfy.ldm.modules.diffusionmodules.openaimodel.TimestepEmbedSequential()
    )  # hints arrive encoded
    missing, unexpected = model.load_state_dict(own, strict=False)
    if missing or unexpected:
        raise FeatInvError(
            f"{file} does not fit the SD 1.x architecture: missing {missing[:4]}, unexpected {unexpected[:4]}"
        )
    return FeatureControl(
        model.eval().requires_grad_(False), encoder, info, load_scope(file), load_device=device, manual_cast_dtype=cast
    )
