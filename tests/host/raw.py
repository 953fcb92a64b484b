"""In a host's process: damaged and foreign files through the nodes."""

import asyncio
import json
import logging
import shutil
import sys
from pathlib import Path

import folder_paths
import torch
from opening import BASE, NODES, PACK, error_of, pack, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODELS = Path(BASE) / "models"
DRAWN = Path(PACK) / "featinv_nodes/worlds/drawn"


def damaged(folder: str, shipped: str, key: str, changes: dict, drop: tuple[str, ...] = ()) -> str:
    """A shipped file with other fields, in one of the host's model folders; its name for the widget."""
    with safe_open(DRAWN / shipped, "pt") as opened:
        metadata = opened.metadata()
    about = {k: v for k, v in (json.loads(metadata[key]) | changes).items() if k not in drop}
    (MODELS / folder).mkdir(parents=True, exist_ok=True)
    name = f"damaged {len(list((MODELS / folder).glob('damaged *')))}.safetensors"
    save_file(load_file(DRAWN / shipped), MODELS / folder / name, metadata | {key: json.dumps(about)})
    return name


def start() -> list[str]:
    """What is logged at the start with a timm that is too old."""
    lines, version = [], pack.version
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    pack.version = lambda name: "0.6.13"
    asyncio.run(pack.comfy_entrypoint())
    pack.version = version
    asyncio.run(pack.comfy_entrypoint())
    logging.getLogger().removeHandler(handler)
    return lines


def models() -> dict[str, str]:
    """What the loaders of inversion models and concepts say."""

    def control(key: str = "featinv", **changes) -> str:
        name = damaged("featinv", "tiny_cnn_last.safetensors", key, changes)
        return str(error_of(lambda: said.append(run("FeatInv_LoadFeatInvControlNet", weights=name)[1])))

    said, lines = [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    concepts = damaged("featinv_concepts", "tiny_cnn_concepts.safetensors", "featinv_concepts", {}, ("source",))
    result = {
        "a list for a source": control(source=[1]),
        "a later version": control(format=2),
        "without steps": control(recommended={"strength": 1.0}),
        "bad scope": control("featinv_scope", scale="x"),
        "concepts without a source": error_of(run, "FeatInv_LoadConcepts", file=concepts),
    }
    logging.getLogger().removeHandler(handler)
    return result | {"steps": said[0], "log": " ".join(lines), "opened": len(said)}


def backbones() -> dict:
    """Files of other kinds and under other names."""

    def load(name: str, timm_name: str = "") -> str:
        return error_of(run, "FeatInv_LoadBackbone", weights=name, timm_name=timm_name, input_size=0)

    folder = MODELS / "backbones"
    for part in ("hub", "bare"):
        (folder / part).mkdir(parents=True)
    state = load_file(DRAWN / "backbone_cnn" / "model.safetensors")
    save_file(state, folder / "bare" / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "hub" / "pytorch_model.bin")
    config = (DRAWN / "backbone_cnn" / "config.json").read_bytes()
    (folder / "hub" / "config.json").write_bytes(config)
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), folder / "test_resnet.pth")
    backbone, _ = run("FeatInv_LoadBackbone", weights="hub/pytorch_model.bin", timm_name="", input_size=0)
    result = {
        "listed": sorted(folder_paths.get_filename_list("backbones")),
        "hub": backbone.name,
        "pth": load("test_resnet.pth"),
        "no config": load("bare/model.safetensors"),
        "hub name": load("test_resnet.pth", "timm/resnet18.a1_in1k"),
        "hyphen": load("test_resnet.pth", "test-resnet"),
    }
    version, timm.__version__ = timm.__version__, "0.6.13"
    core = sys.modules[f"{pack.__name__}.featinv_nodes.core.backbone_opening"]
    core.require_timm.cache_clear()
    result["old timm"] = load("test_resnet.pth")
    timm.__version__ = version
    return result


def pictures() -> dict:
    """Pictures of other channels, a mask with NaN, a pooled map shown, and names that no disk takes."""
    (backbone, _), (image, _) = (
        run("FeatInv_LoadBackbone", weights="tiny-cnn (embedded)", timm_name="", input_size=0),
        run("FeatInv_TinyWorldScenes", first=0, count=2),
    )

    def extract(image: torch.Tensor, pooled: bool = False) -> tuple:
        return run("FeatInv_ExtractFeatures", backbone=backbone, image=image, layer="last", pooled=pooled, fit="crop")

    alpha = torch.rand(2, 64, 64, 1, generator=torch.Generator().manual_seed(0))
    features, _ = extract(image)
    pooled, _ = extract(image[:1], True)
    mix = {"features_a": features, "features_b": features, "mode": "compose", "weight_a": 0.5, "weight_b": 0.5}
    mix |= {"steps": 5, "soft_edge": True, "mask": torch.full((1, 8, 8), torch.nan)}
    shown = NODES["FeatInv_PreviewFeatures"].execute(features=pooled)
    return {
        "white": float((extract(torch.cat([image, alpha], 3))[1] - (image * alpha + 1 - alpha)).abs().max()),
        "grey": float((extract(image[..., :1])[1] - image[..., :1]).abs().max()),
        "five": error_of(extract, image.repeat(1, 1, 1, 2)),
        "mask": error_of(run, "FeatInv_FeatureMix", **mix),
        "shown": list(shown.result[0].shape),
        "long": error_of(run, "FeatInv_SaveFeatures", features=features, filename_prefix="features/" + "x" * 300),
        "folder": error_of(run, "FeatInv_SaveFeatures", features=features, filename_prefix="y" * 300 + "/x"),
    }


def elsewhere() -> dict[str, str]:
    """What the loaders say of names that lead to existing files and folders outside of the host's folders."""
    Path(BASE, "output").mkdir(exist_ok=True)
    outside = shutil.copytree(DRAWN, Path(BASE) / "elsewhere")
    image, _ = run("FeatInv_TinyWorldScenes", first=0, count=1)
    backbone, _ = run("FeatInv_LoadBackbone", weights="tiny-cnn (embedded)", timm_name="", input_size=0)
    inputs = {"backbone": backbone, "image": image, "layer": "last", "pooled": False, "fit": "crop"}
    features, _ = run("FeatInv_ExtractFeatures", **inputs)
    NODES["FeatInv_SaveFeatures"].execute(features=features, filename_prefix="inside")
    (saved,) = Path(folder_paths.get_output_directory()).glob("inside*")
    shutil.copyfile(saved, outside / "map.safetensors")
    backbone = {"timm_name": "", "input_size": 0}
    return {
        "model": error_of(
            run, "FeatInv_LoadFeatInvControlNet", weights=f"{outside / 'tiny_cnn_last.safetensors'} (embedded)"
        ),
        "concepts": error_of(
            run, "FeatInv_LoadConcepts", file=f"{outside / 'tiny_cnn_concepts.safetensors'} (embedded)"
        ),
        "backbone": error_of(run, "FeatInv_LoadBackbone", weights=f"{outside / 'backbone_cnn'} (embedded)", **backbone),
        "decoder": error_of(
            run, "FeatInv_LoadFeatureDecoder", decoder=f"{outside / 'decoder_tiny_vit_last'} (embedded)"
        ),
        "features": error_of(run, "FeatInv_LoadFeatures", file="../elsewhere/map.safetensors [output]"),
        "own features": error_of(run, "FeatInv_LoadFeatures", file=f"{saved.name} [output]"),
    }


def raw() -> dict:
    parts = (start, models, backbones, pictures, elsewhere)
    return {part.__name__: part() for part in parts}
