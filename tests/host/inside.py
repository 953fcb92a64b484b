"""Runs in a host's environment, in the host's process, and prints one line of JSON: what the tests assert on.

python inside.py HOST_ROOT PACK BASE_DIRECTORY
"""

import asyncio
import gc
import json
import logging
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from opening import (
    BASE,
    IMPORTED,
    NODES,
    PACK,
    SEED,
    STEPS,
    World,
    error_of,
    pack,
    relative,
    run,
)  # before anything else of the host

sys.path.append(PACK)
import closing
import comfy.controlnet
import comfy.model_management as management
import comfy.sample
import controlling
import guiding
import nodes
import torch
import untrained
from PIL import Image

from featinv_nodes.core import viz
from featinv_nodes.core.sampling import Sampling
from training.concepts.viz import visualize
from training.models.controlnet import FeatureControlNet
from training.models.pipeline import load_pipeline
from training.models.sampling import noise, sample


def parity(world: World) -> list[dict]:
    """The host's sampler against training/reconstruct.py's, same file, seed and steps."""
    pipeline = load_pipeline("tiny_cnn_last")
    features = pipeline.features(
        pipeline.backbone.preprocess(
            torch.from_numpy(run("FeatInv_TinyWorldScenes", first=0, count=3)[0].numpy()).movedim(-1, 1)
        )
    )
    result = []
    for away, negative in (("text and features", "features"), ("text", "text")):
        for strength, guidance, end, size in (
            (0.6, 1.0, 1.0, (8, 8)),
            (1.0, 4.0, 1.0, (8, 8)),
            (0.6, 4.0, 0.5, (6, 12)),
            (1.0, 4.0, 0.5, (8, 8)),
            (1.0, 1.0, 1.0, (16, 12)),
        ):
            ours = world.draw(
                world.apply(strength=strength, end_percent=end, guide_away_from=away), guidance, size=size
            )
            sampling = Sampling(STEPS, strength, guidance, negative, 0.0, end)
            theirs = sample(
                pipeline.base,
                pipeline.model,
                features,
                noise(pipeline.base, SEED, 3, size),
                sampling,
                pipeline.info.prompt,
            )
            result.append({"case": [away, strength, guidance, end, size], "difference": relative(ours, theirs)})
    halves = world.apply(*world.apply(strength=0.3), strength=0.3)  # residuals add up, so two halves are one whole
    theirs = sample(
        pipeline.base,
        pipeline.model,
        features,
        noise(pipeline.base, SEED, 3),
        Sampling(STEPS, 0.6, 4.0, "features"),
        pipeline.info.prompt,
    )
    result.append({"case": "stacked", "difference": relative(world.draw(halves, 4.0), theirs)})
    return result


def stock_control(world: World) -> comfy.controlnet.ControlNet:
    """A stock ControlNet of the embedded size that reads a hint picture, random but for its zero convolutions' size."""
    import copy

    from comfy.cldm.cldm import ControlNet
    from comfy.ops import disable_weight_init

    module = sys.modules["pack of any name.featinv_nodes.host.unet"]
    tensors, _ = sys.modules["pack of any name.featinv_nodes.core.weights"].load_inversion(
        f"{PACK}/featinv_nodes/worlds/drawn/tiny_cnn_last.safetensors"
    )[1:]
    config = module.ldm_config(tensors, 4) | {
        "hint_channels": 3,
        "dtype": torch.float32,
        "operations": disable_weight_init,
    }
    config.pop("out_channels")
    torch.manual_seed(1)
    model = ControlNet(**config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.02 if "hint" in name else 0.05)
    model.load_state_dict(
        {k: v for k, v in copy.deepcopy(world.control.control_model).state_dict().items() if "hint" not in k},
        strict=False,
    )
    return comfy.controlnet.ControlNet(model, load_device=torch.device("cpu"))


def stacking(world: World) -> dict:
    """With a stock ControlNet, before ours and after it."""
    stock = stock_control(world)
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    apply_stock = nodes.ControlNetApplyAdvanced().apply_controlnet

    first = world.draw(apply_stock(*world.apply(), stock, hint, 0.5, 0.0, 1.0))
    last = world.draw(world.apply(*apply_stock(world.positive, world.negative, stock, hint, 0.5, 0.0, 1.0)))
    alone = world.draw(world.apply())
    return {"order": relative(first, last), "stock_matters": relative(first, alone)}


