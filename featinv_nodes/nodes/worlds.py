"""Nodes of the embedded worlds: their diffusion models, and scenes to invert."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..core.errors import FeatInvError
from ..worlds import WORLDS
from .types import Menu, channels_last, schema


class LoadTinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_LoadTinyWorld",
            display_name="Load World",
            category=Menu.LOAD,
            aliases=("tiny model", "demo"),
            description=(
                "Opens an embedded diffusion model for photographs (128 x 128 pixels) or drawn scenes (64 x 64),"
                " which needs no download and no GPU."
            ),
            inputs=[
                io.Combo.Input(
                    "world",
                    options=[name for name, world in WORLDS.items() if world.models],
                    default="drawn",
                    optional=True,
                    tooltip=(
                        "photo generates photographs, drawn generates scenes like those of Drawn World Scenes. Use the"
                        " world of the inversion model."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The base model, for KSampler (sampler ddim, scheduler simple).",
                ),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="Its one prompt, for FeatInv ControlNet."
                ),
                io.Conditioning.Output(
                    "negative", display_name="negative", tooltip="The empty prompt, for FeatInv ControlNet."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Its autoencoder, for VAE Decode and VAE Encode."),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="An empty latent of its own size, for KSampler. Several images: Repeat Latent Batch.",
                ),
            ],
        )

    @classmethod
    def execute(cls, world: str = "drawn") -> io.NodeOutput:
        from ..host import worlds

        chosen = WORLDS[world]
        vae = worlds.load_vae(chosen)
        positive, negative = worlds.load_conditioning(chosen)
        return io.NodeOutput(
            worlds.load_model(chosen, vae),
            positive,
            negative,
            worlds.as_host_vae(vae),
            worlds.empty_latent(chosen, vae),
        )


class TinyWorldScenes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_TinyWorldScenes",
            display_name="Drawn World Scenes",
            category=Menu.LOAD,
            aliases=("demo images",),
            description="Draws scenes of the drawn world that no model saw in training, to invert them.",
            inputs=[
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Number of the first scene. The same number always gives the same scene.",
                ),
                io.Int.Input("count", default=1, min=1, max=64, tooltip="How many scenes, one after the other."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scenes, 64 x 64 pixels."),
                io.Mask.Output("mask", display_name="mask", tooltip="Where the first object of each scene is."),
            ],
        )

    @classmethod
    def execute(cls, first: int, count: int) -> io.NodeOutput:
        from ..worlds.drawn.scenes import draw

        if count < 1:
            raise FeatInvError(f"count {count}: expected at least one scene")
        scenes = draw(0, torch.arange(first, first + count), "held-out")
        return io.NodeOutput(channels_last(scenes.image), scenes.masks[:, 0])


NODES = [LoadTinyWorld, TinyWorldScenes]
