"""Nodes that show: similarity, principal components, classes."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .types import Backbone, Features, Menu, channels_first, channels_last, schema


class FeatureSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_FeatureSimilarity",
            display_name="Feature Similarity",
            category=Menu.LOOK,
            aliases=("cosine", "compare", "fidelity"),
            says=True,
            description=(
                "Measures how faithful a reconstruction is: writes the cosine similarity between its features and the"
                " target feature map under the image."
            ),
            inputs=[
                Features.Input(
                    "features",
                    tooltip=(
                        "The target feature map: one for all images, or one per image. Fewer maps are repeated in turn."
                    ),
                ),
                Backbone.Input("backbone", tooltip="The backbone that made the features."),
                io.Image.Input("image", tooltip="The reconstruction, one image or a batch."),
            ],
            outputs=[
                io.Image.Output(
                    "captioned",
                    display_name="captioned",
                    tooltip="The images with their cosine similarity below, as in the paper's figures.",
                ),
                io.Image.Output(
                    "map", display_name="map", tooltip="The cosine similarity at each location, dark 0 to bright 1."
                ),
                io.Float.Output(
                    "cosine",
                    display_name="cosine",
                    tooltip="Mean cosine similarity over images and locations, -1 to 1.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, features, backbone, image) -> io.NodeOutput:
        from ..core.metrics import cosine_per_location
        from ..core.pictures import captioned, enlarge, heat_map

        pictures = channels_first(image).cpu()
        features = features.in_turn(len(pictures))  # as the pictures were drawn
        again = backbone.read_again(pictures, features.source)
        similarity = cosine_per_location(features, again)
        scores = similarity.mean((1, 2))
        lines = [f"cosine {score:.3f}" for score in scores.tolist()]
        mean = scores.mean().item()
        text = lines[0] if len(lines) == 1 else "\n".join([f"mean cosine {mean:.3f}", *lines])
        return io.NodeOutput(
            channels_last(captioned(pictures, lines)),
            channels_last(enlarge(heat_map(similarity))),
            mean,
            ui=ui.PreviewText(text),
        )


class PreviewFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_PreviewFeatures",
            display_name="Preview Features",
            category=Menu.LOOK,
            aliases=("PCA", "false colours", "heatmap"),
            description=(
                "Shows feature maps in false colours: their three principal components as red, green and blue."
                " Similar colours mean similar features. Pooled features, which have no locations, are shown as bars,"
                " one per channel."
            ),
            inputs=[Features.Input("features", tooltip="One feature map or a batch; a batch shares its colours.")],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The maps in false colours, or as bars.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, features) -> io.NodeOutput:
        from ..core.pictures import preview

        image = channels_last(preview(features))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class ClassifyImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_ClassifyImage",
            display_name="Classify Image",
            category=Menu.LOOK,
            aliases=("resnet", "imagenet", "predict", "labels"),
            says=True,
            description="Names the most probable classes of an image, by the backbone's own classifier.",
            inputs=[
                Backbone.Input("backbone", tooltip="The vision model, from Load Backbone or FeatInv Loader."),
                io.Image.Input("image", tooltip="One image or a batch."),
                io.Combo.Input(
                    "fit",
                    options=["crop", "stretch"],
                    default="stretch",
                    tooltip=(
                        "Centre crop as in the model's own evaluation, or the whole image stretched (right for"
                        " reconstructions)."
                    ),
                ),
                io.Int.Input(
                    "top", default=1, min=1, max=10, tooltip="How many classes to name, of each group of labels."
                ),
            ],
            outputs=[
                io.Image.Output(
                    "captioned", display_name="captioned", tooltip="The images, the most probable class below each."
                ),
                io.String.Output(
                    "classes", display_name="classes", tooltip="A line per image: classes with their probabilities."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, backbone, image, fit, top) -> io.NodeOutput:
        from ..core.pictures import captioned

        backbone.backbone.require_classes()
        pictures = channels_first(image).cpu()
        logits = backbone.logits(backbone.extract(backbone.preprocess(pictures, fit)))
        best = backbone.backbone.top_classes(logits, top)
        lines = ["; ".join(f"{name} {share:.0%}" for name, share in row) for row in best]
        firsts = [
            ", ".join(name.split(": ")[-1] for name, _ in row) for row in backbone.backbone.top_classes(logits, 1)
        ]
        classes = "\n".join(lines)
        return io.NodeOutput(channels_last(captioned(pictures, firsts)), classes, ui=ui.PreviewText(classes))


NODES = [FeatureSimilarity, PreviewFeatures, ClassifyImage]
