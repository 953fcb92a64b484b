"""Describes an inversion model in the words of the host's nodes and widgets."""

from __future__ import annotations

from ..core.sampling import SPACINGS, Sampling
from ..core.weights import InversionInfo
from ..worlds import find_world
from .sizes import trained_size

#: the weights file's name of what guidance pushes away from -> FeatInv ControlNet's guide_away_from
AWAY = {"features": "text and features", "text": "text"}


def about(info: InversionInfo, other_weights: bool = False) -> str:
    """A line each: the features, the base model, the prompt, the settings by the node that has them, and digests of the
    weights where the file states them, or that other weights are allowed."""
    world, name = find_world(info.base["name"]), info.base["name"]
    size = trained_size(info)
    base = f"Load World, world {world.name}" if world else f"Load Checkpoint, {name} or another SD 1.x model"
    digests = {"backbone": info.source.weights, "base model": info.base.get("weights")}
    known = ", ".join(f"{part} {digest}" for part, digest in digests.items() if digest)
    weights = "other weights of the backbone and the base model are allowed" if other_weights else known
    return "\n".join(
        [
            f"inverts {info.source.describe()}",
            f"base model: {base}",
            f"prompt: {info.prompt}",
            *settings(info.recommended),
            f"trained on {info.images_seen:,} images" + (f" at {size.describe()}" if size else ""),
            *([f"weights: {weights}"] if weights else []),
        ]
    )


def settings(recommended: dict) -> list[str]:
    """The settings that a weights file recommends, as lines "node: widget value, ..."."""
    away, steps = recommended.get("negative"), recommended.get("steps")
    step, last = recommended.get("gradient", 0.0), recommended.get("gradient_steps", Sampling.gradient_steps)
    nodes = {
        "FeatInv ControlNet": {
            "strength": recommended.get("strength"),
            "guide_away_from": away and AWAY.get(away, away),
        },
        "KSampler": {
            "steps": steps,
            "cfg": recommended.get("guidance"),
            "sampler_name": "ddim",
            "scheduler": SPACINGS[recommended.get("timestep_spacing", "trailing")],
        },
        "Feature Guidance": {"step": step, "last": min(last / steps, 1)} if step and steps else {},
    }
    given = {node: {k: v for k, v in widgets.items() if v is not None} for node, widgets in nodes.items()}
    return [
        f"{node}: " + ", ".join(f"{name} {f'{value:g}' if isinstance(value, float) else value}" for name, value in of)
        for node, widgets in given.items()
        if (of := widgets.items())
    ]
