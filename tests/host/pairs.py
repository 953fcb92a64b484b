"""In a host's process: concepts turned up and down, and FeatInv-Viz by nodes against the command line's."""

import comfy.sample
import nodes
import torch
from opening import SEED, STEPS, World, relative, run

from featinv_nodes.core import viz
from featinv_nodes.core.pictures import captioned, diverging, heat_map
from featinv_nodes.core.sampling import Sampling
from training.concepts.viz import visualize
from training.models.pipeline import load_pipeline
from training.models.sampling import noise


def edited(world: World, names: str, factor: float = 0.25, **changes) -> tuple:
    """Concept Attenuate's outputs for the first scene's map."""
    concepts, _ = run("FeatInv_LoadConcepts", file="tiny_cnn_concepts (embedded)")
    return run(
        "FeatInv_ConceptAttenuate",
        **{
            "features": world.features.select(0),
            "concepts": concepts,
            "names": names,
            "factor": factor,
            "keep_length": True,
            **changes,
        },
    )


def paired(world: World) -> dict:
    """FeatInv-Viz by nodes around one run of the stock sampler, against training/concepts/viz.py, and what else the
    nodes say."""
    pipeline, seeds, groups, guidance = load_pipeline("tiny_cnn_last"), 3, [["object"], ["sky", "night"]], 3.0
    result = {}
    for factor in (0.25, 2.0):
        _, change, _ = edited(world, "object; sky, night", factor)
        maps, latent = run(
            "FeatInv_PairedLatents", edit=change, latent=nodes.EmptyLatentImage().generate(64, 64, seeds)[0]
        )
        (sampled,) = nodes.KSampler().sample(
            world.model, SEED, STEPS, guidance, "ddim", "simple", *world.apply(features=maps), latent
        )
        (pictures,) = nodes.VAEDecode().decode(world.vae, sampled)
        outputs = run("FeatInv_Viz", pictures=pictures, edit=change, backbone=world.backbone, threshold=0.33)
        sampling = Sampling(STEPS, 1.0, guidance, "features")
        theirs = visualize(
            pipeline,
            change.original,
            change.concepts,
            groups,
            viz.VizSettings(factor, seeds, SEED, keep_length=True),
            sampling,
        )
        drawn = torch.cat([theirs[0].original, *(one.changed for one in theirs)]).movedim(1, -1)
        result[str(factor)] = {
            "pictures": float((pictures - drawn).abs().max()),
            "slope": outputs[5] - sum(one.slope.own for one in theirs) / 2,
            "report": outputs[4].splitlines(),
            "expected": [f"{' + '.join(group)}: {one.slope.describe()}" for group, one in zip(groups, theirs)],
            "mask": float((outputs[3] - torch.stack([viz.affected(one.distance) for one in theirs])).abs().mean()),
            "shapes": [list(x.shape) for x in outputs[:4]],
        }
    again, distances = {"pictures": pictures, "edit": change, "backbone": world.backbone}, [d.distance for d in theirs]
    signed = torch.stack([viz.signed_difference(one.original, one.changed) for one in theirs])
    signed = signed / signed.abs().amax((1, 2), keepdim=True)
    expected = (heat_map(torch.stack([viz.normalised(d) for d in distances])), diverging(signed))
    result["maps"] = [
        float((shown[:, ::4, ::4] - maps.movedim(1, -1)).abs().mean()) for shown, maps in zip(outputs[1:3], expected)
    ]
    stricter = run("FeatInv_Viz", threshold=0.6, **again)[3]
    activation = change.concepts.activation(change.original)[:, 0]
    peaks = [f"{name} {one.max():.2f}" for name, one in zip(change.concepts.names, activation)]
    shown = run("FeatInv_ConceptMap", features=world.features, concepts=change.concepts)
    result["concept map"] = relative(shown.movedim(-1, 1), captioned(heat_map(activation), peaks))
    result["stricter"] = float((stricter - torch.stack([viz.affected(d, 0.6) for d in distances])).abs().mean())
    starts = comfy.sample.prepare_noise(torch.zeros(9, 24, 8, 8), SEED, latent["batch_index"])
    cut = nodes.LatentFromBatch().frombatch(nodes.EmptyLatentImage().generate(64, 64, 8)[0], 2, 2)[0] | {
        "noise_mask": torch.rand(2, 1, 8, 8)
    }
    _, again = run("FeatInv_PairedLatents", edit=change, latent=cut)
    result |= {
        "noise": torch.equal(starts, noise(pipeline.base, SEED, seeds).repeat(3, 1, 1, 1)),
        "batch_index": again["batch_index"],
        "masks": torch.equal(again["noise_mask"], cut["noise_mask"].repeat(3, 1, 1, 1)),
    }
    result["order"] = [
        relative(maps.values[i : i + 1], m.values)
        for i, m in (
            (0, change.original),
            (2, change.original),
            (3, change.changed.select(0)),
            (8, change.changed.select(1)),
        )
    ]
    with_scope = {"control_net": world.control, "keep_length": False}
    result["scope"] = [
        edited(world, "object")[2],
        edited(world, "object", 1.0, **with_scope)[2],
        edited(world, "object; sky", 4.0, **with_scope)[2],
    ]
    return result
