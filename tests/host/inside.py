"""Runs in a host's environment, in the host's process, and prints one line of JSON: what the tests assert on.

python inside.py HOST_ROOT PACK BASE_DIRECTORY
"""

import asyncio
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from opening import (
    BASE,
    IMPORTED,
    NODES,
    PACK,
    World,
    error_of,
    pack,
    relative,
    run,
)  # before anything else of the host

sys.path[1:1] = [PACK, str(Path(PACK, "tests", "training"))]
import checkpoints
import closing
import comfy.model_management as management
import controlling
import decoding
import guiding
import managing
import mapping
import pairs
import parity
import photo
import provenance
import raw
import torch
import untrained
from PIL import Image


def missing_requirement() -> list[str]:
    """What is logged where timm is not installed."""
    lines, find = [], pack.find_spec
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    pack.find_spec = lambda name: None if name == "timm" else find(name)
    count = len(asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list()))
    pack.find_spec = find
    logging.getLogger().removeHandler(handler)
    return [*lines, f"{count} nodes"]


def scope(world: World) -> dict[str, str]:
    """What the node says of a map: a scene's, one of noise, and with a weights file that holds no statistics."""
    bare = world.control.copy()
    bare.scope = None
    inputs = {
        "positive": world.positive,
        "negative": world.negative,
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "guide_away_from": "text",
    }
    noise = world.features.with_values(
        torch.randn(world.features.values.shape, generator=torch.Generator().manual_seed(0))
    )
    cases = {"scene": (world.control, world.features.select(0)), "noise": (world.control, noise), "none": (bare, noise)}
    return {
        name: run("FeatInvControlNet", control_net=control, features=features, **inputs)[2]
        for name, (control, features) in cases.items()
    }


def interruption(world: World) -> dict:
    """Stopped in the middle, then run again."""
    reference = world.draw(world.apply())

    def stop(step, *rest):
        if step == 3:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()  # as the host's progress bar does

    stopped = error_of(world.draw, world.apply(), callback=stop)
    return {"stopped": stopped, "again": relative(world.draw(world.apply()), reference)}


def features_nodes(world: World) -> dict:
    """Masks come to the map as pictures do, file names are taken as they are, classes belong to their groups."""
    wide, mask = torch.rand(1, 64, 160, 3), torch.zeros(1, 64, 160)
    mask[..., 64:96] = 1  # the middle of the picture, of which a centre crop keeps columns 48 to 112
    a, b = (
        run("FeatInv_ExtractFeatures", backbone=world.backbone, image=x, layer="last", pooled=False, fit="crop")[0]
        for x in (wide, 1 - wide)
    )
    inputs = {"backbone": world.backbone, "image": wide, "layer": "last", "pooled": False, "fit": "stretch"}
    stretched, network = run("FeatInv_ExtractFeatures", **inputs)[0], world.backbone.backbone
    expected = network.extract(network.preprocess(wide.movedim(-1, 1), "stretch"))
    mix = {
        "features_a": a,
        "features_b": b,
        "mode": "compose",
        "weight_a": 0.5,
        "weight_b": 0.5,
        "steps": 5,
        "soft_edge": False,
    }
    composed = run("FeatInv_FeatureMix", **mix, mask=mask, backbone=world.backbone)
    columns = (composed.values == b.values).all(1).all(1)[0].nonzero().flatten().tolist()
    names = [NODES["FeatInv_SaveFeatures"].execute(world.features, "features/cat[1]").ui.value for _ in range(2)]
    picture, _ = run("FeatInv_TinyWorldScenes", first=0, count=1)
    lines = [
        run("FeatInv_ClassifyImage", backbone=world.backbone, image=picture, fit="stretch", top=top)[0]
        for top in (1, 10)
    ]
    said, ranked = [], []
    for fit in ("crop", "stretch"):
        said.append(run("FeatInv_ClassifyImage", backbone=world.backbone, image=wide, fit=fit, top=2)[1])
        logits = network.logits(network.extract(network.preprocess(wide.movedim(-1, 1), fit)))
        ranked.append("; ".join(f"{name} {share:.0%}" for name, share in network.top_classes(logits, 2)[0]))
    pictures = Path(BASE) / "pictures"
    (pictures / "a" / "deep").mkdir(parents=True)
    fingerprints = []
    for file, side in (("a/0.png", 8), ("a/0.png", 9), ("a/deep/1.png", 8)):
        Image.new("RGB", (side, side)).save(pictures / file)
        fingerprints.append(NODES["FeatInv_DiscoverConcepts"].fingerprint_inputs(folder=f'"{pictures}"', name=""))
    three = run("FeatInv_FeatureSimilarity", features=world.features, backbone=world.backbone, image=picture)[2]
    return {
        "fit": [relative(stretched.values, expected.values), relative(stretched.values, a.values)],
        "columns": columns,
        "names": names,
        "folders": len({*fingerprints, NODES["FeatInv_DiscoverConcepts"].fingerprint_inputs(folder=None, name=None)}),
        "caption": relative(lines[1], lines[0]),
        "classes": [said, ranked],
        "similar": three,
        "small mask": error_of(run, "FeatInv_FeatureMix", **mix, mask=torch.zeros(1, 64, 160), backbone=world.backbone),
        "masks": error_of(run, "FeatInv_FeatureMix", **mix, mask=torch.ones(2, 64, 160), backbone=world.backbone),
    }


