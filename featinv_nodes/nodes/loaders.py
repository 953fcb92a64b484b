"""Nodes that open models: backbones and inversion models."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import folders
from ..worlds import BACKBONES, MODELS
from .types import Backbone, Control, Menu, schema


class LoadBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [name + folders.EMBEDDED for name in BACKBONES] + folders.names(folders.BACKBONES)
        return schema(
            node_id="FeatInv_LoadBackbone",
            display_name="Load Backbone",
            category=Menu.LOAD,
            aliases=("resnet", "convnext", "vit", "image classifier"),
            says=True,
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
                        "The timm name, architecture.tag, such as convnext_base.fb_in22k_ft_in1k. If empty, the"
                        " file's name or the folder's configuration is used. Ignored for embedded models."
                    ),
                ),
                io.Int.Input(
                    "input_size",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Side of the model's input in pixels; 0 for the model's own. The paper's ConvNeXt uses 288."
                        " Must be the size that the inversion model was trained with."
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
                    tooltip="The names of the layers that Extract Features can read, one per line.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, timm_name: str, input_size: int) -> str:
        return folders.modified(folders.BACKBONES, weights)

    @classmethod
    def execute(cls, weights: str, timm_name: str, input_size: int) -> io.NodeOutput:
        from ..host import backbones
        from ..host.models import ManagedBackbone

        backbone = backbones.open_file(weights, timm_name, input_size)
        height, width = backbone.input_size
        said = f"{backbone.name} reads {height} x {width} pixels\nlayers: {', '.join(backbone.layers)}"
        return io.NodeOutput(ManagedBackbone(backbone), "\n".join(backbone.layers), ui=ui.PreviewText(said))


class LoadFeatInvControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [name + folders.EMBEDDED for name in MODELS] + folders.names(folders.CONTROLS)
        return schema(
            node_id="FeatInv_LoadFeatInvControlNet",
            display_name="Load FeatInv ControlNet",
            category=Menu.LOAD,
            aliases=("inversion model", "resnet"),
            says=True,
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
                io.Boolean.Input(
                    "other_weights",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Allows a backbone or a base model with other weights than the inversion model was trained"
                        " with, such as a fine-tune of the same name. Images may be less faithful."
                    ),
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
                        "What the model inverts, its base model and prompt, the recommended settings of FeatInv"
                        " ControlNet, KSampler and Feature Guidance, and the size it was trained with. The node shows"
                        " it."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, weights: str, other_weights: bool = False) -> str:
        return folders.modified(folders.CONTROLS, weights)

    @classmethod
    def execute(cls, weights: str, other_weights: bool = False) -> io.NodeOutput:
        from ..host.about import about
        from ..host.controlnet import load_feature_control

        control = load_feature_control(folders.located(folders.CONTROLS, weights, MODELS), other_weights)
        text = about(control.info, other_weights)
        return io.NodeOutput(control, text, ui=ui.PreviewText(text))


NODES = [LoadBackbone, LoadFeatInvControlNet]
