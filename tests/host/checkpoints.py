"""The kinds of checkpoints that people have, in the host's own classes, tiny and at random weights: guided without an
inversion model, with their own autoencoders and with TAESD, in little memory, cancelled on the way."""

import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.flux.model
import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import nodes
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_custom_sampler import Guider_Basic
from guiding import cosine_of, guided
from opening import BASE, SEED, World, error_of, relative, run
from safetensors.torch import save_file

CONTEXT, STEPS, CELLS = 32, 2, 4
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "context_dim": CONTEXT,
    "legacy": False,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SDXL = {"adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True}
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": CONTEXT,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 14, 14],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
#: the host's class, its settings, the width of the pooled text and the name of its small decoder
KINDS = {
    "SD 1.x": (comfy.supported_models.SD15, UNET, None, "taesd"),
    "SDXL": (comfy.supported_models.SDXL, UNET | SDXL, 1280, "taesdxl"),
    "Flux": (comfy.supported_models.Flux, FLUX, 768, "taef1"),
}
SETTINGS = {
    "cost": "own settings",
    "moves": 3,
    "step": 0.2,
    "recurrence": 2,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "distance": "cosine",
}


def part(name: str):
    """A module of the pack's host code, as the nodes have it."""
    return sys.modules[f"pack of any name.featinv_nodes.host.{name}"]


def core(name: str):
    """A module of the pack's core."""
    return sys.modules[f"pack of any name.featinv_nodes.core.{name}"]


def filled(module: torch.nn.Module) -> None:
    """Random numbers in what starts at zero or is never initialised by the host."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.02)
        elif not name.startswith("vae_"):
            torch.nn.init.ones_(p)


def model_of(kind: str):
    """The patcher of a tiny model."""
    described, config, _, _ = KINDS[kind]
    if kind == "Flux":  # the oldest hosts' has fewer settings
        known = {field.name for field in fields(comfy.ldm.flux.model.FluxParams)}
        config = {"image_model": "flux"} | {k: v for k, v in config.items() if k in known}
    tiny = type(kind, (described,), {"unet_config": {}, "unet_extra_config": {}})(dict(config))
    tiny.set_inference_dtype(torch.float32, None)
    model = tiny.get_model({}, "")
    filled(model.diffusion_model)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model.eval(), load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def vae_of(channels: int, levels: int = 4) -> comfy.sd.VAE:
    """An autoencoder of the usual architecture, narrow."""
    ddconfig = {"double_z": True, "z_channels": channels, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    ddconfig |= {"ch_mult": [1] * levels, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"ddconfig": ddconfig, "embed_dim": channels}
    module = AutoencoderKL(**params)
    filled(module)
    vae = comfy.sd.VAE(sd=module.state_dict(), config={"params": params}, dtype=torch.float32)
    vae.latent_channels, vae.upscale_ratio, vae.downscale_ratio = channels, 2 ** (levels - 1), 2 ** (levels - 1)
    return vae


def small_decoder(name: str, channels: int) -> comfy.sd.VAE:
    """Load VAE's of a TAESD whose two files stand in models/vae_approx."""
    folder = Path(BASE, "models", "vae_approx")
    folder.mkdir(parents=True, exist_ok=True)
    module = TAESD(latent_channels=channels)
    filled(module)
    for part in ("encoder", "decoder"):
        tensors = getattr(module, f"taesd_{part}").state_dict()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}_{part}.safetensors")
    assert name in nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0]
    return nodes.VAELoader().load_vae(name)[0]


class Checkpoint:
    """A tiny model and what draws with it."""

    def __init__(self, world: World, kind: str) -> None:
        torch.manual_seed(0)
        self.world, self.model = world, model_of(kind)
        self.channels = self.model.model.latent_format.latent_channels
        self.vae, pooled = vae_of(self.channels), KINDS[kind][2]
        self.small = small_decoder(KINDS[kind][3], self.channels)
        self.text = [[torch.randn(1, 7, CONTEXT), {"pooled_output": torch.randn(1, pooled) if pooled else None}]]

    def draw(self, batch: int = 1, callback=None, **changes) -> torch.Tensor:
        """Latents as SamplerCustomAdvanced draws them."""
        inputs = {"vae": self.vae, "backbone": self.world.backbone, "features": self.world.features, **SETTINGS}
        guider = Guider_Basic(self.model)
        guider.set_conds(self.text)
        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", STEPS)
        latent = torch.zeros(batch, self.channels, CELLS, CELLS)
        noise, sampler = (
            comfy.sample.prepare_noise(latent, SEED),
            run("FeatInv_GuidanceSampler", **{**inputs, **changes}),
        )
        return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=SEED)

    def cosine(self, latents: torch.Tensor, vae: comfy.sd.VAE) -> float:
        """Of the pictures' features with those asked for."""
        return cosine_of(self.world, self.world.features.select(slice(0, len(latents))), vae.decode(latents))