def counts(world: World) -> dict:
    """How often the ControlNet and the encoder run in one sampling run with guidance."""
    calls = {"control": 0, "encoder": 0}

    def count(name):
        def hook(module, inputs, output):
            calls[name] += 1

        return hook

    hooks = [
        world.control.control_model.zero_convs[0].register_forward_hook(count("control")),
        world.control.encoder.model.register_forward_hook(count("encoder")),
    ]
    world.draw(world.apply())
    for hook in hooks:
        hook.remove()
    return calls


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


def batches(world: World) -> dict:
    """Fewer, equal and more maps than latents: each row against the picture of its own map."""
    maps = world.features
    reference = world.draw(world.apply())
    one = world.draw(world.apply(features=maps.select(0)))
    two = world.draw(world.apply(features=maps.select(slice(0, 2))))
    four = world.draw(world.apply(features=world.extract(0, 4)))
    return {
        "one_serves_all": relative(one[0], reference[0]),
        "fewer_repeat": max(relative(two[:2], reference[:2]), relative(two[2], one[2])),
        "more_are_cut": relative(four, reference),
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


def memory(world: World) -> dict:
    """Live tensors after 3 and after 20 runs with changing features."""
    result = {}
    for number in range(1, 21):
        world.draw(world.apply(features=world.extract(3 * number, 3)))
        if number in (3, 20):
            gc.collect()
            result[str(number)] = sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)
    return result


def encoded(world: World) -> dict:
    """Live tensors of the encoded maps' shape before, while and after a run whose conditioning is kept, as the host
    keeps the outputs of its nodes."""
    shape = (world.control.info.encoder["out_channels"], 8, 8)

    def alive() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[1:] == shape)

    conditioning, seen = world.apply(), []
    before = alive()
    world.draw(conditioning, callback=lambda step, *rest: seen.append(alive()) if step == 3 else None)
    return {"before": before, "while": seen[0], "after": alive(), "kept": len(conditioning)}


def unloading(world: World) -> dict:
    """All models out of memory, and back."""
    reference = world.draw(world.apply())
    managed = {id(m.model) for m in management.current_loaded_models}
    ours = {
        "backbone": world.backbone.patcher,
        "control": world.control.control_model_wrapped,
        "encoder": world.control.encoder,
        "model": world.model,
    }
    was = {
        name: (
            id(patcher) in managed
            or any(m.model is not None and m.model.model is patcher.model for m in management.current_loaded_models)
        )
        for name, patcher in ours.items()
    }
    management.unload_all_models()
    left = len(management.current_loaded_models)
    return {
        "managed": was,
        "left": left,
        "again": relative(world.draw(world.apply()), reference),
        "features": relative(world.extract(0, 3).values, world.features.values),
    }


def low_memory(world: World) -> dict:
    """The ControlNet's weights cast one by one, as the host does when memory is short."""
    reference = world.draw(world.apply())
    modules = [m for m in world.control.control_model.modules() if hasattr(m, "comfy_cast_weights")]
    for m in modules:
        m.comfy_cast_weights = True
    again = relative(world.draw(world.apply()), reference)
    for m in modules:
        m.comfy_cast_weights = False
    return {"modules": len(modules), "difference": again, "left behind": left_behind(world)}


