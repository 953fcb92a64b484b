"""In a host's process: what stays in memory, and models that the host unloads or loads in part."""

import gc
import sys
from copy import deepcopy

import comfy.model_management as management
import torch
from opening import World, relative


def memory(world: World) -> dict:
    """Live tensors after 3 and after 20 runs with changing features."""
    result = {}
    for number in range(1, 21):
        world.draw(world.apply(features=world.extract(3 * number, 3)), steps=2)
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