def in_little_memory(checkpoint: Checkpoint) -> dict:
    """Latents where memory has room for one row's gradient, and then only by computing blocks again; how many rows are
    decoded at once, and how often a block runs."""
    module, result, few, counts = part("decoding"), {}, {}, []
    block = checkpoint.vae.first_stage_model.decoder.mid.block_1.conv1
    hook = block.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    row = checkpoint.vae.memory_used_decode((1, checkpoint.channels, CELLS, CELLS), torch.float32)
    backbone = checkpoint.world.backbone
    kept = backbone.kept_bytes("last")
    try:
        for name, rows in (("plenty", 100.0), ("a row", 5.0), ("large backbone", 5.0), ("too little for a row", 2.0)):
            backbone._kept["last"] = int(3 * row) if name == "large backbone" else kept
            module.management = SimpleNamespace(
                get_free_memory=lambda device, rows=rows: rows * row, get_total_memory=management.get_total_memory
            )
            counts.clear()
            latents = checkpoint.draw(batch=2)
            result[name] = {"latents": latents, "rows": max(counts), "runs": sum(counts)}
            few[name] = checkpoint.draw(batch=2, moves=1, recurrence=1)
    finally:
        module.management, backbone._kept["last"] = management, kept
        hook.remove()
    _, kept, _, again = (one.pop("latents") for one in result.values())
    return result | {"difference": relative(again, kept), "one by one": relative(few["a row"], few["plenty"])}


def cancelled(checkpoint: Checkpoint) -> dict:
    """Cancelled in the middle of each model, forth and back, with blocks kept and computed again: what ends it, how
    many layers are still passed, what is left behind, and whether the same picture comes afterwards."""
    backbone, decoding = checkpoint.world.backbone.backbone, part("decoding").Decoding
    unet, decoder = checkpoint.model.model.diffusion_model, checkpoint.vae.first_stage_model.decoder
    places = {
        "model": (unet, unet.middle_block[0].out_layers[-1]),
        "decoder": (decoder, decoder.mid.block_2.conv1),
        "backbone": (backbone, backbone.model.layer3[0].conv2),
    }
    draw, plan, result = partial(checkpoint.draw, moves=1, recurrence=1), decoding.plan, {}
    before = state(unet, checkpoint.vae.first_stage_model, backbone)
    try:
        for again in (False, True):
            decoding.plan = lambda self, latents, read, again=again: (1, again)
            expected = draw()
            for name, way in (("model", 0), ("decoder", 0), ("decoder", 1), ("backbone", 0), ("backbone", 1)):
                message, later = cancelled_at(draw, *places[name], back=way)
                left = state(unet, checkpoint.vae.first_stage_model, backbone) != before
                result[f"{name}, {('forth', 'back')[way]}, {again}"] = {
                    "message": message,
                    "later": later,
                    "left": left,
                    "same": torch.equal(draw(), expected),
                }
    finally:
        decoding.plan = plan
    return result


def cancelled_with_a_controlnet(world: World) -> list:
    """cancelled_at in the model and on the way back through the backbone, by Feature Guidance."""
    plain, backbone = world.model, world.backbone.backbone
    unet, world.model = plain.model.diffusion_model, guided(world)
    draw = partial(world.draw, world.apply(), steps=2)
    try:
        return [
            cancelled_at(draw, unet, unet.middle_block[0].out_layers[-1], back=False),
            cancelled_at(draw, backbone, backbone.model.layer3[0].conv2, back=True),
        ]
    finally:
        world.model = plain


