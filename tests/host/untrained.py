"""Features without a trained model inside a host: the sampler against the program, models of flows, masks, errors."""

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from guiding import cosine_of, decoded
from opening import SEED, World, error_of, relative, run

from training.models.untrained import UntrainedSampling, load_untrained

BATCH, STEPS = 3, 2  # which divides the timesteps: host and program round others differently
SETTINGS = {
    "cost": "own settings",
    "moves": 2,
    "step": 0.1,
    "recurrence": 2,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "distance": "cosine",
}


def drawn(world: World, model, callback=None, mask=None, **changes) -> torch.Tensor:
    """Latents as SamplerCustomAdvanced draws them, from the base model alone."""
    inputs = {"vae": world.vae, "backbone": world.backbone, "features": world.features, **SETTINGS, **changes}
    guider = Guider_Basic(model)
    guider.set_conds(world.positive)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    latent = torch.zeros(BATCH, 24, 8, 8)
    noise = comfy.sample.prepare_noise(latent, SEED)
    sampler = run("FeatInv_GuidanceSampler", **inputs)
    return guider.sample(
        noise, latent, sampler, sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=SEED
    )


def no_noise(model):
    """The model with the sampling of one that turns a picture into another."""
    changed = model.clone()

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
            return latent_image

    changed.add_object_patch("model_sampling", Sampling(model.model.model_config))
    return changed


def untrained(world: World) -> dict:
    with torch.inference_mode(False):  # as the command line loads it
        pipeline = load_untrained()
    theirs = pipeline.draw(world.features, UntrainedSampling(2, 0.1, 2, steps=STEPS), SEED)
    seen = []
    ours = drawn(world, world.model, lambda step, clean, x, total: seen.append([step, total, len(clean)]))
    flow = ModelSamplingSD3().patch(world.model, 3.0)[0]
    cosine = lambda latents: cosine_of(world, world.features, decoded(world, latents))  # noqa: E731
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    vit = run("FeatInv_LoadBackbone", weights="tiny-vit (embedded)", timm_name="", input_size=0)[0]
    return {
        "command line": relative(decoded(world, ours).movedim(-1, 1), theirs),
        "noise matters": relative(ours, drawn(world, world.model, recurrence=1)),
        "distance matters": relative(ours, drawn(world, world.model, distance="squared")),
        "callbacks": seen,
        "quick": relative(drawn(world, world.model, cost="quick"), drawn(world, world.model, moves=4, recurrence=8)),
        "plain": cosine(drawn(world, world.model, moves=0)),
        "moved": cosine(ours),
        "flow, plain": cosine(drawn(world, flow, moves=0)),
        "flow, moved": cosine(drawn(world, flow)),
        "masked": drawn(world, world.model, mask=mask)[..., 4:].abs().max().item(),
        "no noise": error_of(drawn, world, no_noise(world.model)),
        "other backbone": error_of(drawn, world, world.model, features=world.extract(0, 1, backbone=vit)),
        "other vae": error_of(drawn, world, world.model, vae=comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})),
    }
