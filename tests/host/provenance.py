"""In a host's process: what is refused, and what goes on, with other weights of the same name."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from opening import BASE, PACK, World, error_of, run

from featinv_nodes.core.files import read_metadata, read_tensors, write_safetensors

LOAD, NAME = "FeatInv_LoadFeatInvControlNet", "tiny_cnn_last (embedded)"


def older_file() -> str:
    """The shipped model as files were before they stated digests."""
    file = Path(BASE, "models", "featinv", "older.safetensors")
    shipped = Path(PACK, "featinv_nodes", "worlds", "drawn", "tiny_cnn_last.safetensors")
    metadata = read_metadata(shipped)
    about = json.loads(metadata["featinv"])
    del about["source"]["weights"], about["base"]["weights"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, read_tensors(shipped), metadata | {"featinv": json.dumps(about)})
    return file.name


def changed(world: World) -> World:
    """The world with a base model of other weights."""
    other = World()
    unet = other.model.model.diffusion_model
    next(unet.parameters()).data.mul_(1.5)
    return other


def provenance(world: World) -> dict[str, str]:
    (known, about), (free, about_free) = run(LOAD, weights=NAME), run(LOAD, weights=NAME, other_weights=True)
    older, _ = run(LOAD, weights=older_file())
    foreign = replace(world.features, source=replace(world.features.source, weights="another"))
    other = changed(world)
    patched = World()
    key = next(k for k in patched.model.model.state_dict() if k.endswith("input_blocks.0.0.weight"))
    patched.model.add_patches({key: (torch.ones_like(patched.model.model.state_dict()[key]),)})

    def picture(opened: World, control, features=world.features) -> str:
        return error_of(lambda: opened.draw(opened.apply(control_net=control, features=features), steps=1))

    return {
        "same": picture(world, known),
        "features": picture(world, known, foreign),
        "features allowed": picture(world, free, foreign),
        "base": picture(other, known),
        "base allowed": picture(other, free),
        "base of an older file": picture(other, older),
        "patched": picture(patched, known),
        "similarity": error_of(
            run,
            "FeatInv_FeatureSimilarity",
            features=foreign,
            backbone=world.backbone,
            image=torch.rand(3, 64, 64, 3),
        ),
        "about": about,
        "about allowed": about_free,
    }
