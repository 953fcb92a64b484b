"""Nodes that change every vector of a feature map alike: by a linear map, or by the difference of two sets of maps."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.errors import FeatInvError
from ..core.linear_maps import KINDS, arithmetic, from_pairs
from ..host import folders
from .types import WITHOUT_MODEL, Control, Features, Linear, Menu, schema

NOTHING_SAVED = "(nothing saved yet: use Linear Map from Pairs)"


class LinearMapFromPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_LinearMapFromPairs",
            display_name="Linear Map from Pairs",
            category=Menu.FEATURES,
            aliases=("rotation", "direction", "style", "Procrustes", "fit linear map"),
            says=True,
            description=(
                "Learns how a change of the image, such as of its colours or style, changes feature vectors, from"
                " maps of images before and after it. Apply Linear Map applies the same change to other maps."
            ),
            inputs=[
                Features.Input("before", tooltip="Feature maps of unchanged images, as a batch. Begin with eight."),
                Features.Input("after", tooltip="Feature maps of the same images, changed, in the same order."),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip=(
                        "affine follows the change best, even with few pairs. rotation keeps the length of every"
                        " vector. direction adds one vector everywhere."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip=(
                        "Saves the map under this name in models/featinv_linear_maps, for Load Linear Map, and"
                        " replaces a file of that name. Empty: not saved."
                    ),
                ),
            ],
            outputs=[
                Linear.Output("linear_map", display_name="linear map", tooltip="The map, for Apply Linear Map."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How well the map predicts the changed features, on held-out pairs. The node shows it.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, before, after, kind, name) -> io.NodeOutput:
        from ..core.linear_map_files import save_linear_map

        file = folders.to_write(folders.LINEAR_MAPS, name, "Linear Map from Pairs") if name.strip() else None
        linear = from_pairs(before, after, kind)
        if file:
            save_linear_map(file, linear)
        text = linear.report() + (f"\nsaved as {file.name}\nPress R to see it in Load Linear Map." if file else "")
        return io.NodeOutput(linear, text, ui=ui.PreviewText(text))


class LoadLinearMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_LoadLinearMap",
            display_name="Load Linear Map",
            category=Menu.FEATURES,
            aliases=("rotation", "direction", "style"),
            says=True,
            description="Opens a linear map of feature space that Linear Map from Pairs or fit_linear_map.py wrote.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.names(folders.LINEAR_MAPS) or [NOTHING_SAVED],
                    tooltip="A file in models/featinv_linear_maps. Press R after saving one.",
                )
            ],
            outputs=[
                Linear.Output("linear_map", display_name="linear map", tooltip="The map, for Apply Linear Map."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What the map changes, and how well it does so on held-out images. The node shows it.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return folders.modified(folders.LINEAR_MAPS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ..core.linear_map_files import load_linear_map

        if file == NOTHING_SAVED:
            raise FeatInvError(
                "Load Linear Map: there is no file yet; save one with Linear Map from Pairs, and press R"
            )
        linear = load_linear_map(folders.path(folders.LINEAR_MAPS, file))
        return io.NodeOutput(linear, linear.report(), ui=ui.PreviewText(linear.report()))


class ApplyLinearMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_ApplyLinearMap",
            display_name="Apply Linear Map",
            category=Menu.FEATURES,
            aliases=("rotate features", "steer", "style"),
            says=True,
            description="Changes every vector of a feature map by a linear map. Invert the result to see the change.",
            inputs=[
                Features.Input("features", tooltip="The feature map, from the backbone and layer of the linear map."),
                Linear.Input("linear_map", tooltip="From Linear Map from Pairs or Load Linear Map."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip=(
                        "How much of the change to apply: 0 none, 1 all, -1 the opposite. A rotation turns by this"
                        " share of its angles; the other kinds move this share of the way."
                    ),
                ),
                Control.Input(
                    "control_net",
                    optional=True,
                    tooltip="The inversion model. Its scope statistics then rate the changed map.",
                ),
            ],
            outputs=[
                Features.Output("mapped", display_name="features", tooltip="The changed feature map."),
                io.String.Output(
                    "scope",
                    display_name="scope",
                    tooltip="Whether the changed map is like those of held-out images. The node shows it.",
                ),
            ],
        )

    @classmethod
    def execute(cls, features, linear_map, strength, control_net=None) -> io.NodeOutput:
        mapped = linear_map.apply(features, strength)
        scope = control_net.evaluate(mapped) if control_net else WITHOUT_MODEL
        return io.NodeOutput(mapped, scope, ui=ui.PreviewText(scope))


class FeatureArithmetic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_FeatureArithmetic",
            display_name="Feature Arithmetic",
            category=Menu.FEATURES,
            aliases=("direction", "analogy", "king - man + woman", "add features", "subtract features"),
            description="Adds a direction to a feature map: features + strength x (mean of plus - mean of minus).",
            inputs=[
                Features.Input("features", tooltip="The feature maps to change."),
                Features.Input("plus", tooltip="Maps of what to add: one or a batch, of the same backbone and layer."),
                Features.Input("minus", tooltip="Maps of what to take away: one or a batch."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 adds the whole difference, -1 takes it away.",
                ),
                io.Boolean.Input(
                    "per_location",
                    default=False,
                    tooltip="On: the difference at each location, for matching images. Off: its mean everywhere.",
                ),
            ],
            outputs=[Features.Output("sum", display_name="features", tooltip="The changed feature maps.")],
        )

    @classmethod
    def execute(cls, features, plus, minus, strength, per_location) -> io.NodeOutput:
        return io.NodeOutput(arithmetic(features, plus, minus, strength, per_location))


NODES = [LinearMapFromPairs, LoadLinearMap, ApplyLinearMap, FeatureArithmetic]