def bad_inputs(world: World, folder: Path) -> dict[str, str]:
    """The message of each mistake."""
    weights = folder / "models" / "featinv"
    weights.mkdir(parents=True, exist_ok=True)
    shipped = Path(PACK, "featinv_nodes", "worlds", "drawn", "tiny_cnn_last.safetensors").read_bytes()
    (weights / "cut.safetensors").write_bytes(shipped[:100_000])
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, weights / "foreign.safetensors")
    vit, _ = run("FeatInv_LoadBackbone", weights="tiny-vit (embedded)", timm_name="", input_size=0)
    control = sys.modules["pack of any name.featinv_nodes.host.controlnet"]
    change, several = (
        pairs.edited(world, "object; sky; 3")[1],
        pairs.edited(world, "object", features=world.features)[1],
    )
    other, _ = run("FeatInv_LoadFeatInvControlNet", weights="tiny_vit_last (embedded)")
    broken = world.features.values.index_fill(1, torch.tensor([0]), float("nan"))
    wide = world.control.copy()
    wide.info = replace(
        world.control.info, base={**world.control.info.base, "name": "MiniSD", "width": 320, "context": 768}
    )
    load = "FeatInv_LoadFeatInvControlNet"
    return {
        "other backbone": error_of(world.apply, features=world.extract(0, 1, backbone=vit)),
        "other layer": error_of(world.apply, features=world.extract(0, 1, layer="layer2")),
        "other pooling": error_of(world.apply, features=world.extract(0, 1, pooled=True)),
        "unknown layer": error_of(world.extract, 0, 1, layer="layer9"),
        "other normalisation": error_of(
            world.apply, features=replace(world.features, source=replace(world.features.source, mean=(0.4, 0.4, 0.4)))
        ),
        "nan": error_of(replace, world.features, values=broken),
        "base model": error_of(world.draw, world.apply(control_net=wide)),
        "concepts": error_of(pairs.edited, world, "0", features=world.extract(0, 1, backbone=vit)),
        "concept number": error_of(pairs.edited, world, "99"),
        "no concept": error_of(pairs.edited, world, " ; ,"),
        "judged by another": error_of(pairs.edited, world, "0", control_net=other),
        "several maps": error_of(
            run, "FeatInv_PairedLatents", edit=several, latent={"samples": torch.zeros(2, 4, 8, 8)}
        ),
        "several maps shown": error_of(
            run, "FeatInv_Viz", pictures=torch.rand(6, 64, 64, 3), edit=several, backbone=world.backbone, threshold=0.33
        ),
        "pictures": error_of(
            run, "FeatInv_Viz", pictures=torch.rand(5, 64, 64, 3), edit=change, backbone=world.backbone, threshold=0.33
        ),
        "read by another": error_of(
            run, "FeatInv_Viz", pictures=torch.rand(4, 64, 64, 3), edit=change, backbone=vit, threshold=0.33
        ),
        "truncated": error_of(control.load_feature_control, weights / "cut.safetensors"),
        "foreign": error_of(control.load_feature_control, weights / "foreign.safetensors"),
        "missing": error_of(run, load, weights="none.safetensors"),
        "no mask": error_of(
            run,
            "FeatInv_FeatureMix",
            features_a=world.features,
            features_b=world.features,
            mode="compose",
            weight_a=0.5,
            weight_b=0.5,
            steps=5,
            soft_edge=False,
        ),
        "mixed sources": error_of(
            run,
            "FeatInv_FeatureMix",
            features_a=world.features,
            features_b=world.extract(0, 3, layer="layer2"),
            mode="interpolate",
            weight_a=0.5,
            weight_b=0.5,
            steps=5,
            soft_edge=False,
        ),
    }


def main() -> None:
    folder = Path(BASE)
    with torch.inference_mode():
        world = World()
        strengthless = world.apply(strength=0.0)
        result = {
            "imported": sorted(IMPORTED),
            "nodes": sorted(NODES),
            "bypass": strengthless[0] is world.positive and strengthless[1] is world.negative,
            "missing": missing_requirement(),
            "parity": parity.parity(world),
            "stacking": parity.stacking(world),
            "counts": parity.counts(world),
            "guiders": guiding.guiders(world),
            "two_scales": guiding.two_scales(world),
            "best": guiding.best(world),
            "gradient": guiding.gradient(world),
            "scaled": guiding.scaled(world),
            "untrained": untrained.untrained(world),
            "mapping": mapping.mapping(world),
            "checkpoints": checkpoints.checkpoints(world),
            "closed_loop": closing.closed_loop(world),
            "cancelled": closing.cancelled(world),
            "scope": scope(world),
            "paired": pairs.paired(world),
            "batches": parity.batches(world),
            "controlling": controlling.controlling(world, pairs.edited),
            "interruption": interruption(world),
            "memory": managing.memory(world),
            "encoded": managing.encoded(world),
            "unloading": managing.unloading(world),
            "low_memory": managing.low_memory(world),
            "features_nodes": features_nodes(world),
            "bad_inputs": bad_inputs(world, folder),
            "photo": photo.photo(world),
            "decoding": decoding.decoding(world),
            "provenance": provenance.provenance(world),
            "raw": raw.raw(),
        }
    result["real_size"] = parity.real_size(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