def cancelled_at(draw: Callable, module: torch.nn.Module, layer: torch.nn.Module, back: bool) -> tuple[str, int]:
    """What ends a drawing that is cancelled when a module's layer has run, or its gradient has come, and how many of
    the module's layers with weights, or their gradients, follow."""
    seen = []

    def passed(where: torch.nn.Module, now: bool) -> None:
        if seen:
            seen.append(where)
        elif where is layer and now == back:
            seen.append(where)
            management.interrupt_current_processing()

    def forth(where: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        passed(where, False)
        if output.requires_grad:
            output.register_hook(lambda gradient: passed(where, True))

    hooks = [m.register_forward_hook(forth) for m in module.modules() if list(m.parameters(recurse=False))]
    try:
        return error_of(draw), len(seen) - 1
    finally:
        for hook in hooks:
            hook.remove()


def state(*modules: torch.nn.Module) -> list:
    """What a drawing could leave changed."""
    parts = [p for module in modules for p in module.modules()]
    return [
        [len(p._forward_hooks) + len(p._forward_pre_hooks) for p in parts],
        ["forward" in vars(p) for p in parts],
        [value.requires_grad for module in modules for value in module.parameters()],
        [torch.is_inference_mode_enabled(), torch.is_grad_enabled()],
    ]


def ahead(checkpoint: Checkpoint) -> int:
    """The most layers and gradients that a device is told to compute before it is waited for, where it is waited for as
    often as can be."""
    backbone, decoder = checkpoint.world.backbone.backbone, checkpoint.vae.first_stage_model.decoder
    counts, item, waiting = [0], torch.Tensor.item, core("waiting")
    seconds, waiting.AHEAD = waiting.AHEAD, 0.0

    def waits(values: torch.Tensor) -> float:
        counts.append(0)
        return item(values)

    def more(*_: object) -> None:
        counts[-1] += 1

    def forth(where: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        more()
        if output.requires_grad:
            output.register_hook(more)

    modules = [*backbone.modules(), *decoder.modules(), *checkpoint.model.model.diffusion_model.modules()]
    hooks = [m.register_forward_hook(forth) for m in modules]
    torch.Tensor.item = waits
    try:
        checkpoint.draw(moves=2, recurrence=1)
    finally:
        torch.Tensor.item, waiting.AHEAD = item, seconds
        for hook in hooks:
            hook.remove()
    return max(counts)


def runs_away(checkpoint: Checkpoint) -> dict:
    """Moves that are not finite from the third on: what the sampler gives, and what the node says."""
    module = part("universal_guidance")
    moved, tell, calls, said, seen = module.moved, module.tell, [], [], []

    def away(clean: torch.Tensor, *rest) -> torch.Tensor:
        calls.append(1)
        return clean * torch.nan if len(calls) == 3 else moved(clean, *rest)

    module.moved, module.tell = away, lambda node, wrong, notes, fits: said.extend(wrong)
    try:
        latents = checkpoint.draw(moves=1, callback=lambda step, clean, x, total: seen.append(clean))
        first = error_of(checkpoint.draw, step=1e30)
    finally:
        module.moved, module.tell = moved, tell
    out = checkpoint.model.model.process_latent_out(seen[-1])
    return {
        "last finite": relative(latents, out),
        "finite": bool(latents.isfinite().all()),
        "said": said,
        "at once": first,
    }


def progress(checkpoint: Checkpoint) -> list:
    """(value, of how many) as the node's bar shows them."""
    shown = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: shown.append([value, total]))
    try:
        checkpoint.draw()
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    return shown


def short_of_memory(checkpoint: Checkpoint) -> str:
    """What is said on a device that has next to none."""
    total = management.get_total_memory
    management.get_total_memory = lambda *_, **__: 1e6
    try:
        return error_of(checkpoint.draw)
    finally:
        management.get_total_memory = total


def checkpoints(world: World) -> dict:
    made = {kind: Checkpoint(world, kind) for kind in KINDS}
    result = {}
    for kind, one in made.items():
        for decoder, vae in (("own", one.vae), ("small", one.small)):
            drawn = {moves: one.draw(vae=vae, moves=moves) for moves in (0, SETTINGS["moves"])}
            result[f"{kind}, {decoder}"] = [one.cosine(latents, vae) for latents in drawn.values()]
    xl = made["SDXL"]
    return {
        "cosines": result,
        "memory": in_little_memory(xl),
        "cancelled": cancelled(xl),
        "cancelled with a ControlNet": cancelled_with_a_controlnet(world),
        "ahead": ahead(xl),
        "runs away": runs_away(made["Flux"]),
        "progress": progress(made["SD 1.x"]),
        "short": short_of_memory(xl),
        "empty": error_of(xl.draw, vae=comfy.sd.VAE(sd={})),
        "channels": error_of(xl.draw, vae=made["Flux"].vae),
        "downscale": error_of(xl.draw, vae=vae_of(4, levels=3)),
    }
