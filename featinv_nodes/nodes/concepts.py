"""Nodes that decompose feature maps into concepts, turn concepts down, and show where they are active."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.viz import FACTOR, edit, parse_groups
from ..host import folders
from ..worlds import CONCEPTS
from .types import WITHOUT_MODEL, Change, ConceptSet, Control, Features, Menu, channels_last, schema

SHIPPED = [name + folders.EMBEDDED for name in CONCEPTS]


class LoadConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_LoadConcepts",
            display_name="Load Concepts",
            category=Menu.CONCEPTS,
            aliases=("open concepts",),
            says=True,
            description="Opens a concept file: groups of directions in the feature space of one backbone and layer.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*SHIPPED, *folders.names(folders.CONCEPTS)],
                    default=SHIPPED[0],
                    tooltip="A concept file in models/featinv_concepts, or an embedded one.",
                ),
            ],
            outputs=[
                ConceptSet.Output(
                    "concepts", display_name="concepts", tooltip="The concepts, for Concept Attenuate and Concept Map."
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    tooltip=(
                        "Their numbers and names, one per line. The last is the rest of the features, which no"
                        " concept explains. The node shows them."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return folders.modified(folders.CONCEPTS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ..core.concepts import load_concepts

        concepts = load_concepts(folders.located(folders.CONCEPTS, file, CONCEPTS))
        names = "\n".join(f"{i} {name}" for i, name in enumerate(concepts.names))
        return io.NodeOutput(concepts, names, ui=ui.PreviewText(names))


class ConceptAttenuate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_ConceptAttenuate",
            display_name="Concept Attenuate",
            category=Menu.CONCEPTS,
            aliases=("steer", "suppress", "ablate", "remove concept", "erase"),
            says=True,
            description=(
                "Turns concepts in a feature map down or up. Invert the result to see what the concept means to the"
                " model."
            ),
            inputs=[
                Features.Input("features", tooltip="The feature map, from the backbone and layer of the concepts."),
                ConceptSet.Input("concepts", tooltip="From Load Concepts or Discover Concepts."),
                io.String.Input(
                    "names",
                    default="0",
                    tooltip=(
                        "Which concepts to change, by number or name. Commas join concepts that change together."
                        " Semicolons separate variants, each with its own feature map."
                    ),
                ),
                io.Float.Input(
                    "factor",
                    default=FACTOR,
                    min=0.0,
                    max=4.0,
                    step=0.01,
                    tooltip=(
                        "What the concept is multiplied by: 0.25 as in the paper, 0 removes it, 1 changes nothing."
                        " Above 1 the map may no longer be like that of any image."
                    ),
                ),
                io.Boolean.Input(
                    "keep_length",
                    default=True,
                    tooltip=(
                        "For factors above 1: scales feature vectors that grow back to their old length. The map"
                        " stays more like those of real images, and the concept grows by less than the factor."
                    ),
                ),
                Control.Input(
                    "control_net",
                    optional=True,
                    tooltip="The inversion model. Its scope statistics then rate the changed map.",
                ),
            ],
            outputs=[
                Features.Output(
                    "attenuated",
                    display_name="features",
                    tooltip="The changed feature map, or a batch of the variants in turn.",
                ),
                Change.Output(
                    "edit",
                    display_name="edit",
                    tooltip="Which concepts were changed and how, for Paired Latents and FeatInv-Viz.",
                ),
                io.String.Output(
                    "scope",
                    display_name="scope",
                    tooltip=(
                        "Whether the changed map is like those of held-out images, and if not, what is unusual"
                        " about it. The node shows it."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, features, concepts, names, factor, keep_length, control_net=None) -> io.NodeOutput:
        change = edit(features, concepts, parse_groups(names), factor, keep_length)
        scope = control_net.evaluate(change.changed) if control_net else WITHOUT_MODEL
        return io.NodeOutput(change.changed, change, scope, ui=ui.PreviewText(scope))


class ConceptMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_ConceptMap",
            display_name="Concept Map",
            category=Menu.CONCEPTS,
            aliases=("heatmap", "heat map", "saliency"),
            description=(
                "Shows where each concept is active in a feature map: a heat map per concept, with its name and"
                " largest share below."
            ),
            inputs=[
                Features.Input("features", tooltip="The feature map. The first one of a batch is shown."),
                ConceptSet.Input("concepts", tooltip="From Load Concepts or Discover Concepts."),
            ],
            outputs=[
                io.Image.Output(
                    "maps",
                    display_name="maps",
                    tooltip=(
                        "A heat map per concept, and last the rest. Dark is 0, bright is 1, the length of the"
                        " image's longest feature vector."
                    ),
                )
            ],
        )

    @classmethod
    def execute(cls, features, concepts) -> io.NodeOutput:
        from ..core.pictures import captioned, heat_map

        activation = concepts.activation(features)[:, 0]
        captions = [f"{name} {peak:.2f}" for name, peak in zip(concepts.names, activation.amax((1, 2)).tolist())]
        return io.NodeOutput(channels_last(captioned(heat_map(activation), captions)))


NODES = [LoadConcepts, ConceptAttenuate, ConceptMap]
