"""In a host's process: what FeatInv ControlNet does in areas, in windows, under a mask, along a curve, and with latents
that do not fit."""

import logging
import sys
from types import SimpleNamespace

import comfy.context_windows
import guiding
import nodes
import torch
from opening import World, error_of, relative, run

WHOLE, PART = "whole map in each area", "the area's part"
FEW = 2  # steps, where the picture does not matter
LEFT, RIGHT = (32, 64, 0, 0), (32, 64, 32, 0)  # width, height, x, y in pixels


def hints_of(world: World, draw) -> list[torch.Tensor]:
    """What the ControlNet reads at each step while something is drawn."""
    hints = []
    hook = world.control.control_model.input_hint_block.register_forward_hook(
        lambda module, inputs, output: hints.append(output.clone())
    )
    try:
        draw()
    finally:
        hook.remove()
    return hints


def in_area(conditioning, area=RIGHT):
    return nodes.ConditioningSetArea().append(conditioning, *area, 1.0)[0]


def areas(world: World) -> dict:
    """An area's hint against the encoder's own: of the whole map at the area's size, and the part of it."""
    values, encoder = world.features.values, world.control.encoder.model
    expected = {WHOLE: encoder(values, (8, 4)), PART: encoder(values, (8, 8))[..., 4:]}
    result = {}
    for how, hint in expected.items():
        positive, negative = world.apply(in_areas=how, guide_away_from="text")
        before = world.apply(positive=in_area(world.positive), in_areas=how, guide_away_from="text")
        for name, conditioning in (("after", (in_area(positive), negative)), ("before", before)):
            seen = [h for h in hints_of(world, lambda: world.draw(conditioning, steps=FEW)) if h.shape[-1] == 4]  # noqa: B023
            result[f"{how}, {name}"] = relative(seen[-1][-3:], hint)
    whole = world.draw(world.apply(), steps=FEW)
    (everywhere,) = nodes.ConditioningSetArea().append(world.apply()[0], 64, 64, 0, 0, 1.0)
    result["everywhere"] = relative(world.draw((everywhere, world.apply()[1]), steps=FEW), whole)
    return result


def two_maps(world: World) -> dict[str, float]:
    """Two maps side by side, each in its half: the mean cosine with what is read again from the half, whole or part."""
    result = {}
    for how in (WHOLE, PART):
        (left, negative), (right, _) = (world.apply(features=world.features.select(i), in_areas=how) for i in (0, 1))
        drawn = world.draw((in_area(left, LEFT) + in_area(right, RIGHT), negative), batch=1)
        (picture,) = nodes.VAEDecode().decode(world.vae, {"samples": drawn})
        cosines = []
        for number, half in enumerate((picture[:, :, :32], picture[:, :, 32:])):
            (square,) = nodes.ImageScale().upscale(half, "bilinear", 64, 64, "disabled")
            target = {"features": world.features.select(number), "backbone": world.backbone, "image": square}
            cosines.append(run("FeatInv_FeatureSimilarity", **target)[2])
        result[how] = sum(cosines) / 2
    return result


def residuals_of(world: World, conditioning) -> list[torch.Tensor]:
    """What the ControlNet adds to the model in the first prediction of each shape: [B, C, h, w] by depth."""
    seen, own = {}, world.model

    def keep(apply_model, given):
        control = given["c"].get("control")
        if control is not None:
            seen.setdefault(given["input"].shape[2:], [x.clone() for x in control["output"]])
        return apply_model(given["input"], given["timestep"], **given["c"])

    world.model = own.clone()
    world.model.set_model_unet_function_wrapper(keep)
    world.draw(conditioning, steps=FEW)
    world.model = own
    return min(seen.items())[1]


def masks(world: World) -> dict:
    """Masks of another size than the latents: what they leave of the residuals and of pictures."""
    half, white, black = torch.zeros(1, 50, 80), torch.ones(1, 50, 80), torch.zeros(1, 50, 80)
    half[..., 40:] = 1
    full, none = world.draw(world.apply(), steps=FEW), world.draw((world.positive, world.negative), steps=FEW)
    each = world.draw(world.apply(mask=torch.cat([black, white, black])), steps=FEW)
    stripes = torch.zeros(1, 50, 80)
    stripes[..., ::3] = 1
    plain, masked, fine = (residuals_of(world, world.apply(**m)) for m in ({}, {"mask": half}, {"mask": stripes}))
    positive, negative = world.apply(mask=half)
    inside, outside = (residuals_of(world, (in_area(positive, area), negative)) for area in (RIGHT, LEFT))
    positive, negative = world.apply()
    unmasked = residuals_of(world, (in_area(positive, RIGHT), negative))
    return {
        "white": relative(world.draw(world.apply(mask=white), steps=FEW), full),
        "black": relative(world.draw(world.apply(mask=black), steps=FEW), none),
        "one each": max(relative(each[i], (none, full, none)[i][i]) for i in range(3)),
        "kept": relative(masked[0][..., 5:], plain[0][..., 5:]),
        "kept in an area": relative(inside[0][..., 1:], unmasked[0][..., 1:]),
        "finer than a cell": relative(fine[0], plain[0] / 3),
        "left": float(masked[0][..., :3].abs().max()),
        "left in an area": float(outside[0][..., :3].abs().max()),
        "every depth": [float(m.norm() / p.norm()) for m, p in zip(masked, plain)],
        "wrong": error_of(world.apply, mask=torch.full((1, 8, 8), float("nan"))),
        "backwards": error_of(world.apply, start_percent=0.8, end_percent=0.2),
    }


