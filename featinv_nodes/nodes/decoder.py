"""Feature decoders: an image of a feature map in one pass, without a diffusion model."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import folders
from .types import Backbone, Decoder, Features, Menu, channels_last, schema

ALIASES = ("RAE", "AutoencoderRAE", "representation autoencoder", "DINOv2", "SigLIP", "MAE", "without diffusion")


class LoadFeatureDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_LoadFeatureDecoder",
            display_name="Load Feature Decoder",
            category=Menu.LOAD,
            aliases=ALIASES,
            says=True,
            description=(
                "Opens a decoder that turns feature maps of one backbone into images in one pass: a released one for"
                " DINOv2, SigLIP2 or MAE (diffusers' AutoencoderRAE), or an embedded one. Local files only."
            ),
            inputs=[
                io.Combo.Input(
                    "decoder",
                    options=folders.decoders(),
                    tooltip="A folder in models/featinv_decoders, or an embedded decoder.",
                ),
                Backbone.Input(
                    "backbone",
                    optional=True,
                    tooltip=(
                        "The backbone that the decoder was trained with, from Load Backbone, at the decoder's input"
                        " size: 224 pixels for DINOv2. Embedded decoders work without it."
                    ),
                ),
                io.Boolean.Input(
                    "other_weights",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Allows a backbone with other weights than the decoder was trained with, such as a fine-tune"
                        " of the same name. Images may be less faithful."
                    ),
                ),
            ],
            outputs=[
                Decoder.Output(
                    "feature_decoder", display_name="feature_decoder", tooltip="The decoder, for Decode Features."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, decoder: str, backbone: object = None, other_weights: bool = False) -> str:
        return folders.decoder_modified(decoder)

    @classmethod
    def execute(cls, decoder, backbone=None, other_weights=False) -> io.NodeOutput:
        from ..host.decoders import open_decoder

        opened = open_decoder(decoder, backbone, other_weights)
        return io.NodeOutput(opened, ui=ui.PreviewText(opened.describe()))


class DecodeFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_DecodeFeatures",
            display_name="Decode Features",
            category=Menu.CONTROL,
            aliases=(*ALIASES, "features to image", "reconstruct"),
            description=(
                "Decodes feature maps into images with a feature decoder: one pass, no seed, no diffusion model. The"
                " same map always gives the same image."
            ),
            inputs=[
                Decoder.Input("feature_decoder", tooltip="From Load Feature Decoder."),
                Features.Input(
                    "features",
                    tooltip=(
                        "Feature maps of the decoder's backbone and layer: extracted, mixed, or with concepts turned"
                        " down."
                    ),
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="An image of each feature map.")],
        )

    @classmethod
    def execute(cls, feature_decoder, features) -> io.NodeOutput:
        return io.NodeOutput(channels_last(feature_decoder.decode(features)))


NODES = [LoadFeatureDecoder, DecodeFeatures]
