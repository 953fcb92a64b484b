"""More faithful images inside a host: two guidances, the best of many, guidance by the features' gradient."""

import comfy.sample
import comfy.samplers
import comfy.sd
import nodes
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from opening import SEED, STEPS, World, error_of, relative, run

from featinv_nodes.core.sampling import Sampling
from training.models.pipeline import load_pipeline
from training.models.sampling import noise, sample

BATCH = 3


def by(world: World, guider, conditionings: list, *scales, **options) -> torch.Tensor:
    """Latents that a guider draws, from the same noise as World.draw."""
    made = guider(world.model)
    made.set_conds(*conditionings)
    if scales:
        made.set_cfg(*scales, **options)
    sigmas = comfy.samplers.calculate_sigmas(world.model.get_model_object("model_sampling"), "simple", STEPS)
    latent = torch.zeros(BATCH, 24, 8, 8)
    return made.sample(
        comfy.sample.prepare_noise(latent, SEED),
        latent,
        comfy.samplers.sampler_object("ddim"),
        sigmas,
        disable_pbar=True,
        seed=SEED,
    )


def guiders(world: World) -> dict:
    """Pictures of other guiders against those of KSampler that they must equal, by the arithmetic of each."""
    positive, negative, _, features_only = world.outputs()
    both, one = world.draw((positive, negative), 3.0), world.draw((positive, negative), 1.0)
    three = [positive, features_only, negative]
    calls = []
    hook = world.control.control_model.zero_convs[0].register_forward_hook(lambda *_: calls.append(1))
    equal = by(world, Guider_DualCFG, three, 3.0, 3.0)
    hook.remove()
    twice = world.outputs(*world.outputs(strength=0.3)[:2], strength=0.3)
    return {
        "calls": len(calls),
        "equal scales": relative(equal, both),
        "equal scales, nested": relative(by(world, Guider_DualCFG, three, 1.0, 3.0, nested=True), both),
        "features alone": relative(
            by(world, Guider_DualCFG, three, 0.0, 3.0), world.draw((features_only, negative), 3.0)
        ),
        "text alone": relative(by(world, Guider_DualCFG, three, 3.0, 1.0), world.draw((positive, features_only), 3.0)),
        "no guidance": relative(by(world, Guider_DualCFG, three, 1.0, 1.0), one),
        "two controls": relative(
            by(world, Guider_DualCFG, [twice[0], twice[3], twice[1]], 3.0, 2.0),
            by(world, Guider_DualCFG, [(t := world.outputs(strength=0.6))[0], t[3], t[1]], 3.0, 2.0),
        ),
        "perpendicular": relative(by(world, Guider_PerpNeg, [positive, negative, negative], 3.0, 1.0), both),
        "basic": relative(by(world, Guider_Basic, [positive]), one),
        "swapped": relative(world.draw((negative, positive), 0.0), one),
        "they differ": relative(by(world, Guider_DualCFG, three, 1.0, 3.0), both),
    }


def two_scales(world: World) -> list[dict]:
    """Dual CFG Guider against training/reconstruct.py's two guidances, same file, seed and steps."""
    pipeline = load_pipeline("tiny_cnn_last")
    positive, negative, _, features_only = world.outputs()
    result = []
    for features, text in ((2.0, 1.0), (3.0, 0.0), (1.5, 4.0)):
        ours = by(world, Guider_DualCFG, [positive, features_only, negative], text, features)
        sampling = Sampling(STEPS, 1.0, features, "features", text_guidance=text)
        theirs = sample(
            pipeline.base,
            pipeline.model,
            world.features,
            noise(pipeline.base, SEED, BATCH),
            sampling,
            pipeline.info.prompt,
        )
        result.append({"case": [features, text], "difference": relative(ours, theirs)})
    return result


def decoded(world: World, latents: torch.Tensor) -> torch.Tensor:
    return nodes.VAEDecode().decode(world.vae, {"samples": latents})[0]


def cosine_of(world: World, features, pictures: torch.Tensor) -> float:
    return run("FeatInv_FeatureSimilarity", features=features, backbone=world.backbone, image=pictures)[2]