def curves(world: World) -> dict:
    """A curve against constant strengths, and the strengths that it has at each step."""

    def drawn(**changes):
        return world.draw(world.apply(**changes))

    strengths, control = [], world.apply(strength=0.8, strength_curve="1, 0, 1", start_percent=0.2, end_percent=0.6)
    steered = control[0][0][1]["control"]
    steered.control_model.zero_convs[0].register_forward_hook(lambda *_: strengths.append(steered.strength))
    world.draw(control)
    steered.control_model.zero_convs[0]._forward_hooks.clear()
    return {
        "constant": relative(drawn(strength_curve="0.5, 0.5, 0.5"), drawn(strength=0.5)),
        "single": relative(drawn(strength_curve="0.5"), drawn(strength=0.5)),
        "nothing": relative(drawn(strength_curve="0, 0"), world.draw((world.positive, world.negative))),
        "strengths": strengths,
        "words": error_of(world.apply, strength_curve="1; 0"),
        "negative": error_of(world.apply, strength_curve="1, -1"),
    }


def windows(world: World) -> dict:
    """Context windows along the batch, the width and the height: which of four maps each latent gets, and which columns
    and rows; or the host's own error, where its windows fail."""
    maps, own = world.extract(0, 4), world.model
    whole = world.control.encoder.model(maps.values, (8, 8))

    def drawn(dim, length, features, batch):
        handler = comfy.context_windows.IndexListContextHandler(
            comfy.context_windows.get_matching_context_schedule("standard_static"),
            comfy.context_windows.get_matching_fuse_method("flat"),
            length,
            1,
            dim=dim,
        )
        world.model = own.clone()
        world.model.model_options["context_handler"] = handler
        steered = world.apply(features=features, guide_away_from="text")
        try:
            seen = hints_of(world, lambda: world.draw(steered, batch=batch, steps=FEW))
        finally:
            world.model = own
        return [h[len(h) // 2 :] for h in seen[: len(seen) // FEW]]  # the positive's, of the first step

    result = {}
    try:
        hints = drawn(0, 2, maps, 4)
    except (RuntimeError, IndexError) as error:
        result["failed"] = str(error)
    else:
        result["maps"] = [[int((whole - one).flatten(1).norm(dim=1).argmin()) for one in hint] for hint in hints]
        result["exact"] = max(relative(hint, whole[n]) for hint, n in zip(hints, result["maps"]))
    across, down = (drawn(dim, 6, maps.select(0), 1)[-1] for dim in (3, 2))
    result["across"] = max(relative(one, whole[0, ..., -one.shape[-1] :]) for one in across)
    result["down"] = max(relative(one, whole[0, :, -one.shape[-2] :]) for one in down)
    return result | {"columns": across.shape[-1], "rows": down.shape[-2]}


def parts(world: World) -> dict:
    """Which latents a window of the host's form names, and parts of the batch and the picture that none names."""
    module = sys.modules["pack of any name.featinv_nodes.host.parts"]
    options = {module.AREAS: {}, "uuids": [1]}

    def rows(count, **window):
        given = {**options, module.WHOLE: torch.zeros(4, 24, 8, 8), "context_window": SimpleNamespace(dim=0, **window)}
        return list(module.find_part(count, (8, 8), given, False).rows)

    def refused(count, columns):
        control = world.apply()[0][0][1]["control"]
        control.started = True
        given = {**options, module.WHOLE: torch.zeros(3, 24, 8, 8)}
        return error_of(control.get_control, torch.zeros(count, 24, 8, columns), torch.ones(count), {}, 1, given)

    return {
        "window": rows(2, index_list=[3, 0]),
        "one before": rows(3, index_list=[2, 3], causal_anchor_index=1),
        "some latents": refused(2, 8),
        "some columns": refused(3, 4),
    }


def told(draw) -> list[list[str]]:
    """[text, node, browser] of what is shown while something is drawn, by a server that is none; and the log's
    warnings."""
    shown, logged = [], []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    instance = SimpleNamespace(client_id="me", send_progress_text=lambda *message: shown.append(list(message)))
    before, sys.modules["server"] = (
        sys.modules.get("server"),
        SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)),
    )
    logging.getLogger().addHandler(handler)
    draw()
    logging.getLogger().removeHandler(handler)
    sys.modules["server"] = before
    if before is None:
        del sys.modules["server"]
    return [*shown, *([line] for line in logged if line.startswith("FeatInv"))]


