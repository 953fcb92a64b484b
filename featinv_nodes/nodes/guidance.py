"""Nodes that make images more like their feature map: guidance by gradient, and the best of many."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .types import Backbone, Features, Menu, channels_first, channels_last, schema


class FeatureGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_FeatureGuidance",
            display_name="Feature Guidance",
            category=Menu.CONTROL,
            aliases=("gradient guidance", "faithful", "cosine"),
            description=(
                "Guides the sampler by the backbone: in the last steps the predicted image is decoded, the backbone"
                " reads it, and the latents move towards the feature map. Slower and more faithful."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model, on its way to the sampler."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                Backbone.Input("backbone", tooltip="The backbone that made the features."),
                Features.Input(
                    "features",
                    tooltip=(
                        "The feature map to move towards: the same as for FeatInv ControlNet. One map serves all"
                        " latents. Fewer maps than latents are repeated in turn; extra maps are ignored."
                    ),
                ),
                io.Float.Input(
                    "step",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How far the latents move at each step, as a share of their own length. 0 turns guidance off."
                    ),
                ),
                io.Float.Input(
                    "last",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the sampler's steps, counted from the end, in which guidance acts.",
                ),
            ],
            outputs=[io.Model.Output("guided", display_name="model", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, model, vae, backbone, features, step, last) -> io.NodeOutput:
        from ..host.guidance import guided

        return io.NodeOutput(guided(model, vae, backbone, features, step, last) if step and last else model)


class KeepMostSimilar(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_KeepMostSimilar",
            display_name="Keep Most Similar",
            category=Menu.LOOK,
            aliases=("best of many", "cosine", "rank"),
            says=True,
            description="Keeps the best of several images: those whose feature maps are most like the target.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="A batch of images of the same features, sampled from different noise."
                ),
                Features.Input(
                    "features",
                    tooltip=(
                        "The target feature map. Each of several maps is compared with its own images, in the order"
                        " in which FeatInv ControlNet gives maps to latents."
                    ),
                ),
                Backbone.Input("backbone", tooltip="The backbone that made the features."),
                io.Int.Input(
                    "keep", default=1, min=1, max=4096, tooltip="How many images to keep of each feature map."
                ),
            ],
            outputs=[
                io.Image.Output("kept", display_name="image", tooltip="The kept images, map by map, the best first."),
                io.String.Output(
                    "cosines",
                    display_name="cosines",
                    tooltip=(
                        "A line per kept image, with its number in the batch (from 0) and its cosine similarity,"
                        " and then the range of all. The node shows it."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, image, features, backbone, keep) -> io.NodeOutput:
        from ..core.metrics import best_rows, cosine

        pictures = channels_first(image).cpu()
        reread = backbone.read_again(pictures, features.source)
        scores = cosine(features.in_turn(len(pictures)), reread)
        rows = best_rows(scores, len(features), keep).tolist()
        lines = [f"number {row}: cosine {scores[row]:.3f}" for row in rows]
        lines.append(f"all {len(scores)}: {scores.min():.3f} to {scores.max():.3f}, mean {scores.mean():.3f}")
        cosines = "\n".join(lines)
        return io.NodeOutput(channels_last(pictures[rows]), cosines, ui=ui.PreviewText(cosines))


NODES = [FeatureGuidance, KeepMostSimilar]
