"""The node that makes feature maps."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.feature_map import FeatureMap
from .types import Backbone, Control, Features, Menu, channels_first, channels_last, schema


class ExtractFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_ExtractFeatures",
            display_name="Extract Features",
            category=Menu.FEATURES,
            aliases=("resnet", "activations", "embedding", "encode image"),
            says=True,
            description="Computes the feature map of an image at a layer of the backbone: what the model sees.",
            inputs=[
                Backbone.Input("backbone", tooltip="The vision model, from Load Backbone or FeatInv Loader."),
                io.Image.Input("image", tooltip="One image or a batch, any size."),
                io.String.Input(
                    "layer",
                    default="last",
                    tooltip=(
                        "'last' is the map that the model's own classifier reads. Connect a backbone to see the list"
                        " of its layers."
                    ),
                ),
                io.Boolean.Input(
                    "pooled",
                    default=False,
                    tooltip=(
                        "Averages over all locations: keeps what is in the image, but not where. Needs an inversion"
                        " model trained on pooled features."
                    ),
                ),
                io.Combo.Input(
                    "fit",
                    options=["crop", "stretch"],
                    default="crop",
                    tooltip=(
                        "How the image is brought to the model's input size: centre crop as in the model's own"
                        " evaluation, or the whole image stretched."
                    ),
                ),
                Control.Input(
                    "control_net",
                    optional=True,
                    tooltip=(
                        "The inversion model that inverts the features. Its layer and pooling replace the two above."
                    ),
                ),
            ],
            outputs=[
                Features.Output("features", display_name="features", tooltip="The feature map of each image."),
                io.Image.Output(
                    "seen", display_name="seen", tooltip="What the model saw: the image at the model's input size."
                ),
            ],
        )

    @classmethod
    def execute(cls, backbone, image, layer, pooled, fit, control_net=None) -> io.NodeOutput:
        if control_net is not None:
            wanted = control_net.info.source
            layer, pooled = wanted.layer, wanted.pooled
            backbone.require(wanted, "the inversion model")
        pixel_values = backbone.preprocess(channels_first(image).cpu(), fit)
        features = backbone.extract(pixel_values, layer.strip(), pooled)
        return io.NodeOutput(features, channels_last(pixel_values), ui=ui.PreviewText(said(features)))


def said(features: FeatureMap) -> str:
    """What the nodes show of feature maps: where they come from, and how many."""
    return features.source.describe() + (f"; {len(features)} maps" if len(features) > 1 else "")


NODES = [ExtractFeatures]
