"""In a host's process: the world of photographs, latents of both worlds, weights in 8 bits."""

from dataclasses import replace
from pathlib import Path

import nodes
import torch
from opening import BASE, SEED, World, relative, run
from sklearn.datasets import load_sample_image

from featinv_nodes.core.files import is_in_8_bits
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import WORLDS, model_file
from training.models.pipeline import InversionPipeline, load_pipeline
from training.models.sampling import noise, sample

FOLDER = Path(BASE, "models", "featinv")
COUNT = 2  # pictures
STEPS = 4


def with_control(name: str) -> InversionPipeline:
    """A shipped model, small random numbers where it has zeros alone, as an untrained one has in its last layers."""
    pipeline = load_pipeline(name)
    torch.manual_seed(0)
    for key, p in pipeline.model.named_parameters():
        if not p.any() and "norm" not in key:
            torch.nn.init.normal_(p, std=0.02)
    pipeline.model.save(FOLDER / f"{name}.safetensors", pipeline.info)
    return load_pipeline(str(FOLDER / f"{name}.safetensors"))


def photographs() -> torch.Tensor:
    """IMAGE [2, h, w, 3]: the two of scikit-learn."""
    return (
        torch.stack([torch.from_numpy(load_sample_image(name).copy()) for name in ("china.jpg", "flower.jpg")]).float()
        / 255
    )


def parity(name: str) -> dict:
    """The workflow's nodes against training/reconstruct.py's: features, latents and pictures of one seed."""
    pipeline = with_control(name)
    source = pipeline.info.source
    model, positive, negative, vae, latent = run("FeatInv_LoadTinyWorld", world="photo")
    backbone, _ = run("FeatInv_LoadBackbone", weights=f"{source.backbone} (embedded)", timm_name="", input_size=0)
    control, _ = run("FeatInv_LoadFeatInvControlNet", weights=f"{name}.safetensors")
    features, seen = run(
        "FeatInv_ExtractFeatures",
        backbone=backbone,
        image=photographs(),
        layer=source.layer,
        pooled=source.pooled,
        fit="crop",
    )
    sampling: Sampling = replace(pipeline.recommended(), steps=STEPS, gradient=0.0, text_guidance=None)
    conditioning = run(
        "FeatInvControlNet",
        positive=positive,
        negative=negative,
        control_net=control,
        features=features,
        strength=sampling.strength,
        start_percent=sampling.start,
        end_percent=sampling.end,
        guide_away_from={"text": "text", "features": "text and features"}[sampling.negative],
    )
    (latents,) = nodes.RepeatLatentBatch().repeat(latent, COUNT)
    (drawn,) = nodes.KSampler().sample(
        model, SEED, sampling.steps, sampling.guidance, "ddim", "simple", *conditioning[:2], latents
    )
    (pictures,) = nodes.VAEDecode().decode(vae, drawn)

    own = pipeline.features(pipeline.backbone.preprocess(photographs().movedim(-1, 1)))
    start = noise(pipeline.base, SEED, COUNT)
    theirs = sample(pipeline.base, pipeline.model, own, start, sampling, pipeline.info.prompt)
    unconditional = sample(pipeline.base, None, None, start, sampling, pipeline.info.prompt)
    return {
        "features": relative(features.values, own.values),
        "latents": relative(drawn["samples"], theirs),
        "pictures": relative(pictures.movedim(-1, 1), pipeline.base.decode(theirs)),
        "control matters": relative(theirs, unconditional),
        "seen": list(seen.shape),
        "drawn": list(pictures.shape),
    }


def latents(world: str) -> dict:
    """What Load World's latent is, and how large the picture is that its own autoencoder makes of it."""
    *_, vae, latent = run("FeatInv_LoadTinyWorld", world=world)
    (picture,) = nodes.VAEDecode().decode(vae, latent)
    return {
        "empty": not latent["samples"].any(),
        "cells": list(latent["samples"].shape),
        "picture": list(picture.shape),
        "side": WORLDS[world].side,
    }


def eight_bits(world: World) -> dict:
    """The drawn world's model as shipped and stored in 8 bits: how alike their pictures are to the features asked
    for."""
    pipeline = load_pipeline("tiny_cnn_last")
    shipped, file = model_file("tiny_cnn_last"), FOLDER / "eight.safetensors"
    leading = pipeline.info.recommended | {"timestep_spacing": "leading"}  # as convert.py records it
    pipeline.model.save(file, replace(pipeline.info, recommended=leading), torch.int8)
    control, about = run("FeatInv_LoadFeatInvControlNet", weights=file.name)
    cosine, pictures = {}, {}
    for name, one in (("shipped", world.control), ("8 bits", control)):
        drawn = world.draw(world.apply(control_net=one), pipeline.recommended().guidance)
        (pictures[name],) = nodes.VAEDecode().decode(world.vae, {"samples": drawn})
        cosine[name] = run(
            "FeatInv_FeatureSimilarity", features=world.features, backbone=world.backbone, image=pictures[name]
        )[2]
    return {
        "stored": is_in_8_bits(file),
        "about": about,
        "size": file.stat().st_size / shipped.stat().st_size,
        "cosine": cosine,
        "moved": relative(pictures["8 bits"], pictures["shipped"]),
    }


def photo(world: World) -> dict:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return {
        "parity": {name: parity(name) for name in ("photo_lite0_blocks4", "photo_lite0_pooled")},
        "latents": {name: latents(name) for name in WORLDS},
        "eight_bits": eight_bits(world),
    }
