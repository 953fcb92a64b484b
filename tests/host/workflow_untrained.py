"""The workflow that inverts features with no inversion model."""

from __future__ import annotations

from workflow_parts import ORIGINAL, compare, extract
from workflow_worlds import World


def untrained(world: World) -> str:
    g = world.graph
    backbone = world.backbone(world.kind)
    _, features = extract(world, backbone, 0)
    sampler = g.add("FeatInv_GuidanceSampler", vae=world.vae, backbone=backbone, features=features[0])
    noise = g.add("RandomNoise", noise_seed=7)
    scale = 1.0 if world.embedded else world.settings(world.kind)["guidance"]
    guider = g.add("CFGGuider", model=world.model, positive=world.positive, negative=world.negative, cfg=scale)
    schedule = g.add("BasicScheduler", model=world.model, scheduler="simple", steps=4, denoise=1.0)
    sampled = g.add(
        "SamplerCustomAdvanced",
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=schedule[0],
        latent_image=world.empty(1),
    )
    compare(world, features[0], backbone, g.add("VAEDecode", samples=sampled[0], vae=world.vae)[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    g.needs = world.sized()
    return (
        "**A first image without training.** At each step the predicted image is decoded, the backbone reads"
        " it, and the latents move towards the feature map. More gradients (*cost*) take longer and bring the image"
        " closer. A trained inversion model is faster and more faithful."
    )
