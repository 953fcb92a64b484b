"""What several workflows are built of: extracting, drawing, comparing, turning concepts down."""

from __future__ import annotations

from graph import Node, Ref
from layout import SEEN
from workflow_worlds import World

RESULT, REPORT, SIMILARITY = "Result", "Report", "Cosine similarity"
ORIGINAL = "Original, as the model saw it"


def add_control(world: World, features: Ref, control: Ref, settings: dict) -> Node:
    """The conditionings of the steered sampler."""
    away = {"text": "text", "features": "text and features"}[settings["negative"]]
    return world.graph.add(
        "FeatInvControlNet",
        positive=world.positive,
        negative=world.negative,
        control_net=control,
        features=features,
        strength=settings["strength"],
        start_percent=0.0,
        end_percent=1.0,
        guide_away_from=away,
    )


def guided(world: World, features: Ref, backbone: Ref, settings: dict) -> Ref:
    """The model that looks at what it draws; the world's own where the settings have no gradient."""
    if not settings.get("gradient"):
        return world.model
    step, last = settings["gradient"], min(settings.get("gradient_steps", 10) / settings["steps"], 1.0)
    return world.graph.add(
        "FeatInv_FeatureGuidance",
        model=world.model,
        vae=world.vae,
        backbone=backbone,
        features=features,
        step=step,
        last=last,
    )[0]


def draw(
    world: World,
    features: Ref,
    control: Ref,
    batch: int = 1,
    kind: str = "",
    latent: Ref | None = None,
    model: Ref | None = None,
) -> Node:
    """Feature maps -> pictures, by the stock sampler; latent: what it starts from if not from empty latents; model: if
    not the world's own."""
    settings = world.settings(kind or world.kind)
    steered = add_control(world, features, control, settings)
    return sample(world, steered, settings, latent or world.empty(batch), model)


def sample(world: World, steered: Node, settings: dict, latent: Ref, model: Ref | None = None) -> Node:
    """The stock sampler and the decoder behind FeatInv ControlNet."""
    g = world.graph
    sampled = g.add(
        "KSampler",
        model=model or world.model,
        positive=steered[0],
        negative=steered[1],
        latent_image=latent,
        seed=7,
        steps=settings["steps"],
        cfg=settings["guidance"],
        sampler_name="ddim",
        scheduler="simple",
        denoise=1.0,
    )
    return g.add("VAEDecode", samples=sampled[0], vae=world.vae)


def start(world: World, kind: str = "") -> tuple[Ref, Ref]:
    """The backbone and its inversion model."""
    return world.backbone(kind or world.kind), world.control(kind or world.kind)


def extract(
    world: World, backbone: Ref, number: int, kind: str = "", picture: Node | None = None, **more: Ref
) -> tuple[Node, Node]:
    """A picture, a new one of the world's unless given, and its feature map; more: further inputs."""
    picture = picture or world.picture(number)
    return picture, world.graph.add(
        "FeatInv_ExtractFeatures",
        backbone=backbone,
        image=picture[0],
        **world.layer(kind or world.kind),
        fit="crop",
        **more,
    )


def compare(
    world: World, features: Ref, backbone: Ref, pictures: Ref, title: str = RESULT, number: str | None = SIMILARITY
) -> None:
    """The pictures with their cosine similarity. number: title of the node that shows it as a number, too; None for
    none, as Feature Similarity shows it itself."""
    similar = world.graph.add(
        "FeatInv_FeatureSimilarity",
        title=None if number else title.replace(RESULT, SIMILARITY),
        features=features,
        backbone=backbone,
        image=pictures,
    )
    world.graph.add("PreviewImage", title=title, images=similar[0])
    if number:
        world.graph.add("PreviewAny", title=number, source=similar[2])


def closed_loop(world: World, edited: Node, backbone: Ref, steered: Node, settings: dict, latent: Ref) -> Node:
    """The node that draws an edit until it shows what was asked, with the sampler that `sample` uses."""
    g = world.graph
    guider = g.add("CFGGuider", model=world.model, positive=steered[0], negative=steered[1], cfg=settings["guidance"])
    schedule = g.add("BasicScheduler", model=world.model, scheduler="simple", steps=settings["steps"], denoise=1.0)
    return g.add(
        "FeatInv_ClosedLoop",
        edit=edited[1],
        backbone=backbone,
        vae=world.vae,
        noise=g.add("RandomNoise", noise_seed=7)[0],
        guider=guider[0],
        sampler=g.add("KSamplerSelect", sampler_name="ddim")[0],
        sigmas=schedule[0],
        latent_image=latent,
        rounds=5,
    )


def turned_down(world: World, features: Node, concepts: Node, control: Ref, names: str, factor: float) -> Node:
    """The edit, and what the inversion model says of it."""
    weaker = world.graph.add(
        "FeatInv_ConceptAttenuate",
        features=features[0],
        concepts=concepts[0],
        names=names,
        factor=factor,
        keep_length=True,
        control_net=control,
    )
    world.graph.add("PreviewAny", title="Scope", stage=SEEN, source=weaker[2])
    return weaker


def sweep(world: World, a: Node, b: Node) -> Node:
    """Feature maps in five equal steps from a to b."""
    return world.graph.add(
        "FeatInv_FeatureMix",
        features_a=a[0],
        features_b=b[0],
        mode="sweep",
        weight_a=0.5,
        weight_b=0.5,
        steps=5,
        soft_edge=False,
    )
