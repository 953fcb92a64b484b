"""The workflows about images and feature maps. Each function adds its nodes and returns its note."""

from __future__ import annotations

from workflow_parts import ORIGINAL, RESULT, add_control, compare, draw, extract, guided, start, sweep
from workflow_worlds import Photo, World


def reconstruct(world: World) -> str:
    backbone, control, follow = world.pair()
    picture, features = extract(world, backbone, 0, **follow)
    # six nodes of the pack at most: where a node draws the picture to invert, none guides
    settings = world.settings(world.kind) if isinstance(world, Photo) else {}
    model = guided(world, features[0], backbone, settings)
    compare(world, features[0], backbone, draw(world, features[0], control, model=model)[0])
    world.graph.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    text = (
        "**What did the model see?** The image on the left becomes a feature map, and the sampler makes a new image"
        " from this map alone. The number below is the cosine similarity of the two images' maps: 1 means the same."
    )
    return text + (
        " Feature Guidance makes the image more faithful; bypass it to see the difference."
        if "gradient" in settings
        else ""
    )


def seeds(world: World) -> str:
    backbone, control = start(world)
    picture, features = extract(world, backbone, 1)
    model = guided(world, features[0], backbone, world.settings(world.kind))
    pictures = draw(world, features[0], control, batch=4, model=model)
    compare(world, features[0], backbone, pictures[0])
    world.graph.add("FeatInv_PreviewFeatures", features=features[0])
    classes = world.graph.add("FeatInv_ClassifyImage", backbone=backbone, image=pictures[0], fit="stretch", top=1)
    world.graph.add("PreviewImage", title="Predicted classes", images=classes[0])
    world.graph.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    return (
        "**What does the model not see?** Four images of one feature map, each from different noise. The model sees"
        " what stays the same, and ignores what varies."
    )


def interpolate(world: World) -> str:
    backbone, control = start(world)
    a, b = (extract(world, backbone, i)[1] for i in (0, 1))
    mixed = sweep(world, a, b)
    compare(world, mixed[0], backbone, draw(world, mixed[0], control, batch=5)[0])
    for letter, features in (("a", a), ("b", b)):
        world.graph.add("PreviewImage", title=f"Original {letter}", images=world.as_seen(features))
    world.graph.needs = world.second
    return (
        "**What lies between two images?** Feature maps in equal steps from a to b, each inverted (the paper's Fig. 7)."
        " The similarity is usually lowest in the middle, since often no image has the mean of two maps. Set steps"
        f" in Feature Mix and {' in '.join(world.batch)} to the same number."
    )


def compose(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    (_, a), (inner, b) = (extract(world, backbone, i) for i in (0, 1))
    where = world.mask(inner, backbone)
    mixed = g.add(
        "FeatInv_FeatureMix",
        features_a=a[0],
        features_b=b[0],
        mode="compose",
        weight_a=0.5,
        weight_b=0.5,
        steps=5,
        soft_edge=False,
        **where,
    )
    compare(world, mixed[0], backbone, draw(world, mixed[0], control)[0])
    g.add("PreviewImage", title="Outside", images=world.as_seen(a))
    g.add("PreviewImage", title="Inside", images=world.as_seen(b))
    previews = g.add("MaskToImage", mask=where["mask"])
    g.add("PreviewImage", title="Mask", images=previews[0])
    g.needs = f"{world.paint} {world.second}"
    return (
        "**Put one image's object into another.** The feature map is b's inside the mask and a's outside (the paper's"
        " Fig. 8)."
    )


def backbones(world: World) -> str:
    picture = world.picture(2)
    for kind, name in (("cnn", "convolutional network"), ("vit", "transformer")):
        world.graph.lane(f"What the {name} sees")
        title = f"{RESULT} of the {name}"
        backbone, control = start(world, kind)
        _, features = extract(world, backbone, 2, picture=picture)
        if kind == "cnn":
            world.graph.add("PreviewImage", title="Original", images=world.as_seen(features))
        model = guided(world, features[0], backbone, world.settings(kind))
        compare(world, features[0], backbone, draw(world, features[0], control, 2, kind, model=model)[0], title)
    return (
        "**Do two models see the same?** One image, reconstructed from the feature map of a convolutional network and"
        " from that of a transformer, with the same noise. Look for what one keeps and the other loses."
    )


def two_guidances(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 3)
    steered = add_control(world, features[0], control, world.settings(world.kind) | {"negative": "features"})
    guider = g.add(
        "DualCFGGuider",
        model=world.model,
        cond1=steered[0],
        cond2=steered[3],
        negative=steered[1],
        cfg_conds=1.0,
        cfg_cond2_negative=2.0,
        style="regular",
    )
    noise, sampler = g.add("RandomNoise", noise_seed=7), g.add("KSamplerSelect", sampler_name="ddim")
    schedule = g.add(
        "BasicScheduler", model=world.model, scheduler="simple", steps=world.settings(world.kind)["steps"], denoise=1.0
    )
    sampled = g.add(
        "SamplerCustomAdvanced",
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=schedule[0],
        latent_image=world.empty(2),
    )
    compare(world, features[0], backbone, g.add("VAEDecode", samples=sampled[0], vae=world.vae)[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    return (
        "**How much features, how much prompt?** Guidance has two parts, each with its own scale:"
        " `cfg_cond2_negative` pushes towards the features, `cfg_conds` from there towards the prompt. With equal"
        " scales the image is KSampler's. Raise the first for an image more like the feature map, the second for one"
        " more like the prompt. 0 for the second leaves the prompt out."
    )


def faithful(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 1)
    settings = world.settings(world.kind) | {
        "gradient": 0.05,
        "gradient_steps": world.settings(world.kind)["steps"] // 2,
    }
    pictures = draw(world, features[0], control, batch=4, model=guided(world, features[0], backbone, settings))
    kept = g.add("FeatInv_KeepMostSimilar", image=pictures[0], features=features[0], backbone=backbone, keep=1)
    compare(world, features[0], backbone, kept[0])
    g.add("PreviewAny", title="The best, and the range of all", source=kept[1])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    return (
        "**The most faithful image.** Two nodes raise the cosine similarity, and take more time. In the last steps,"
        " Feature Guidance decodes the predicted image, lets the backbone read it, and moves the latents towards the"
        " feature map. Keep Most Similar keeps the best of several images from different noise. Bypass Feature"
        " Guidance to compare. Both raise the very cosine that is shown; that of another backbone may rise less."
    )


def depth(world: World) -> str:
    backbone = world.backbone(world.kind)
    picture = world.picture(0)
    for kind, (layer, pooled) in world.LAYERS.items():
        title = f"{layer}, pooled" if pooled else layer
        world.graph.lane(f"What {title} sees")
        control, (_, features) = world.control(kind, folded=True), extract(world, backbone, 0, kind, picture)
        if kind == next(iter(world.LAYERS)):
            world.graph.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
        model = guided(world, features[0], backbone, world.settings(kind))
        compare(
            world,
            features[0],
            backbone,
            draw(world, features[0], control, kind=kind, model=model)[0],
            f"{RESULT}: {title}",
            number=None,
        )
    return (
        "**What does each depth keep?** One photograph, inverted at four depths of one network, with the same"
        " noise. Early layers keep the image, later ones what is where, and the mean over all locations"
        " (pooled) only what there is. Each cosine similarity is measured at its own layer: do not compare the"
        " numbers."
    )
