"""The closed loop inside a host, against the command line's; and that the user can cancel what takes long."""

import comfy.model_management as management
import comfy.samplers
import nodes
import torch
import untrained
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from opening import SEED, STEPS, World, error_of, run

from featinv_nodes.core import viz
from featinv_nodes.core.sampling import Sampling
from training.concepts.viz import visualize
from training.models.pipeline import load_pipeline

GUIDANCE, SEEDS = 3.0, 2


def edit_of(world: World, names: str, factor: float):
    concepts, _ = run("FeatInv_LoadConcepts", file="tiny_cnn_concepts (embedded)")
    one = world.features.select(0)
    return run(
        "FeatInv_ConceptAttenuate", features=one, concepts=concepts, names=names, factor=factor, keep_length=True
    )[1]


def loop(world: World, change, **changes):
    """Concept Closed Loop's outputs; its guider steers towards another map, which it is to replace."""
    guider = comfy.samplers.CFGGuider(world.model)
    guider.set_conds(*changes.pop("conditioning", world.apply()))
    guider.set_cfg(GUIDANCE)
    inputs = {
        "edit": change,
        "backbone": world.backbone,
        "vae": world.vae,
        "noise": Noise_RandomNoise(SEED),
        "guider": guider,
        "sampler": comfy.samplers.sampler_object("ddim"),
        "sigmas": comfy.samplers.calculate_sigmas(world.model.get_model_object("model_sampling"), "simple", STEPS),
        "latent_image": nodes.EmptyLatentImage().generate(64, 64, SEEDS)[0],
        "rounds": 3,
    }
    return run("FeatInv_ClosedLoop", **inputs | changes)


def closed_loop(world: World) -> dict:
    """Commanded factors, slopes and pictures against training/concepts/viz.py's, what FeatInv-Viz says; mistakes."""
    groups, result = [["object"], ["sky", "night"]], {}
    pipeline, sampling = load_pipeline("tiny_cnn_last"), Sampling(STEPS, 1.0, GUIDANCE, "features")
    for rounds in (1, 3):
        change = edit_of(world, "object; sky, night", 0.25)
        image, report, commanded, reached, pictures, maps, drawn = loop(world, change, rounds=rounds)
        settings = viz.VizSettings(0.25, SEEDS, SEED, keep_length=True, rounds=rounds)
        theirs = visualize(pipeline, change.original, change.concepts, groups, settings, sampling)
        expected = torch.cat([theirs[0].original, *(one.changed for one in theirs)]).movedim(1, -1)
        said = run("FeatInv_Viz", pictures=pictures, edit=drawn, backbone=world.backbone, threshold=0.33)
        result[str(rounds)] = {
            "rounds": [one.rounds for one in theirs],
            "commanded": [commanded, sum(one.commanded for one in theirs) / 2],
            "reached": [reached, sum(one.slope.own for one in theirs) / 2, said[5]],
            "report": [report.splitlines(), [one.describe() for one in theirs]],
            "pictures": float((pictures - expected).abs().max()),
            "image": torch.equal(image, pictures[SEEDS:]),
            "maps": float((maps.values - torch.cat([m.values for m in paired(theirs)])).abs().max()),
        }
    bare = loop_error(world, change, conditioning=(world.positive, world.negative))
    several = loop_error(world, viz.edit(world.features, change.concepts, [["sky"]]))
    return result | {"no control": bare, "several maps": several}


def paired(found: list) -> list:
    return [found[0].change.original.repeat(SEEDS), *(one.change.changed.repeat(SEEDS) for one in found)]


def loop_error(world: World, change, **changes) -> str:
    return error_of(loop, world, change, **changes)


def cancelled(world: World) -> dict:
    """Each long node, cancelled when it asks for the n-th time: what it ends with, and how often it asked behind that
    and in all."""
    images, _ = run("FeatInv_TinyWorldScenes", first=0, count=24)
    inputs = {"backbone": world.backbone, "layer": "last", "fit": "crop"}
    found = {"folder": "", "concepts": 4, "vectors": 1000, "seed": 0, "name": "", "images": images}
    change = edit_of(world, "object", 0.25)
    pictures = torch.rand(4, 64, 64, 3)
    work = {
        f"discover {method}": lambda m=method: run("FeatInv_DiscoverConcepts", method=m, **inputs, **found)
        for method in ("mcd", "nmf")
    } | {
        "extract": lambda: run("FeatInv_ExtractFeatures", image=images, pooled=False, **inputs),
        "viz": lambda: run("FeatInv_Viz", pictures=pictures, edit=change, backbone=world.backbone, threshold=0.33),
        "closed loop": lambda: loop(world, change, rounds=2),
        "a backbone's first map": lambda: opened_anew().source("last"),
        "guidance sampler": lambda: untrained.drawn(world, world.model),
    }
    return {name: stopped(function) for name, function in work.items()}


def opened_anew():
    return run("FeatInv_LoadBackbone", weights="tiny-cnn (embedded)", timm_name="", input_size=0)[0].backbone


def stopped(function) -> dict:
    ask, result = management.throw_exception_if_processing_interrupted, {}

    def counting(last: int):
        calls = []

        def asked() -> None:
            calls.append(1)
            if len(calls) == last:
                management.interrupt_current_processing()
            ask()

        management.throw_exception_if_processing_interrupted = asked
        try:
            message = error_of(function)
        finally:
            management.throw_exception_if_processing_interrupted = ask
        return message, len(calls)

    message, total = counting(0)
    result["finished"], result["asked"] = message, total
    for last in (1, total // 2):
        result[f"at {last}"] = [*counting(last), last]
    return result
