"""In a host's process: images and residuals of the host against the command line's and diffusers', alone, in batches
and beside a stock ControlNet."""

import sys
from pathlib import Path

import comfy.controlnet
import nodes
import torch
from opening import PACK, SEED, STEPS, World, relative, run

from featinv_nodes.core.sampling import Sampling
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


def real_size(folder: Path) -> dict:
    """A file of SD 1.x size with random weights: every tensor finds its place and the residuals equal diffusers'."""
    from diffusers import ControlNetModel

    from featinv_nodes.core.encoders import build_encoder
    from featinv_nodes.core.feature_map import FeatureSource
    from featinv_nodes.core.weights import InversionInfo

    described = {"name": "MiniSD", "width": 320, "context": 768, "latent_channels": 4, "heads": 8}
    source = FeatureSource(
        "convnext_base.fb_in22k_ft_in1k", "last", False, 1024, (9, 9), (288, 288), (0.5,) * 3, (0.5,) * 3
    )
    settings = {"kind": "conv", "channels": 1024, "out_channels": 320, "width": 512}
    with torch.device("meta"):
        controlnet = ControlNetModel(
            cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            attention_head_dim=8,
        )
    model = FeatureControlNet(controlnet.to_empty(device="cpu"), build_encoder(settings), source)
    model.eval().requires_grad_(False)
    numbers = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for place, (name, p) in enumerate(controlnet.named_parameters()):  # other numbers in each, in less time than randn
        own = numbers.roll(place).repeat(p.numel() // len(numbers) + 1)[: p.numel()].view_as(p)
        p.copy_(torch.ones_like(p) if "norm" in name else own)
    model.half().float()  # as the file has them
    file = folder / "real.safetensors"
    model.save(file, InversionInfo(source, settings, described, "p"), torch.float16)
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
