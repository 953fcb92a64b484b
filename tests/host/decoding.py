"""In a host's process: feature decoders by the nodes against the program's decoder, what else reads such maps,
mistakes."""

import sys
from pathlib import Path

import comfy.model_management as management
import torch
from closing import stopped
from opening import BASE, NODES, World, error_of, pack, relative, run
from rae import backbone_of, own_decoder, trained
from safetensors.torch import save_file

from featinv_nodes.core.concepts import Concepts, save_concepts
from featinv_nodes.feature_decoders import open_feature_decoder

LOAD, DECODE = "FeatInv_LoadFeatureDecoder", "FeatInv_DecodeFeatures"
MODELS = Path(BASE, "models")
DECODERS = MODELS / "featinv_decoders"
DINO = "dinov2 small"


def listed() -> list[str]:
    return NODES[LOAD].define_schema().inputs[0].options


def released(world: World) -> dict:
    """DINOv2's, from the folders where the download puts them."""
    made = trained("dinov2", DECODERS / "RAE-dinov2-wReg-small")
    hub = MODELS / "backbones" / DINO
    program = open_feature_decoder(made.folder, backbone_of(made, hub, made.transformers))
    load = {"weights": f"{DINO}/model.safetensors", "timm_name": ""}
    backbone, _ = run("FeatInv_LoadBackbone", input_size=224, **load)
    large, _ = run("FeatInv_LoadBackbone", input_size=0, **load)
    decoder = run(LOAD, decoder=made.folder.name, backbone=backbone)
    picture = torch.rand(1, 240, 240, 3)
    features, _ = run(
        "FeatInv_ExtractFeatures", backbone=backbone, image=picture, layer="last", pooled=False, fit="crop"
    )
    image = run(DECODE, feature_decoder=decoder, features=features)
    return {
        "size": list(image.shape),
        "difference": float((image.movedim(-1, 1) - program.decode(features)).abs().max()),
        "without backbone": error_of(run, LOAD, decoder=made.folder.name),
        "other size": error_of(run, LOAD, decoder=made.folder.name, backbone=large),
        "other backbone": error_of(run, LOAD, decoder=made.folder.name, backbone=world.backbone),
    }


def edited(world: World, decoder) -> dict:
    """Mixing, concepts, FeatInv-Viz and similarity on what the decoder draws."""
    two = run(
        "FeatInv_FeatureMix",
        features_a=world.features.select(0),
        features_b=world.features.select(1),
        mode="interpolate",
        weight_a=0.5,
        weight_b=0.5,
        steps=3,
        soft_edge=False,
    )
    file = MODELS / "featinv_concepts" / "c.safetensors"
    save_concepts(file, Concepts([torch.eye(128)[:16]], ["half"], world.features.source))
    concepts, _ = run("FeatInv_LoadConcepts", file="c.safetensors")
    one = world.features.select(0)
    changed, edit, _ = run(
        "FeatInv_ConceptAttenuate", features=one, concepts=concepts, names="half", factor=0.0, keep_length=True
    )
    before, after, mixed = (run(DECODE, feature_decoder=decoder, features=f) for f in (one, changed, two))
    viz = run("FeatInv_Viz", pictures=torch.cat([before, after]), edit=edit, backbone=world.backbone, threshold=0.33)
    inputs = {"features": one, "backbone": world.backbone, "image": before}
    return {
        "mixed": len(mixed),
        "changed": float((before - after).abs().max()),
        "viz": viz[4],
        "cosine": run("FeatInv_FeatureSimilarity", **inputs)[2],
    }


def too_large(function) -> str:
    """The message of a loader on a computer with 100 kB of memory."""
    total = management.get_total_memory
    management.get_total_memory = lambda *_, **__: 1e5
    try:
        return error_of(function)
    finally:
        management.get_total_memory = total


def mistakes(world: World, decoder, folder: Path) -> dict[str, str]:
    vit, _ = run("FeatInv_LoadBackbone", weights="tiny-vit (embedded)", timm_name="", input_size=0)
    finders = sys.modules[f"{pack.__name__}.featinv_nodes.feature_decoders"]
    find, finders.find_spec = finders.find_spec, lambda name: None
    without = error_of(run, LOAD, decoder="mine")
    finders.find_spec = find
    foreign = DECODERS / "vae"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    half = DECODERS / "half"
    half.mkdir()
    (half / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = MODELS / "backbones" / "vit_base_patch14_reg4_dinov2.lvd142m.safetensors"
    save_file({"large": torch.zeros(100_000)}, weights)
    backbone = {"weights": weights.name, "timm_name": "", "input_size": 224}
    draw = {"feature_decoder": decoder}
    theirs = MODELS / "backbones" / "vit-mae-base"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "vit_mae"}')
    save_file({"vit.x": torch.zeros(1)}, theirs / "model.safetensors")
    named = {"weights": f"{theirs.name}/model.safetensors", "timm_name": "", "input_size": 0}
    return {
        "without diffusers": without,
        "none chosen": error_of(run, LOAD, decoder="(no decoder yet: python3 run.py download rae-dinov2-base)"),
        "gone": error_of(run, LOAD, decoder="gone"),
        "another class": error_of(run, LOAD, decoder="vae"),
        "incomplete": error_of(run, LOAD, decoder="half"),
        "other backbone": error_of(run, DECODE, features=world.extract(0, 1, backbone=vit), **draw),
        "other layer": error_of(run, DECODE, features=world.extract(0, 1, layer="layer2"), **draw),
        "pooled": error_of(run, DECODE, features=world.extract(0, 1, pooled=True), **draw),
        "transformers folder": error_of(run, "FeatInv_LoadBackbone", **named),
        "large decoder": too_large(lambda: run(LOAD, decoder="mine")),
        "large backbone": too_large(lambda: run("FeatInv_LoadBackbone", **backbone)),
    }


def decoding(world: World) -> dict:
    empty, folder = listed(), DECODERS / "mine"
    own_decoder(folder, world.features.source)
    decoder = run(LOAD, decoder="mine")
    stamp = NODES[LOAD].fingerprint_inputs("mine")
    program = open_feature_decoder(folder)
    image = run(DECODE, feature_decoder=decoder, features=world.features)
    loaded = any(m.model is decoder.patcher for m in management.current_loaded_models)
    management.unload_all_models()
    shown = NODES[LOAD].execute(decoder="mine").ui.as_dict()["text"]
    result = {
        "empty": empty,
        "listed": listed(),
        "says": list(shown),
        "size": list(image.shape),
        "difference": relative(image.movedim(-1, 1), program.decode(world.features)),
        "managed": loaded,
        "again": relative(run(DECODE, feature_decoder=decoder, features=world.features), image),
        "cancelled": stopped(lambda: run(DECODE, feature_decoder=decoder, features=world.features)),
        "edited": edited(world, decoder),
        "released": released(world),
        "mistakes": mistakes(world, decoder, folder),
    }
    (folder / "config.json").touch()
    result["follows the file"] = NODES[LOAD].fingerprint_inputs("mine") != stamp
    return result