def best(world: World) -> dict:
    """The best of four pictures of each of two maps, against similarities taken one by one."""
    maps = world.features.select(slice(0, 2))
    pictures = decoded(
        world, world.draw(world.apply(features=maps, strength=0.3), batch=8)
    )  # a weak control: they differ
    inputs = {"features": maps, "backbone": world.backbone}
    scores = [cosine_of(world, maps.select(i % 2), pictures[i : i + 1]) for i in range(8)]
    order = [sorted(range(m, 8, 2), key=lambda i: -scores[i])[:2] for m in (0, 1)]
    kept, text = run("FeatInv_KeepMostSimilar", image=pictures, keep=2, **inputs)
    return {
        "kept": relative(kept, pictures[order[0] + order[1]]),
        "together": cosine_of(world, maps, pictures) - sum(scores) / 8,
        "text": text.splitlines(),
        "expected": [f"number {i}: cosine {scores[i]:.3f}" for i in order[0] + order[1]],
        "uneven": error_of(run, "FeatInv_KeepMostSimilar", image=pictures[:7], keep=1, **inputs),
        "too few": error_of(run, "FeatInv_KeepMostSimilar", image=pictures, keep=5, **inputs),
    }


def guided(world: World, **changes):
    """The world's model with feature guidance."""
    inputs = {
        "model": world.model,
        "vae": world.vae,
        "backbone": world.backbone,
        "features": world.features,
        "step": 0.05,
        "last": 0.5,
    }
    return run("FeatInv_FeatureGuidance", **inputs | changes)


def gradient(world: World) -> dict:
    """Cosine similarities with and without, in one batch and in many, and what the model is afterwards."""
    plain = world.draw(world.apply())
    before, vit = world.model, run("FeatInv_LoadBackbone", weights="tiny-vit (embedded)", timm_name="", input_size=0)[0]
    result = {"bypass": guided(world, step=0.0) is before and guided(world, last=0.0) is before}
    world.model = guided(world)
    moved = world.draw(world.apply())
    dual = by(world, Guider_DualCFG, [(t := world.outputs())[0], t[3], t[1]], 3.0, 3.0)
    with torch.inference_mode(False):  # as the command line loads it
        pipeline = load_pipeline("tiny_cnn_last")
    sampling = Sampling(STEPS, 1.0, 3.0, "features", gradient=0.05, gradient_steps=STEPS // 2)
    theirs = sample(
        pipeline.base,
        pipeline.model,
        world.features,
        noise(pipeline.base, SEED, BATCH),
        sampling,
        pipeline.info.prompt,
        pipeline.backbone,
    )
    world.model = guided(world, model=before, features=world.features.select(0))
    one = world.draw(world.apply(features=world.features.select(0)))
    world.model = before
    return result | {
        "plain": cosine_of(world, world.features, decoded(world, plain)),
        "moved": cosine_of(world, world.features, decoded(world, moved)),
        "command line": relative(moved, theirs),
        "dual": relative(dual, moved),
        "one": relative(one[:1], moved[:1]),
        "after": relative(world.draw(world.apply()), plain),
        "other backbone": error_of(guided, world, features=world.extract(0, 1, backbone=vit)),
        "other vae": error_of(guided, world, vae=comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})),
    }


def scaled(world: World, factor: float = 0.18215, shift: float = 0.7) -> dict:
    """Feature guidance with the embedded world's model and autoencoder as if their latents had a scale and a shift, as
    Stable Diffusion's have: the sampler's own latents, and so the guidance, must be the same."""
    before, vae, form = world.model, world.vae.first_stage_model, world.model.model.latent_format
    world.model = guided(world)
    expected, decode = world.draw(world.apply()), vae.decode
    form.process_in = lambda latent: (latent - shift) * factor
    form.process_out = lambda latent: latent / factor + shift
    vae.decode = lambda z: decode((z - shift) * factor)
    try:
        result = comfy.sample.sample(
            world.model,
            comfy.sample.prepare_noise(torch.zeros(BATCH, 24, 8, 8), SEED),
            STEPS,
            3.0,
            "ddim",
            "simple",
            *world.apply(),
            torch.full((BATCH, 24, 8, 8), shift),  # nothing, in these latents
            seed=SEED,
            disable_pbar=True,
        )
    finally:
        del form.process_in, form.process_out, vae.decode
        world.model = before
    return {"same": relative((result - shift) * factor, expected), "scaled": relative(result, expected)}
