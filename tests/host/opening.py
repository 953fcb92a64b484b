"""The pack opened in a host's process, and the embedded world in it; what to run is for others to say.

python PROGRAM HOST_ROOT PACK BASE_DIRECTORY        a program that imports this module before anything of the host
"""

import asyncio
import importlib.util
import os
import sys

HOST, PACK, BASE = sys.argv[1:4]
sys.path.insert(0, HOST)
import torch
from comfy.cli_args import args

# tests run on the processor, for the same numbers everywhere; real_size.py on the host's own device
args.cpu, args.base_directory = not ("FEATINV_OWN_DEVICE" in os.environ and torch.cuda.is_available()), BASE

import comfy.sample
import comfy.samplers

before = set(sys.modules)
spec = importlib.util.spec_from_file_location(
    "pack of any name", f"{PACK}/__init__.py", submodule_search_locations=[PACK]
)
pack = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = pack
spec.loader.exec_module(pack)
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())}
IMPORTED = set(sys.modules) - before

STEPS, SEED = 10, 7


def run(node: str, **inputs):
    result = NODES[node].execute(**inputs).result
    return result if len(result) > 1 else result[0]


def error_of(function, *arguments, **inputs) -> str:
    try:
        function(*arguments, **inputs)
    except BaseException as error:  # newer hosts interrupt with one
        return f"{type(error).__name__}: {error}"
    return "no error"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


class World:
    """The embedded world, opened in the host."""

    def __init__(self) -> None:
        self.model, self.positive, self.negative, self.vae, _ = run("FeatInv_LoadTinyWorld")
        self.backbone, _ = run("FeatInv_LoadBackbone", weights="tiny-cnn (embedded)", timm_name="", input_size=0)
        self.control, _ = run("FeatInv_LoadFeatInvControlNet", weights="tiny_cnn_last (embedded)")
        self.features = self.extract(0, 3)

    def extract(self, first: int, count: int, **changes):
        image, _ = run("FeatInv_TinyWorldScenes", first=first, count=count)
        return run(
            "FeatInv_ExtractFeatures",
            **{"backbone": self.backbone, "image": image, "layer": "last", "pooled": False, "fit": "crop", **changes},
        )[0]

    def outputs(self, positive=None, negative=None, **changes):
        """What FeatInv ControlNet gives: positive, negative, scope, features only."""
        inputs = {
            "control_net": self.control,
            "features": self.features,
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "guide_away_from": "text and features",
            **changes,
        }
        return run(
            "FeatInvControlNet", positive=positive or self.positive, negative=negative or self.negative, **inputs
        )

    def apply(self, positive=None, negative=None, **changes):
        """The positive and the negative conditioning of the steered sampler."""
        return self.outputs(positive, negative, **changes)[:2]

    def draw(self, conditioning, guidance=3.0, batch=3, size=(8, 8), callback=None, steps=STEPS) -> torch.Tensor:
        latent = torch.zeros(batch, 24, *size)
        start = comfy.sample.prepare_noise(latent, SEED)
        return comfy.sample.sample(
            self.model,
            start,
            steps,
            guidance,
            "ddim",
            "simple",
            *conditioning,
            latent,
            seed=SEED,
            callback=callback,
            disable_pbar=True,
        )