def warnings(world: World) -> dict:
    """What the node says of batches and sizes."""
    from comfy_execution.utils import CurrentNodeContext

    with CurrentNodeContext("prompt", "12"):
        five, two = world.apply(features=world.extract(0, 5)), world.apply(features=world.extract(0, 2))
        one = world.apply(features=world.features.select(0), mask=torch.ones(2, 8, 8))
    with CurrentNodeContext("prompt", "13"):
        guided = guiding.guided(world, features=world.extract(0, 2), last=0.1)
    own, world.model = world.model, guided
    gradient = told(lambda: world.draw((world.positive, world.negative), batch=1, steps=FEW))
    world.model = own
    return {
        "gradient": gradient,
        "more": told(lambda: world.draw(five, batch=1, steps=FEW)),
        "right after": told(lambda: world.draw(five, batch=5, steps=FEW)),
        "again": told(lambda: world.draw(five, batch=5, steps=FEW)),
        "fewer": told(lambda: world.draw(two, batch=3, steps=FEW)),
        "in turn": told(lambda: world.draw(two, batch=4, steps=FEW)),
        "masks": told(lambda: world.draw(one, batch=1, steps=FEW)),
        "size": told(lambda: world.draw(world.apply(), size=(6, 12), steps=FEW)),
        "wide": told(lambda: world.draw(world.apply(), size=(8, 12), steps=FEW)),
    }


def empty(world: World) -> dict:
    """Empty latents of each kind of weights file, and of one that does not say."""
    from dataclasses import replace

    def shape(**base):
        control = world.control.copy()
        control.info = replace(world.control.info, base={**world.control.info.base, **base})
        return list(run("FeatInv_EmptyLatent", control_net=control, batch_size=2)["samples"].shape)

    photo, about = run("FeatInv_LoadFeatInvControlNet", weights="photo_lite0_last (embedded)")
    return {
        "drawn": shape(),
        "photo": list(run("FeatInv_EmptyLatent", control_net=photo, batch_size=1)["samples"].shape),
        "about": about,
        "minisd": shape(name="lambdalabs/miniSD-diffusers", latent_channels=4),
        "sd": shape(name="/models/sd15", latent_channels=4),
        "written": shape(name="/models/mine", latent_size=12, resolution=96),
        "unknown": error_of(shape, name="/models/mine"),
    }


def pairs(world: World, edited) -> dict:
    """Paired Latents' maps with other latents than its own, and FeatInv-Viz with other pictures."""
    change = edited(world, "object")[1]

    def prepared(seeds):
        return run(
            "FeatInv_PairedLatents",
            edit=change,
            latent=run("FeatInv_EmptyLatent", control_net=world.control, batch_size=seeds),
        )

    maps, latent = prepared(2)

    def drawn(latent):
        return nodes.KSampler().sample(world.model, 1, 2, 3.0, "ddim", "simple", *world.apply(features=maps), latent)

    def continued(latent):
        conditioning = world.apply(features=maps)
        settings = ("disable", 1, 4, 3.0, "ddim", "simple", *conditioning, latent, 2, 4, "disable")
        return nodes.KSamplerAdvanced().sample(world.model, *settings)

    def viz(count, features=maps):
        inputs = {"edit": change, "backbone": world.backbone, "threshold": 0.33, "features": features}
        return error_of(run, "FeatInv_Viz", pictures=torch.rand(count, 64, 64, 3), **inputs)

    blank = {"samples": torch.zeros(4, 24, 8, 8)}
    return {
        "own": error_of(drawn, latent),
        "fewer": error_of(drawn, {"samples": torch.zeros(2, 24, 8, 8)}),
        "other noise": error_of(drawn, blank),
        "part way": error_of(continued, {"samples": torch.randn(4, 24, 8, 8)}),
        "pictures": viz(4),
        "fewer images": viz(2),
        "other maps": viz(4, world.extract(0, 4)),
    }


def controlling(world: World, edited) -> dict:
    return {
        "areas": areas(world),
        "two_maps": two_maps(world),
        "masks": masks(world),
        "curves": curves(world),
        "windows": windows(world),
        "parts": parts(world),
        "warnings": warnings(world),
        "empty": empty(world),
        "pairs": pairs(world, edited),
    }
