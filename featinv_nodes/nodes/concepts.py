"""Nodes that take feature maps apart into concepts, turn concepts down, and show where they live."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.feature_map import FeatInvError
from ..host import folders
from ..tiny_world import CONCEPTS, FOLDER
from .loaders import modified
from .types import CATEGORY, EMBEDDED, ConceptSet, Features, channels_first, channels_last

SHIPPED = "tiny_cnn_concepts" + EMBEDDED


class LoadConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInv_LoadConcepts",
            display_name="Load Concepts",
            category=CATEGORY,
            description="Opens a concept file: directions in the feature space of one backbone and layer that belong together.",
            inputs=[
                io.Combo.Input("file", options=[SHIPPED, *folders.names(folders.CONCEPTS)], default=SHIPPED, tooltip="A concept file in models/featinv_concepts, or the embedded one."),
            ],
            outputs=[
                ConceptSet.Output("concepts", display_name="concepts", tooltip="The concepts, for Concept Attenuate and Concept Map."),
                io.String.Output("names", display_name="names", tooltip="Their numbers and names, one per line; the last is the rest that no concept explains. Connect Preview Any."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return modified(folders.CONCEPTS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ..core.concepts import load_concepts

        concepts = load_concepts(FOLDER / CONCEPTS if file == SHIPPED else folders.path(folders.CONCEPTS, file))
        return io.NodeOutput(concepts, "\n".join(f"{i} {name}" for i, name in enumerate(concepts.names)))


class ConceptAttenuate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInv_ConceptAttenuate",
            display_name="Concept Attenuate",
            category=CATEGORY,
            description="Turns concepts in a feature map down or up. Invert the result and see what the concept is to the model.",
            inputs=[
                Features.Input("features", tooltip="The feature map, from the backbone and layer of the concepts."),
                ConceptSet.Input("concepts", tooltip="From Load Concepts."),
                io.String.Input("names", default="0", tooltip="Which concepts: numbers or names, separated by commas."),
                io.Float.Input("factor", default=0.25, min=0.0, max=4.0, step=0.01, tooltip="What the concept is multiplied by: 0.25 as in the paper, 0 removes it, 1 changes nothing. Above 1 the map may leave what the inversion model knows."),
            ],
            outputs=[Features.Output("attenuated", display_name="features", tooltip="The changed feature map.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, features, concepts, names, factor) -> io.NodeOutput:  # noqa: ANN001
        chosen = [name.strip() for name in names.split(",") if name.strip()]
        if not chosen:
            raise FeatInvError(f"Concept Attenuate: no concept named; give numbers or names out of {', '.join(concepts.names)}")
        return io.NodeOutput(concepts.scale(features, dict.fromkeys(chosen, factor)))


class ConceptMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInv_ConceptMap",
            display_name="Concept Map",
            category=CATEGORY,
            description="Where each concept is active in a feature map, and how strongly: a heat map per concept, its name and largest share below.",
            inputs=[
                Features.Input("features", tooltip="The feature map; of a batch the first is shown."),
                ConceptSet.Input("concepts", tooltip="From Load Concepts."),
            ],
            outputs=[io.Image.Output("maps", display_name="maps", tooltip="A picture per concept, the rest last; dark 0, bright 1 (the length of the picture's longest feature vector).")],
        )  # fmt: skip

    @classmethod
    def execute(cls, features, concepts) -> io.NodeOutput:  # noqa: ANN001
        from ..core.pictures import captioned, heat_map

        activation = concepts.activation(features)[:, 0]
        captions = [f"{name} {peak:.2f}" for name, peak in zip(concepts.names, activation.amax((1, 2)).tolist())]
        return io.NodeOutput(channels_last(captioned(heat_map(activation), captions)))


class FeatInvViz(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInv_Viz",
            display_name="FeatInv-Viz",
            category=CATEGORY,
            description="Which pixels change when a concept is turned down: the median over seeds of the distance between reconstructions of the original and the attenuated feature map (the paper's Algorithm 1).",
            inputs=[
                io.Image.Input("original", tooltip="Reconstructions of the original map, one per seed (a batch of 5 latents in the paper)."),
                io.Image.Input("attenuated", tooltip="Reconstructions of the attenuated map with the same seed and batch size."),
                io.Float.Input("threshold", default=0.33, min=0.0, max=1.0, step=0.01, tooltip="Share of the largest difference below which a pixel counts as unaffected."),
            ],
            outputs=[
                io.Image.Output("overlay", display_name="overlay", tooltip="The first reconstruction, unaffected pixels darkened."),
                io.Image.Output("difference", display_name="difference", tooltip="The normalised difference as a heat map."),
                io.Mask.Output("mask", display_name="mask", tooltip="The affected pixels."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, original, attenuated, threshold) -> io.NodeOutput:  # noqa: ANN001
        from ..core import pictures, steering

        first = channels_first(original)
        distance = steering.difference(first, channels_first(attenuated))
        mask = steering.affected(distance, threshold)
        shown = first[:1] * (0.25 + 0.75 * mask)
        heat = pictures.heat_map(steering.normalised(distance)[None])
        return io.NodeOutput(channels_last(shown), channels_last(heat), mask[None])


NODES = [LoadConcepts, ConceptAttenuate, ConceptMap, FeatInvViz]
