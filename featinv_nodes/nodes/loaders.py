"""Nodes that open models: backbones, inversion models, embedded worlds."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.latest import io

from ..core.feature_map import FeatInvError
from ..host import folders
from ..worlds import BACKBONES, MODELS, WORLDS, model_file
from .types import CATEGORY, EMBEDDED, Backbone, Control, channels_last


def modified(folder: str, name: str) -> str:
    """Changes when the file behind a widget's name does."""
    return name if name.endswith(EMBEDDED) else f"{name} {folders.stamp(folders.path(folder, name))}"


class LoadBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [name + EMBEDDED for name in BACKBONES] + folders.names(folders.BACKBONES)
        return io.Schema(
            node_id="FeatInv_LoadBackbone",
            display_name="Load Backbone",
            category=CATEGORY,
            description=(
                "Opens a vision model (timm) whose feature maps are extracted and inverted. Local files only; nothing"
                " is downloaded."
            ),
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=options,
                    default=options[0],
                    tooltip=(
                        "A weights file in models/backbones (.safetensors, .pth or .bin), a timm-hub folder there (its"
                        " model.safetensors), or an embedded model."
                    ),
                ),
                io.String.Input(
                    "timm_name",
                    default="",
                    tooltip=(
                        "The timm name, architecture.tag, such as convnext_base.fb_in22k_ft_in1k. Empty: the file's"
                        " name, or the folder's own configuration. Ignored for embedded models."
                    ),
                ),
                io.Int.Input(
                    "input_size",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Side in pixels of the pictures the model reads; 0 for the model's own. The paper's ConvNeXt"
                        " reads 288. Must be the one that the inversion model was trained with."
                    ),
                ),
            ],
            outputs=[
                Backbone.Output(
                    "backbone",
                    display_name="backbone",
                    tooltip="The vision model, with its own input size, colour normalisation and crop.",
                ),
                io.String.Output(
                    "layers",
                    display_name="layers",
                    tooltip=(
                        "The names of the layers that Extract Features can read, one per line. Connect Preview Any to"
                        " see them."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, timm_name: str, input_size: int) -> str:
        return modified(folders.BACKBONES, weights)

    @classmethod
    def execute(cls, weights: str, timm_name: str, input_size: int) -> io.NodeOutput:
        from ..host.models import ManagedBackbone, open_file
        from ..worlds import open_backbone

        if weights.endswith(EMBEDDED):
            backbone = open_backbone(weights.removesuffix(EMBEDDED), input_size=input_size or None)
        else:
            backbone = open_file(folders.path(folders.BACKBONES, weights), timm_name.strip(), input_size or None)
        return io.NodeOutput(ManagedBackbone(backbone), "\n".join(backbone.layers))


class LoadFeatInvControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [name + EMBEDDED for name in MODELS] + folders.names(folders.CONTROLS)
        return io.Schema(
            node_id="FeatInv_LoadFeatInvControlNet",
            display_name="Load FeatInv ControlNet",
            category=CATEGORY,
            description=(
                "Opens an inversion model: a ControlNet and the encoder that reads feature maps of one backbone and"
                " layer."
            ),
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=options,
                    default=options[0],
                    tooltip="A weights file in models/featinv, as training/train.py writes it, or an embedded model.",
                ),
            ],
            outputs=[
                Control.Output(
                    "control_net", display_name="control_net", tooltip="The inversion model for FeatInv ControlNet."
                ),
                io.String.Output(
                    "about",
                    display_name="about",
                    tooltip=(
                        "What it inverts, its base model and prompt, the recommended strength, guidance (cfg), steps,"
                        " KSampler's scheduler and Feature Guidance, and the size that it was trained at."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str) -> str:
        return modified(folders.CONTROLS, weights)

    @classmethod
    def execute(cls, weights: str) -> io.NodeOutput:
        from ..core.sampling import SPACINGS
        from ..host.controlnet import load_feature_control
        from ..host.sizes import trained_size

        embedded = weights.endswith(EMBEDDED)
        file: Path = model_file(weights.removesuffix(EMBEDDED)) if embedded else folders.path(folders.CONTROLS, weights)
        control = load_feature_control(file)
        info = control.info
        settings = dict(info.recommended)
        gradient, last = (
            settings.pop("gradient", 0.0),
            settings.pop("gradient_steps", 10) / settings["steps"],
        )  # 10: InversionInfo's
        guided = f"\nFeature Guidance: step {gradient:g}, last {min(last, 1):g}" if gradient else ""
        scheduler = SPACINGS[settings.pop("timestep_spacing", "trailing")]
        words = ", ".join(f"{name} {value}" for name, value in settings.items()) + f", scheduler {scheduler}"
        size = f" at {size.describe()}" if (size := trained_size(info)) else ""
        about = (
            f"inverts {info.source.describe()}\nbase model: {info.base['name']}\nprompt: {info.prompt}\nrecommended:"
            f" {words}{guided}\ntrained on {info.images_seen:,} images{size}"
        )
        return io.NodeOutput(control, about)


class LoadTinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInv_LoadTinyWorld",
            display_name="Load World",
            category=CATEGORY,
            description=(
                "An embedded diffusion model, of photographs (128 x 128 pixels) or drawn scenes (64 x 64): everything"
                " works with it at once, without a download or a GPU."
            ),
            inputs=[
                io.Combo.Input(
                    "world",
                    options=[name for name, world in WORLDS.items() if world.models],
                    default="drawn",
                    optional=True,
                    tooltip=(
                        "photo knows photographs, drawn the scenes of Drawn World Scenes. Use the world of the"
                        " inversion model."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The base model, for KSampler (sampler ddim, scheduler simple).",
                ),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="Its one prompt, for FeatInv ControlNet."
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="The empty prompt, for FeatInv ControlNet."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Its autoencoder, for VAE Decode and VAE Encode."),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="An empty latent of its own size, for KSampler. Several pictures: Repeat Latent Batch.",
                ),
            ],
        )

    @classmethod
    def execute(cls, world: str = "drawn") -> io.NodeOutput:
        from ..host import worlds

        chosen = WORLDS[world]
        vae = worlds.load_vae(chosen)
        positive, negative = worlds.load_conditioning(chosen)
        return io.NodeOutput(
            worlds.load_model(chosen, vae),
            positive,
            negative,
            worlds.as_host_vae(vae),
            worlds.empty_latent(chosen, vae),
        )


class TinyWorldScenes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInv_TinyWorldScenes",
            display_name="Drawn World Scenes",
            category=CATEGORY,
            description="Draws scenes of the drawn world that no model has seen in training: pictures to invert.",
            inputs=[
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Number of the first scene. The same number always gives the same scene.",
                ),
                io.Int.Input("count", default=1, min=1, max=64, tooltip="How many scenes, one after the other."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scenes, 64 x 64 pixels."),
                io.Mask.Output("mask", display_name="mask", tooltip="Where the first object of each scene is."),
            ],
        )

    @classmethod
    def execute(cls, first: int, count: int) -> io.NodeOutput:
        from ..worlds.drawn.scenes import draw

        if count < 1:
            raise FeatInvError(f"count {count}: expected at least one scene")
        scenes = draw(0, torch.arange(first, first + count), "held-out")
        return io.NodeOutput(channels_last(scenes.image), scenes.masks[:, 0])


NODES = [LoadBackbone, LoadFeatInvControlNet, LoadTinyWorld, TinyWorldScenes]