def left_behind(world: World) -> dict[str, int]:
    """Tensors of plain modules that a device with room for next to nothing does not get; nor does it let go of a
    part."""
    models, result = sys.modules["pack of any name.featinv_nodes.host.models"], {}
    for name, module in {
        "backbone": world.backbone.backbone,
        "encoder": world.control.encoder.model,
        "autoencoder": world.vae.first_stage_model,
    }.items():
        meta = torch.device("meta")
        patcher = models.managed(deepcopy(module), meta)
        patcher.partially_load(meta, 0.1)
        there = [t.device.type for t in (*patcher.model.parameters(), *patcher.model.buffers())]
        result[name] = sum(kind != "meta" for kind in there) + patcher.partially_unload(patcher.offload_device, 1000)
    return result


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
    pictures = Path(BASE) / "pictures"
    (pictures / "a" / "deep").mkdir(parents=True)
    seen = []
    for file, side in (("a/0.png", 8), ("a/0.png", 9), ("a/deep/1.png", 8)):
        Image.new("RGB", (side, side)).save(pictures / file)
        seen.append(NODES["FeatInv_DiscoverConcepts"].fingerprint_inputs(folder=f'"{pictures}"', name=""))
    three = run("FeatInv_FeatureSimilarity", features=world.features, backbone=world.backbone, image=picture)[2]
    return {
        "fit": [relative(stretched.values, expected.values), relative(stretched.values, a.values)],
        "columns": columns,
        "names": names,
        "folders": len({*seen, NODES["FeatInv_DiscoverConcepts"].fingerprint_inputs(folder=None, name=None)}),
        "caption": relative(lines[1], lines[0]),
        "similar": three,
        "small mask": error_of(run, "FeatInv_FeatureMix", **mix, mask=torch.zeros(1, 64, 160), backbone=world.backbone),
        "masks": error_of(run, "FeatInv_FeatureMix", **mix, mask=torch.ones(2, 64, 160), backbone=world.backbone),
    }


def real_size(folder: Path) -> dict:
    """A file of SD 1.x size with random weights: every tensor finds its place and the residuals equal diffusers'."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    from featinv_nodes.core.feature_map import FeatureSource
    from featinv_nodes.core.weights import InversionInfo

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        cross_attention_dim=768,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,
    )
    described = {"name": "MiniSD", "width": 320, "context": 768, "latent_channels": 4, "heads": 8}
    source = FeatureSource(
        "convnext_base.fb_in22k_ft_in1k", "last", False, 1024, (9, 9), (288, 288), (0.5,) * 3, (0.5,) * 3
    )
    from featinv_nodes.core.encoders import build_encoder

    settings = {"kind": "conv", "channels": 1024, "out_channels": 320, "width": 512}
    model = (
        FeatureControlNet(ControlNetModel.from_unet(unet), build_encoder(settings), source).eval().requires_grad_(False)
    )
    del unet
    for name, p in model.named_parameters():
        if p.abs().max() == 0 and "norm" not in name:
            torch.nn.init.normal_(p, std=0.02)
    file = folder / "real.safetensors"
    model.save(file, InversionInfo(source, settings, described, "p"))
    load = sys.modules["pack of any name.featinv_nodes.host.controlnet"].load_feature_control
    with torch.inference_mode():
        control = load(file)
        values, x, t, text = (
            torch.randn(1, 1024, 9, 9),
            torch.randn(1, 4, 32, 32),
            torch.tensor([500]),
            torch.randn(1, 77, 768),
        )
        theirs, middle = model.controlnet(x, t, text, model.hint(values, (32, 32)), return_dict=False)
        ours = control.control_model(
            x=x, hint=control.encoder.model(values, (32, 32)), timesteps=t.float(), context=text
        )
    file.unlink()
    return {
        "difference": max(relative(a, b) for a, b in zip([*ours["output"], *ours["middle"]], [*theirs, middle])),
        "residuals": len(theirs) + 1,
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
    change, several = edited(world, "object; sky; 3")[1], edited(world, "object", features=world.features)[1]
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
        "concepts": error_of(edited, world, "0", features=world.extract(0, 1, backbone=vit)),
        "concept number": error_of(edited, world, "99"),
        "no concept": error_of(edited, world, " ; ,"),
        "judged by another": error_of(edited, world, "0", control_net=other),
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
            "parity": parity(world),
            "stacking": stacking(world),
            "counts": counts(world),
            "guiders": guiding.guiders(world),
            "two_scales": guiding.two_scales(world),
            "best": guiding.best(world),
            "gradient": guiding.gradient(world),
            "scaled": guiding.scaled(world),
            "untrained": untrained.untrained(world),
            "closed_loop": closing.closed_loop(world),
            "cancelled": closing.cancelled(world),
            "scope": scope(world),
            "paired": paired(world),
            "batches": batches(world),
            "controlling": controlling.controlling(world, edited),
            "interruption": interruption(world),
            "memory": memory(world),
            "encoded": encoded(world),
            "unloading": unloading(world),
            "low_memory": low_memory(world),
            "features_nodes": features_nodes(world),
            "bad_inputs": bad_inputs(world, folder),
        }
    result["real_size"] = real_size(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
