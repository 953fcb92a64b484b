"""The node that looks for the factor with which a picture shows what was asked of a concept."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.viz import ROUNDS
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
                "Draws, lets the backbone read the picture again, and commands another factor until the picture shows"
                " the one that was asked of the concept. It draws with the guider, sampler and noise that it is given."
            ),
            inputs=[
                Change.Input("edit", tooltip="From Concept Attenuate, of a single feature map: what is asked."),
                Backbone.Input("backbone", tooltip="The backbone of the features; it reads the pictures again."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                io.Noise.Input("noise", tooltip="From RandomNoise. Every round begins with the same noise."),
                io.Guider.Input(
                    "guider",
                    tooltip=(
                        "From CFG Guider or another, with the conditionings of FeatInv ControlNet. Each round puts its"
                        " own feature maps in place of that node's."
                    ),
                ),
                io.Sampler.Input(
                    "sampler",
                    tooltip=(
                        "From KSamplerSelect. Use a sampler that adds no noise of its own, such as ddim or euler, so"
                        " that rounds differ by their factor alone."
                    ),
                ),
                io.Sigmas.Input("sigmas", tooltip="From Basic Scheduler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip=(
                        "Empty latents, one per seed: from Empty Latent Image, or Load World's latent through Repeat"
                        " Latent Batch. What is reached is the mean over the seeds."
                    ),
                ),
                io.Int.Input(
                    "rounds",
                    default=ROUNDS,
                    min=1,
                    max=32,
                    tooltip=(
                        "How many factors to try at most for each variant, the asked one first. The search ends early"
                        " with the first that passes. 1 draws what was asked and measures it."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The pictures of the changed map, one per seed; of several variants one after the other.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "A line per variant: the factor asked, the one commanded, the one reached, and whether that is"
                        " as asked. The node shows it."
                    ),
                ),
                io.Float.Output(
                    "commanded",
                    display_name="commanded",
                    tooltip="The factor that was commanded; of several variants the mean.",
                ),
                io.Float.Output(
                    "reached",
                    display_name="reached",
                    tooltip=(
                        "The slope: the share of the concept that the backbone finds again in the pictures; of several"
                        " variants the mean."
                    ),
                ),
                io.Image.Output(
                    "pictures",
                    display_name="pictures",
                    tooltip="The original once per seed, then each variant once per seed, for FeatInv-Viz.",
                ),
                Features.Output(
                    "features", display_name="features", tooltip="The map of each of these pictures, as commanded."
                ),
                Change.Output(
                    "commanded_edit",
                    display_name="edit",
                    tooltip="The edit with the maps as commanded and the factor as asked, for FeatInv-Viz.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, edit, backbone, vae, noise, guider, sampler, sigmas, latent_image, rounds) -> io.NodeOutput:
        import torch

        from ..core.pictures import captioned
        from ..core.viz import as_commanded
        from ..host.closed_loop import Sampling, find

        found = find(Sampling(noise, guider, sampler, sigmas, latent_image, vae), backbone, edit, rounds)
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


def caption(one) -> str:  # noqa: ANN001 - core.viz.Visualization
    """A variant in three lines: what was asked, what was commanded and reached, and the verdict."""
    asked, reached = one.slope.asked, one.slope.own
    verdict = "as asked" if one.slope.passed else "NOT as asked"
    return f"{one.change.titles()[0]} x{asked:g}\ncommanded {one.commanded:.2f}, reached {reached:.2f}\n{verdict}"


NODES = [ClosedLoop]
