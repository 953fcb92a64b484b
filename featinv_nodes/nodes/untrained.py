"""The sampler node that inverts features without an inversion model."""

from __future__ import annotations

from comfy_api.latest import io

from .types import Backbone, Features, Menu, schema

OWN = "own settings"


class GuidanceSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_GuidanceSampler",
            display_name="Feature Guidance Sampler",
            category=Menu.CONTROL,
            aliases=("universal guidance", "training-free", "without ControlNet", "recurrence"),
            description=(
                "Inverts a feature map without a trained inversion model: a sampler for SamplerCustomAdvanced that"
                " moves the prediction of any diffusion or flow model towards the features, and takes each step"
                " several times. A trained model is faster and more faithful."
            ),
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip=(
                        "The autoencoder of the guider's model, or a small one for the same latents (Load VAE: taesd,"
                        " taesdxl, taesd3, taef1), which saves time and memory."
                    ),
                ),
                Backbone.Input("backbone", tooltip="The backbone that made the features."),
                Features.Input(
                    "features",
                    tooltip=(
                        "The feature map to invert. One map serves all latents. Fewer maps than latents are repeated in"
                        " turn; extra maps are ignored."
                    ),
                ),
                io.Combo.Input(
                    "cost",
                    options=["quick", "good", "best", OWN],
                    default="quick",
                    tooltip=(
                        "Gradients per image: quick about 60, good about 200, best about 600. Each step is repeated"
                        " as often as they allow; 4 steps in BasicScheduler are best. The inputs below are used only"
                        " with 'own settings'."
                    ),
                ),
                io.Int.Input(
                    "moves", default=4, min=0, max=100, tooltip="Moves in each step, each with a gradient of its own."
                ),
                io.Float.Input(
                    "step",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The length of a move, as a share of the latents' own length.",
                ),
                io.Int.Input(
                    "recurrence",
                    default=4,
                    min=1,
                    max=100,
                    tooltip=(
                        "How often each step is taken, with noise added back in between. Each further time costs as"
                        " much as the first."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the steps before guidance begins.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the steps after which guidance ends.",
                ),
                io.Combo.Input(
                    "distance",
                    options=["cosine", "squared"],
                    default="cosine",
                    tooltip=(
                        "What a move lowers: the cosine distance at each location, or the squared distance, which"
                        " also compares the length of the features."
                    ),
                ),
            ],
            outputs=[io.Sampler.Output("guiding", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, vae, backbone, features, cost, moves, step, recurrence, start_percent, end_percent, distance
    ) -> io.NodeOutput:
        from ..core.universal_guidance import UniversalGuidance, at_cost
        from ..host.universal_guidance import guidance_sampler

        own = UniversalGuidance(moves, step, recurrence, start_percent, end_percent, distance)
        guidance_of = (lambda steps: own) if cost == OWN else (lambda steps: at_cost(cost, steps))
        return io.NodeOutput(guidance_sampler(vae, backbone, features, guidance_of))


NODES = [GuidanceSampler]
