"""The node that searches for the factor that gives a concept the requested strength in the image."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.viz import ROUNDS, Visualization
from .types import Backbone, Change, Features, Menu, channels_last, schema


class ClosedLoop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_ClosedLoop",
            display_name="Concept Closed Loop",
            category=Menu.CONCEPTS,
            aliases=("attenuate", "steer", "slope"),
            says=True,
            description=(
                "Searches for the factor that gives the requested strength of a concept in the image: samples,"
                " lets the backbone read the image again, and tries another factor. It uses the connected guider,"
                " sampler and noise."
            ),
            inputs=[
                Change.Input("edit", tooltip="From Concept Attenuate, for a single feature map: the requested change."),
                Backbone.Input("backbone", tooltip="The backbone of the features; it reads the images again."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                io.Noise.Input("noise", tooltip="From RandomNoise. Every round begins with the same noise."),
                io.Guider.Input(
                    "guider",
                    tooltip=(
                        "From CFG Guider or another guider, with the conditionings of FeatInv ControlNet. Each round"
                        " replaces that node's feature maps by its own."
                    ),
                ),
                io.Sampler.Input(
                    "sampler",
                    tooltip=(
                        "From KSamplerSelect. Use a sampler that adds no noise, such as ddim or euler, so that rounds"
                        " differ only by their factor."
                    ),
                ),
                io.Sigmas.Input("sigmas", tooltip="From Basic Scheduler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip=(
                        "Empty latents, one per seed: from Empty Latent Image, or Load World's latent through Repeat"
                        " Latent Batch. The result is the mean over the seeds."
                    ),
                ),
                io.Int.Input(
                    "rounds",
                    default=ROUNDS,
                    min=1,
                    max=32,
                    tooltip=(
                        "How many factors to try at most for each variant, beginning with the requested one. The"
                        " search ends with the first that passes. 1 measures the requested factor alone."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The images of the changed map, one per seed. Several variants follow each other.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "A line per variant: the requested factor, the factor applied to get it, the measured slope,"
                        " and the verdict. The node shows it."
                    ),
                ),
                io.Float.Output(
                    "commanded",
                    display_name="commanded",
                    tooltip="The factor that was applied to the feature map. The mean of several variants.",
                ),
                io.Float.Output(
                    "reached",
                    display_name="reached",
                    tooltip=(
                        "The measured slope: the share of the concept that the backbone finds again in the images."
                        " The mean of several variants."
                    ),
                ),
                io.Image.Output(
                    "pictures",
                    display_name="pictures",
                    tooltip="The original once per seed, then each variant once per seed, for FeatInv-Viz.",
                ),
                Features.Output(
                    "features", display_name="features", tooltip="The feature map of each of these images."
                ),
                Change.Output(
                    "commanded_edit",
                    display_name="edit",
                    tooltip="The edit with the maps that were used and the requested factor, for FeatInv-Viz.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, edit, backbone, vae, noise, guider, sampler, sigmas, latent_image, rounds) -> io.NodeOutput:
        import torch

        from ..core.pictures import captioned
        from ..core.viz import as_commanded
        from ..host.closed_loop import CustomSampling, search_factors

        sampling = CustomSampling(noise, guider, sampler, sigmas, latent_image, vae)
        found = search_factors(sampling, backbone, edit, rounds)
        change, pictures = as_commanded(found)
        seeds = len(found[0].original)
        report = "\n".join(one.describe() for one in found)
        commanded, reached = (sum(x) / len(found) for x in zip(*((one.commanded, one.slope.own) for one in found)))
        labelled = captioned(torch.stack([one.changed[0] for one in found]), [caption(one) for one in found])
        shown = ui.PreviewImage(channels_last(labelled), cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(
            channels_last(pictures[seeds:]),
            report,
            commanded,
            reached,
            channels_last(pictures),
            change.paired(seeds),
            change,
            ui=shown,
        )


def caption(one: Visualization) -> str:
    """A variant in three lines: what was requested, applied and measured, and the verdict."""
    asked, reached = one.slope.asked, one.slope.own
    verdict = "as requested" if one.slope.passed else "NOT as requested"
    return f"{one.change.titles()[0]} x{asked:g}\napplied {one.commanded:.2f}, measured {reached:.2f}\n{verdict}"


NODES = [ClosedLoop]
