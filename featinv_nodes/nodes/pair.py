"""The node that opens a backbone and the inversion model of one of its layers together."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.errors import FeatInvError
from ..host import folders, pairs
from ..worlds import MODELS
from .types import Backbone, Control, Menu, schema


class FeatInvLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        models = pairs.listed()
        layer = io.Combo.Input(
            "layer",
            options=list(dict.fromkeys(layer for layers in models.values() for layer in layers)),
            default="last",
            tooltip=(
                "The layer to invert: early layers keep the image, 'last' is what the model's own classifier reads,"
                " 'pooled' loses where things are. The list has the layers with an inversion model."
            ),
        )
        layer.extra_dict = {"layers_of": {backbone: list(layers) for backbone, layers in models.items()}}
        return schema(
            node_id="FeatInv_Loader",
            display_name="FeatInv Loader",
            category=Menu.LOAD,
            aliases=("resnet", "efficientnet", "convnext", "load backbone", "inversion model", "start here"),
            says=True,
            description=(
                "Opens a vision model together with the inversion model of one of its layers. Shows which base model"
                " and settings to use."
            ),
            inputs=[
                io.Combo.Input(
                    "backbone",
                    options=list(models),
                    default="tf_efficientnet_lite0.in1k",
                    tooltip=(
                        "The vision model, by its timm name: embedded, or a file in models/backbones. The list has"
                        " those with an inversion model."
                    ),
                ),
                layer,
            ],
            outputs=[
                Backbone.Output(
                    "backbone_out", display_name="backbone", tooltip="The vision model, for Extract Features."
                ),
                Control.Output(
                    "control_net",
                    display_name="control_net",
                    tooltip="The inversion model, for FeatInv ControlNet and Extract Features.",
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
    def fingerprint_inputs(cls, backbone: str, layer: str) -> str:
        from ..host.backbones import find_weights

        try:
            weights, model = find_weights(backbone), pairs.find(backbone, layer)
        except FeatInvError:  # said by execute
            return ""
        return f"{folders.modified(folders.BACKBONES, weights)} {folders.modified(folders.CONTROLS, model)}"

    @classmethod
    def execute(cls, backbone: str, layer: str) -> io.NodeOutput:
        from ..host.about import about
        from ..host.backbones import open_for
        from ..host.controlnet import load_feature_control
        from ..host.models import ManagedBackbone

        name = pairs.find(backbone, layer)
        control = load_feature_control(folders.located(folders.CONTROLS, name, MODELS))
        opened = open_for(control.info.source)
        text = about(control.info)
        return io.NodeOutput(ManagedBackbone(opened), control, text, ui=ui.PreviewText(text))


NODES = [FeatInvLoader]
