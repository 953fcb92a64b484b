"""Linear maps, arithmetic and several regions by the nodes inside a host, against the method's own functions."""

from pathlib import Path

import folder_paths
import torch
from opening import BASE, NODES, World, error_of, relative, run

from featinv_nodes.core.linear_maps import KINDS, arithmetic, from_pairs
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.mixing import compose, interpolate

MIX = {"mode": "compose", "weight_a": 0.5, "weight_b": 0.5, "steps": 5, "soft_edge": False}
PAIRS, APPLY = "FeatInv_LinearMapFromPairs", "FeatInv_ApplyLinearMap"


def swapped(world: World, first: int, count: int) -> tuple:
    """Maps of scenes, and of the same scenes with red and blue exchanged."""
    image, _ = run("FeatInv_TinyWorldScenes", first=first, count=count)
    return world.extract(first, count), world.extract(first, count, image=image[..., [2, 1, 0]])


def mapping(world: World) -> dict:
    (before, after), (fresh, wanted) = swapped(world, 0, 8), swapped(world, 8, 4)
    vit, _ = run("FeatInv_LoadBackbone", weights="tiny-vit (embedded)", timm_name="", input_size=0)
    foreign = world.extract(0, 1, backbone=vit)
    result = {"differences": {}, "cosines": {"unchanged": cosine(fresh, wanted).mean().item()}}
    for kind in KINDS:
        linear, report = run(PAIRS, before=before, after=after, kind=kind, name=f"swap {kind}")
        mapped, scope = run(APPLY, features=fresh, linear_map=linear, strength=1.0, control_net=world.control)
        expected = from_pairs(before, after, kind).apply(fresh)
        result["differences"][kind] = relative(mapped.values, expected.values)
        result["cosines"][kind] = cosine(mapped, wanted).mean().item()
    names = folder_paths.get_filename_list("featinv_linear_maps")
    opened, opened_report = run("FeatInv_LoadLinearMap", file="swap direction.safetensors")
    inputs = {"features": fresh, "plus": after, "minus": before, "strength": -0.5, "per_location": True}
    return result | {
        "names": sorted(names),
        "folder": [f.name for f in sorted(Path(BASE, "models", "featinv_linear_maps").iterdir())],
        "opened": relative(opened.apply(fresh).values, mapped.values),
        "reports": [report, opened_report],
        "scope": [scope, run(APPLY, features=fresh, linear_map=linear, strength=0.0)[1]],
        "off": run(APPLY, features=fresh, linear_map=linear, strength=0.0)[0].values.equal(fresh.values),
        "arithmetic": relative(
            run("FeatInv_FeatureArithmetic", **inputs).values, arithmetic(fresh, after, before, -0.5, True).values
        ),
        "regions": regions(world),
        "mixes": mixes(world),
        "said": NODES[PAIRS].execute(before=before, after=after, kind="affine", name="").ui.value,
        "other backbone": error_of(run, APPLY, features=foreign, linear_map=linear, strength=1.0),
        "uneven": error_of(run, PAIRS, before=before, after=fresh, kind="affine", name=""),
        "outside": error_of(run, PAIRS, before=before, after=after, kind="affine", name="../../away"),
        "gone": error_of(run, "FeatInv_LoadLinearMap", file="none.safetensors"),
        "nothing saved": error_of(run, "FeatInv_LoadLinearMap", file="(nothing saved yet: use Linear Map from Pairs)"),
    }


def regions(world: World) -> dict:
    """Three maps, two of them in masks that overlap; a mask or a map that is missing."""
    a, b, c = (world.features.select(i) for i in range(3))
    left, top = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    left[:, :, :32], top[:, :32] = 1, 1
    maps = {**MIX, "features_a": a, "features_b": b, "features_c": c, "mask": left}
    values = run("FeatInv_FeatureMix", **maps, mask_c=top, backbone=world.backbone).values[0]
    parts = ((values[:, :4], c.values[0, :, :4]), (values[:, 4:, :4], b.values[0, :, 4:, :4]))
    parts = (*parts, (values[:, 4:, 4:], a.values[0, :, 4:, 4:]))
    return {
        "right": all(one.equal(other) for one, other in parts),
        "no mask": error_of(run, "FeatInv_FeatureMix", **maps),
        "no map": error_of(run, "FeatInv_FeatureMix", **maps, mask_c=top, mask_d=top),
    }


def mixes(world: World) -> dict[str, float]:
    """Each mode of Feature Mix against the method: four weights, a single map beside a batch, a sweep, a soft edge."""
    a, b, c, d = (world.extract(0, 4).select(i) for i in range(4))
    inputs = {**MIX, "mode": "interpolate", "features_a": a, "features_b": b, "weight_a": 0.1, "weight_b": 0.2}
    weighted = {"features_c": c, "weight_c": 0.3, "features_d": d, "weight_d": 0.4}
    one, both = {"features_a": c}, {"features_b": world.features.select(slice(0, 2))}
    half = torch.zeros(1, 64, 64)
    half[..., :28] = 1  # three columns of eight, and half of the fourth
    edge = {"mode": "compose", "mask": half}

    def mixed(**changes):
        return run("FeatInv_FeatureMix", **inputs | changes).values

    return {
        "weights": relative(mixed(**weighted), interpolate([a, b, c, d], [0.1, 0.2, 0.3, 0.4]).values),
        "batch": relative(mixed(**one, **both), c.values / 3 + 2 / 3 * both["features_b"].values),
        "sweep": relative(mixed(mode="sweep", steps=3), torch.cat([a.values, (a.values + b.values) / 2, b.values])),
        "hard": relative(mixed(**edge), compose(b, a, half).values),
        "soft": relative(mixed(**edge, soft_edge=True), compose(b, a, half, True).values),
        "edges differ": relative(mixed(**edge, soft_edge=True), mixed(**edge)),
    }
