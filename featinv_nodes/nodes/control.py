"""The node that steers the sampler towards a feature map."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .types import Control, Features, Menu, schema


class FeatInvControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInvControlNet",
            display_name="FeatInv ControlNet",
            category=Menu.CONTROL,
            aliases=("apply controlnet", "reconstruct", "invert features", "image variations", "dream"),
            says=True,
            description=(
                "Steers the sampler towards a feature map, as Apply ControlNet steers towards a hint image. Chains"
                " with other ControlNets in either order."
            ),
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="The positive prompt: Load World's, or the one that the inversion model's loader shows.",
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt: Load World's, or the empty text."),
                Control.Input(
                    "control_net", tooltip="The inversion model, from FeatInv Loader or Load FeatInv ControlNet."
                ),
                Features.Input(
                    "features",
                    tooltip=(
                        "The feature map to invert, from the backbone and layer of the inversion model. A batch gives"
                        " each latent its own map. One map serves all latents. Fewer maps than latents are repeated"
                        " in turn, and extra maps are ignored; the node says so."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Control strength: how strongly the feature map steers the sampler. 0 turns control off.",
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
                        "What guidance (cfg) pushes away from. 'text and features': the prediction without either, as"
                        " trained; more faithful. 'text': the prediction with the negative text and the same"
                        " features, as in the paper."
                    ),
                ),
                io.Combo.Input(
                    "in_areas",
                    options=["whole map in each area", "the area's part"],
                    default="whole map in each area",
                    optional=True,
                    tooltip=(
                        "For conditionings with areas: give each area the whole feature map, as any ControlNet does,"
                        " or only the part of the map that lies in the area."
                    ),
                ),
                io.String.Input(
                    "strength_curve",
                    default="",
                    optional=True,
                    tooltip=(
                        "Factors of the strength, evenly spaced from start to end and interpolated linearly: '1, 0'"
                        " fades out, '0, 1, 0' rises and falls. Empty: the same strength throughout."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where control acts: fully where the mask is white, not at all where it is black. A mask of"
                        " any size covers the whole image. A batch gives each latent its own mask."
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
                        "Whether the feature map is like those of held-out images, and if not, what is unusual"
                        " about it. The node shows it."
                    ),
                ),
                io.Conditioning.Output(
                    "features_only",
                    display_name="features only",
                    tooltip=(
                        "The negative prompt with the features: for cond2 of Dual CFG Guider, which has separate"
                        " guidance scales for features (cfg_cond2_negative) and prompt (cfg_conds)."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        control_net,
        features,
        strength,
        start_percent,
        end_percent,
        guide_away_from,
        in_areas="whole map in each area",
        strength_curve="",
        mask=None,
    ) -> io.NodeOutput:
        from ..host.controlnet import tag_negative
        from ..host.notices import executing_node
        from ..host.steering import Steering, read_curve

        span, curve = (start_percent, end_percent), read_curve(strength_curve)
        steering = Steering(features, strength, span, guide_away_from, in_areas, curve, mask, executing_node())
        control = control_net.applied(steering)
        scope = control.evaluate(features)
        said = ui.PreviewText("\n".join(filter(None, [steering.blocked, scope])))
        if strength == 0:
            return io.NodeOutput(positive, negative, scope, negative, ui=said)
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

        return io.NodeOutput(steered(positive), steered(negative, away=True), scope, steered(negative), ui=said)


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_EmptyLatent",
            display_name="Empty Latent for FeatInv",
            category=Menu.CONTROL,
            aliases=("empty latent image",),
            description=(
                "Makes empty latents of the size that an inversion model was trained with. The model inverts other"
                " sizes less faithfully, and larger ones slowly."
            ),
            inputs=[
                Control.Input(
                    "control_net", tooltip="The inversion model, from FeatInv Loader or Load FeatInv ControlNet."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many images to sample."),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="The empty latents, for KSampler or Paired Latents."
                ),
            ],
        )

    @classmethod
    def execute(cls, control_net, batch_size: int) -> io.NodeOutput:
        from ..host.latents import empty_latents

        return io.NodeOutput(empty_latents(control_net.info, batch_size))


NODES = [FeatInvControlNet, EmptyLatent]
