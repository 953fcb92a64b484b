"""The node that steers the sampler towards a feature map."""

from __future__ import annotations

from comfy_api.latest import io

from .types import CATEGORY, Control, Features


class FeatInvControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FeatInvControlNet",
            display_name="FeatInv ControlNet",
            category=CATEGORY,
            description=(
                "Steers the sampler towards a feature map, as Apply ControlNet steers towards a hint picture. Chains"
                " with other ControlNets in either order."
            ),
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="The positive prompt: the one in the weights file's 'about', or your own."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt: the empty text."),
                Control.Input("control_net", tooltip="The inversion model, from Load FeatInv ControlNet."),
                Features.Input(
                    "features",
                    tooltip=(
                        "The feature map to draw, from the backbone and layer of the inversion model. A batch gives"
                        " each latent its own map. One map serves all latents, fewer maps than latents are repeated in"
                        " turn, and extra maps are ignored."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Control strength: how much the feature map decides. 0 leaves the sampler alone.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="When control begins, as a share of the sampling process.",
                ),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="When control ends."),
                io.Combo.Input(
                    "guide_away_from",
                    options=["text and features", "text"],
                    default="text and features",
                    tooltip=(
                        "What guidance (cfg) pushes away from: no text and no features (the combination that training"
                        " saw, more faithful), or the negative text with the same features (the paper)."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive_out", display_name="positive", tooltip="For KSampler's positive."),
                io.Conditioning.Output("negative_out", display_name="negative", tooltip="For KSampler's negative."),
                io.String.Output(
                    "scope",
                    display_name="scope",
                    tooltip=(
                        "Whether the feature map is inside what the inversion model knows, and if not, what is unusual"
                        " about it. Connect Preview Any."
                    ),
                ),
                io.Conditioning.Output(
                    "features_only",
                    display_name="features only",
                    tooltip=(
                        "The negative prompt's text with the features: cond2 of Dual CFG Guider, where the features"
                        " (cfg_cond2_negative) and the prompt (cfg_conds) have a guidance scale each."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, positive, negative, control_net, features, strength, start_percent, end_percent, guide_away_from
    ) -> io.NodeOutput:
        from ..host.controlnet import tag_negative

        control = control_net.applied(features, strength, (start_percent, end_percent), guide_away_from)
        scope = control.evaluate(features)
        if strength == 0:
            return io.NodeOutput(positive, negative, scope, negative)
        copies = {}  # one control per chain before it, shared by all outputs so that they stay one batch

        def steered(conditioning: list, away: bool = False) -> list:
            out = []
            for text, options in conditioning:
                before = options.get("control")
                if before not in copies:
                    copies[before] = control.copy().set_previous_controlnet(before)
                out.append(
                    [text, tag_negative({**options, "control": copies[before], "control_apply_to_uncond": False}, away)]
                )
            return out

        return io.NodeOutput(steered(positive), steered(negative, away=True), scope, steered(negative))


NODES = [FeatInvControlNet]
