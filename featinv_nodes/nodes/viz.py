"""FeatInv-Viz (Algorithm 1) around one run of the stock sampler: prepares its inputs and compares its images."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..core.viz import THRESHOLD, Slope
from .types import Backbone, Change, Features, Menu, channels_first, channels_last, schema


class PairedLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_PairedLatents",
            display_name="Paired Latents",
            category=Menu.CONCEPTS,
            aliases=("same noise", "same seed"),
            description=(
                "Prepares FeatInv-Viz: one sampler run inverts the original and every changed feature map from the same"
                " noise."
            ),
            inputs=[
                Change.Input("edit", tooltip="From Concept Attenuate, for a single feature map."),
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "Empty latents of the inversion model's size, one per seed (5 in the paper), for instance"
                        " from Empty Latent for FeatInv."
                    ),
                ),
            ],
            outputs=[
                Features.Output(
                    "features",
                    display_name="features",
                    tooltip="The original map once per seed, then each variant once per seed, for FeatInv ControlNet.",
                ),
                io.Latent.Output(
                    "paired",
                    display_name="latent",
                    tooltip=(
                        "One latent for each of these maps, with the same noise for equal seeds, for KSampler. Use a"
                        " sampler that adds no noise, such as ddim or euler."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, edit, latent) -> io.NodeOutput:
        from ..host.latents import with_equal_noise

        return io.NodeOutput(edit.paired(len(latent["samples"])), with_equal_noise(latent, 1 + len(edit.groups)))


class FeatInvViz(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_Viz",
            display_name="FeatInv-Viz",
            category=Menu.CONCEPTS,
            aliases=("heatmap", "heat map", "attribution", "saliency"),
            says=True,
            description=(
                "Shows which pixels change when a concept is turned down: the median over seeds of the distance"
                " between reconstructions of the original and the changed feature map (the paper's Algorithm 1). Also"
                " says whether the concept changed as much as requested."
            ),
            inputs=[
                io.Image.Input(
                    "pictures",
                    tooltip=(
                        "All images made from Paired Latents: the original once per seed, then each"
                        " variant once per seed."
                    ),
                ),
                Change.Input("edit", tooltip="From Concept Attenuate: the same edit that went into Paired Latents."),
                Backbone.Input("backbone", tooltip="The backbone of the features; it reads the images again."),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Pixels below this share of the largest difference count as unaffected.",
                ),
                Features.Input(
                    "features",
                    optional=True,
                    tooltip="From Paired Latents, optional: checks that there is one image for each map.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "overlay",
                    display_name="overlay",
                    tooltip=(
                        "For each variant, the first reconstruction of the original with unaffected pixels darkened,"
                        " and below it the concept and its slope."
                    ),
                ),
                io.Image.Output(
                    "difference",
                    display_name="difference",
                    tooltip="For each variant, the normalised difference as a heat map.",
                ),
                io.Image.Output(
                    "signed",
                    display_name="signed",
                    tooltip=(
                        "For each variant, how much darker (blue) or brighter (red) each pixel becomes. Full colour"
                        " is the largest change."
                    ),
                ),
                io.Mask.Output("mask", display_name="mask", tooltip="For each variant, the affected pixels."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "A line per variant: the slope (how much of the concept the backbone still finds in the"
                        " images), and whether it is as requested. The node shows it."
                    ),
                ),
                io.Float.Output(
                    "slope",
                    display_name="slope",
                    tooltip=(
                        "The mean slope of the variants: the factor if the images changed as requested, and 1 if"
                        " they did not change."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, pictures, edit, backbone, threshold, features=None) -> io.NodeOutput:
        from ..core import viz
        from ..core.pictures import captioned, diverging, enlarge, heat_map, spotlight
        from ..host.models import stop_if_cancelled

        pictures = channels_first(pictures).cpu().float()
        if features is not None:
            edit.require_pairs(features, len(pictures))
        first, *others = edit.unpaired(pictures)
        reread = backbone.read_again(pictures, edit.original.source).to("cpu")
        slopes = viz.measure_slopes(edit, pictures, reread, stop_if_cancelled)
        distance = torch.stack([viz.difference(first, other) for other in others])
        masks = torch.stack([viz.affected(d, threshold) for d in distance])
        signed = torch.stack([viz.signed_difference(first, other) for other in others])
        limit = signed.abs().amax((1, 2), keepdim=True).clamp(min=1e-3)

        overlay = captioned(spotlight(first[:1], masks), [caption(t, s) for t, s in zip(edit.titles(), slopes)])
        heat = heat_map(torch.stack([viz.normalised(d) for d in distance]))
        images = (channels_last(x) for x in (overlay, enlarge(heat), enlarge(diverging(signed / limit))))
        report = "\n".join(f"{title}: {slope.describe()}" for title, slope in zip(edit.titles(), slopes))
        slope = sum(s.own for s in slopes) / len(slopes)
        return io.NodeOutput(*images, masks, report, slope, ui=ui.PreviewText(report))


def caption(title: str, slope: Slope) -> str:
    """The variant, and on a line of its own its slope with the verdict."""
    return f"{title} x{slope.asked:g}\nslope {slope.own:.2f}, {'as requested' if slope.passed else 'NOT as requested'}"


NODES = [PairedLatents, FeatInvViz]
