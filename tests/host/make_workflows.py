"""Writes workflows/: every graph in the frontend's form, the pictures of the embedded worlds' drawn by a real host.

    python tests/host/make_workflows.py            with the first ComfyUI checkout that the tests find
    python tests/host/make_workflows.py photo      those whose names begin so
    python tests/host/make_workflows.py photo --graphs-only

NAME.json is the workflow, NAME.jpg its thumbnail, NAME.png the same picture carrying the workflow for drag and drop. No
picture of a host's own is shown: in thumbnails example.png is scikit-learn's china.jpg, the second picture flower.jpg.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from graph import GIVEN, Graph, Node, Ref, dump, to_prompt
from hosts import PACK, Server, find_hosts
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from workflow_worlds import EXAMPLE, TURNED, Drawn, MiniSD, Photo, World

FOLDER = PACK / "workflows"
RESULT, REPORT, SIMILARITY = "Result", "What came of it", "Cosine similarity"
ORIGINAL = "Original, as the model saw it"
SECOND = "flower.png"


def add_control(world: World, features: Ref, control: Node, settings: dict) -> Node:
    """The conditionings of the steered sampler."""
    away = {"text": "text", "features": "text and features"}[settings["negative"]]
    return world.graph.add(
        "FeatInvControlNet",
        positive=world.positive,
        negative=world.negative,
        control_net=control[0],
        features=features,
        strength=settings["strength"],
        start_percent=0.0,
        end_percent=1.0,
        guide_away_from=away,
    )


def guided(world: World, features: Ref, backbone: Node, settings: dict) -> Ref:
    """The model that looks at what it draws; the world's own where the settings have no gradient."""
    if not settings.get("gradient"):
        return world.model
    step, last = settings["gradient"], min(settings.get("gradient_steps", 10) / settings["steps"], 1.0)
    return world.graph.add(
        "FeatInv_FeatureGuidance",
        model=world.model,
        vae=world.vae,
        backbone=backbone[0],
        features=features,
        step=step,
        last=last,
    )[0]


def draw(
    world: World,
    features: Ref,
    control: Node,
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


def start(world: World, kind: str = "") -> tuple[Node, Node]:
    """The backbone and its inversion model."""
    return world.backbone(kind or world.kind), world.control(kind or world.kind)


def extract(
    world: World, backbone: Node, number: int, kind: str = "", picture: Node | None = None
) -> tuple[Node, Node]:
    """A picture, a new one of the world's unless given, and its feature map."""
    picture = picture or world.picture(number)
    return picture, world.graph.add(
        "FeatInv_ExtractFeatures", backbone=backbone[0], image=picture[0], **world.layer(kind or world.kind), fit="crop"
    )


def compare(
    world: World, features: Ref, backbone: Node, pictures: Ref, title: str = RESULT, number: str = SIMILARITY
) -> None:
    """The pictures with their cosine similarity, which is also shown as a number."""
    similar = world.graph.add("FeatInv_FeatureSimilarity", features=features, backbone=backbone[0], image=pictures)
    world.graph.add("PreviewImage", title=title, images=similar[0])
    world.graph.add("PreviewAny", title=number, source=similar[2])


def reconstruct(world: World) -> str:
    backbone, control = start(world)
    picture, features = extract(world, backbone, 0)
    pictures = draw(world, features[0], control, model=guided(world, features[0], backbone, world.settings(world.kind)))
    compare(world, features[0], backbone, pictures[0])
    world.graph.add("FeatInv_PreviewFeatures", features=features[0])
    classes = world.graph.add("FeatInv_ClassifyImage", backbone=backbone[0], image=pictures[0], fit="stretch", top=1)
    world.graph.add("PreviewImage", title="What the model takes it for", images=classes[0])
    world.graph.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    text = (
        "**What did the model see?** The picture on the left becomes a feature map; the sampler draws a new picture"
        " that has the same map. The number below it, the cosine similarity, says how alike the two maps are: 1 is the"
        " same."
    )
    return text + (
        " Feature Guidance lets the sampler look at what it draws; bypass it to see what it is worth."
        if "gradient" in world.settings(world.kind)
        else ""
    )


def seeds(world: World) -> str:
    backbone, control = start(world)
    picture, features = extract(world, backbone, 1)
    model = guided(world, features[0], backbone, world.settings(world.kind))
    compare(world, features[0], backbone, draw(world, features[0], control, batch=4, model=model)[0])
    world.graph.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    return (
        "**What does the model not care about?** Four pictures of one feature map, each from other noise. What stays"
        " the same is what the model sees; what varies is what it ignores."
    )


def interpolate(world: World) -> str:
    backbone, control = start(world)
    a, b = (extract(world, backbone, i)[1] for i in (0, 1))
    mixed = world.graph.add(
        "FeatInv_FeatureMix",
        features_a=a[0],
        features_b=b[0],
        mode="sweep",
        weight_a=0.5,
        weight_b=0.5,
        steps=5,
        soft_edge=False,
    )
    compare(world, mixed[0], backbone, draw(world, mixed[0], control, batch=5)[0])
    if world.graph.pictures_below:
        for letter, features in (("a", a), ("b", b)):
            world.graph.add("PreviewImage", title=f"Original {letter}", images=world.as_seen(features))
    return (
        "**What lies between two pictures?** Feature maps in equal steps from a to b, each drawn (the paper's Fig. 7)."
        " The similarity is usually lowest in the middle: a mean of two maps is not always a map that some picture"
        f" has. Steps in Feature Mix and {' in '.join(world.batch)} belong together.{world.second}"
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
    return (
        "**Put one picture's object into another.** The feature map of b inside the mask, of a outside (the paper's"
        f" Fig. 8). {world.paint}{world.second}"
    )


def attenuate(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 3)
    concepts = world.concepts(backbone, picture)
    name = "water" if world.name == "drawn" else "0"
    weaker = turned_down(world, features, concepts, control, name, 0.25)
    settings = world.settings(world.kind)
    steered, latent = add_control(world, weaker[0], control, settings), world.empty(1)
    pictures = sample(world, steered, settings, latent)
    g.add("PreviewImage", title="Without the closed loop", images=pictures[0])
    found = closed_loop(world, weaker, backbone, steered, settings, latent)
    compare(world, weaker[0], backbone, found[0])
    g.add("PreviewAny", title=REPORT, source=found[1])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title="Where each concept is active", images=previews[0])
    g.add("PreviewAny", title="The concepts", source=concepts[1])
    return (
        f"**Turn a concept down.** The feature map is taken apart into concepts; one of them ({name}) is multiplied by"
        " the factor, and the result is drawn. Names and numbers of the concepts are listed; try another. *Scope* says"
        " whether the changed map is like one that a picture has; where it is not, the sampler draws the nearest"
        " that is, and the concept may still be there. So Concept Closed Loop draws, lets the backbone read the"
        " picture, and commands another factor, until the picture shows what was asked or the rounds are used up."
    )


def closed_loop(world: World, edited: Node, backbone: Node, steered: Node, settings: dict, latent: Ref) -> Node:
    """The node that draws an edit until it shows what was asked, with the sampler that `sample` uses."""
    g = world.graph
    guider = g.add("CFGGuider", model=world.model, positive=steered[0], negative=steered[1], cfg=settings["guidance"])
    schedule = g.add("BasicScheduler", model=world.model, scheduler="simple", steps=settings["steps"], denoise=1.0)
    return g.add(
        "FeatInv_ClosedLoop",
        edit=edited[1],
        backbone=backbone[0],
        vae=world.vae,
        noise=g.add("RandomNoise", noise_seed=7)[0],
        guider=guider[0],
        sampler=g.add("KSamplerSelect", sampler_name="ddim")[0],
        sigmas=schedule[0],
        latent_image=latent,
        rounds=5,
    )


def turned_down(world: World, features: Node, concepts: Node, control: Node, names: str, factor: float) -> Node:
    """The edit, and what the inversion model says of it."""
    weaker = world.graph.add(
        "FeatInv_ConceptAttenuate",
        features=features[0],
        concepts=concepts[0],
        names=names,
        factor=factor,
        keep_length=True,
        control_net=control[0],
    )
    world.graph.add("PreviewAny", title="Scope", source=weaker[2])
    return weaker


def viz(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 4)
    names, factor = ("object; sky", 0.0) if world.name == "drawn" else ("0; 1; 2", 0.25)
    weaker = turned_down(world, features, world.concepts(backbone, picture), control, names, factor)
    settings = world.settings(world.kind)
    steered = add_control(world, weaker[0], control, settings)
    found = closed_loop(world, weaker, backbone, steered, settings, world.empty(5))
    g.add("PreviewAny", title="What was commanded", source=found[1])
    result = g.add("FeatInv_Viz", pictures=found[4], edit=found[6], backbone=backbone[0], threshold=0.33)
    g.add("PreviewImage", title=RESULT, images=result[0])
    g.add("PreviewAny", title=REPORT, source=result[4])
    g.add("PreviewImage", title="Difference", images=result[1])
    g.add("PreviewImage", title="Darker (blue) or brighter (red)", images=result[2])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    compare(world, found[5], backbone, found[4], "All reconstructions")
    return (
        "**Where does a concept live?** FeatInv-Viz (the paper's Algorithm 1): five pictures of the map, and five of"
        " each map with a concept turned down, seed by seed from the same noise; the pixels that change are the"
        " concept's. The *slope* says whether the pictures show what was asked: the backbone reads them again, and"
        " finds the concept at that share of what it was. Where the factor asked does not do that, Concept Closed Loop"
        " commands others, up to its number of rounds; with 1 it draws what was asked. Semicolons part variants, as in"
        f" {names!r}; commas would turn concepts down together. The paper's factor is 0.25; 0 removes the concept."
        " Change the number of seeds in"
        f" {world.batch[1]}, and keep to samplers without noise of their own (ddim, euler)."
    )


def discover(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 5)
    concepts = g.add(
        "FeatInv_DiscoverConcepts",
        backbone=backbone[0],
        layer="last",
        method="mcd",
        vectors=20_000,
        seed=0,
        fit="crop",
        **world.many(),
    )
    g.add("PreviewAny", title="The concepts", source=concepts[1])
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    g.add("PreviewImage", title="Result: where each concept is active", images=previews[0])
    weaker = turned_down(world, features, concepts, control, "2", 0.25)
    compare(world, weaker[0], backbone, draw(world, weaker[0], control)[0])
    where = (
        "64 scenes"
        if world.name == "drawn"
        else "the pictures of one class, in the folder `my_class` of ComfyUI's input folder"
    )
    return (
        f"**Which concepts does the model have?** Directions in feature space that belong together, found in {where}"
        " without any labels (multi-dimensional concept discovery). Then: where each is active in one picture, and"
        " what is drawn when one is turned down. The list says how much of the features each is, and which classes it"
        " speaks for; put another number into Concept Attenuate."
    )


def backbones(world: World) -> str:
    for kind, title in (("cnn", RESULT), ("vit", "Result of the transformer")):
        backbone, control = start(world, kind)
        picture, features = extract(world, backbone, 2)
        model = guided(world, features[0], backbone, world.settings(kind))
        compare(world, features[0], backbone, draw(world, features[0], control, 2, kind, model=model)[0], title)
    return (
        "**Do two models see the same?** One picture, inverted from the feature map of a convolutional network and from"
        " that of a transformer, with the same noise. What one keeps and the other loses tells them apart."
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
        "**How much features, how much prompt?** Guidance in two parts, each with a scale of its own:"
        " `cfg_cond2_negative` towards the features, from no features at all; `cfg_conds` from there towards the"
        " prompt. With equal scales the picture is KSampler's. Raise the first for a picture more like the feature map,"
        " the second for one more like the prompt; 0 for the second leaves the prompt out."
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
    kept = g.add("FeatInv_KeepMostSimilar", image=pictures[0], features=features[0], backbone=backbone[0], keep=1)
    compare(world, features[0], backbone, kept[0])
    g.add("PreviewAny", title="The best, and the range of all", source=kept[1])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    return (
        "**As faithful as it gets.** Two ways to a higher cosine similarity, for more time: in the last steps Feature"
        " Guidance decodes the picture so far, lets the backbone read it, and moves the latents towards the feature"
        " map; and of several pictures from different noise, Keep Most Similar keeps the best. Bypass Feature Guidance"
        " to see what each is worth. The backbone is asked for what it is then judged by: another backbone may like the"
        " picture less."
    )


def depth(world: World) -> str:
    backbone = world.backbone(world.kind)
    picture = world.picture(0)
    for kind, (layer, pooled) in world.LAYERS.items():
        title = f"{layer}, pooled" if pooled else layer
        world.graph.lane(title)
        control, (_, features) = world.control(kind), extract(world, backbone, 0, kind, picture)
        if kind == next(iter(world.LAYERS)):
            world.graph.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
        model = guided(world, features[0], backbone, world.settings(kind))
        compare(
            world,
            features[0],
            backbone,
            draw(world, features[0], control, kind=kind, model=model)[0],
            f"{RESULT}: {title}",
            f"{SIMILARITY}: {title}",
        )
    return (
        "**What is lost on the way up?** One photograph, drawn again from what four depths of one network hold of it,"
        " with the same noise: early layers keep the picture, later ones what is where, and the mean over all places"
        " (pooled) only what there is. Each cosine similarity is measured at its own layer, so the numbers do not"
        " compare."
    )


def concept(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 0)
    concepts = world.concepts(backbone, picture)
    g.add("PreviewAny", title="The concepts", source=concepts[1])
    weaker = turned_down(world, features, concepts, control, "1", 0.25)
    paired = g.add("FeatInv_PairedLatents", edit=weaker[1], latent=world.empty(1))
    compare(world, paired[0], backbone, draw(world, paired[0], control, latent=paired[1])[0])
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    g.add("PreviewImage", title=f"{RESULT}: where each concept is active", images=previews[0])
    return (
        "**What is the picture made of, to the model?** Concepts, directions in feature space that belong together,"
        " found in this one picture without any labels (multi-dimensional concept discovery). Then two pictures from"
        " the same noise: of the feature map as it is, and with concept 1 at a quarter. See where each concept is"
        " active, and put another number into Concept Attenuate."
    )


COMMON = (reconstruct, seeds, interpolate, compose, viz)
WORKFLOWS = {
    Drawn: (*COMMON, attenuate, discover, backbones, two_guidances, faithful),
    Photo: (*COMMON, depth, concept),
    MiniSD: (*COMMON, attenuate, discover, backbones, two_guidances, faithful),
}


def graphs() -> dict[str, Graph]:
    """All workflows by name."""
    result = {}
    for kind, builders in WORKFLOWS.items():
        for build in builders:
            graph = Graph()
            world = kind(graph, build.__name__)
            graph.note = f"{build(world)}\n\n{world.note}"
            result[f"{world.prefix}_{build.__name__}"] = graph
    return result


def results(server: Server, workflow: dict, outputs: dict) -> Image.Image:
    """The pictures of the nodes titled Result (and those beside them that show an original), in a row."""
    previews = [
        n for n in workflow["nodes"] if n["type"] == "PreviewImage" and n["title"].startswith((RESULT, *GIVEN[:3]))
    ]
    previews.sort(key=lambda n: not n["title"].startswith(GIVEN))
    pictures = []
    for node in previews:
        for entry in outputs[str(node["id"])]["images"]:
            query = f"/view?filename={entry['filename']}&subfolder={entry['subfolder']}&type={entry['type']}"
            pictures.append(Image.open(io.BytesIO(server.file(query))).convert("RGB"))
    side = 256
    pictures = [
        p.resize((side, round(p.height * side / p.width)), Image.Resampling.NEAREST) if p.width != side else p
        for p in pictures
    ]
    sheet = Image.new(
        "RGB", (sum(p.width for p in pictures) + 8 * (len(pictures) - 1), max(p.height for p in pictures)), "white"
    )
    x = 0
    for p in pictures:
        sheet.paste(p, (x, 0))
        x += p.width + 8
    return sheet


def with_second_picture(prompt: dict, graph: Graph) -> dict:
    """The prompt as a user runs it who has a second picture and bypassed the flip that stood in for one."""
    instead = {str(node.id): prompt[str(node.id)]["inputs"]["image"] for node in graph.nodes if node.title == TURNED}
    changed = {}
    for number, node in prompt.items():
        inputs = {
            name: instead.get(value[0], value) if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        changed[number] = node | {"inputs": inputs}
    for number, _ in instead.values():
        changed[number]["inputs"]["image"] = SECOND
    return changed


def write(server: Server, name: str, graph: Graph, info: dict, pictures: bool) -> None:
    workflow = graph.frontend(info)
    (FOLDER / f"{name}.json").write_text(dump(workflow))
    if not pictures:
        return
    prompt = to_prompt(workflow, info)
    picture = results(server, workflow, server.run(with_second_picture(prompt, graph)))
    carried = PngInfo()
    carried.add_text("prompt", json.dumps(prompt))
    carried.add_text("workflow", json.dumps(workflow))
    picture.save(FOLDER / f"{name}.png", pnginfo=carried)
    picture.save(FOLDER / f"{name}.jpg", quality=88)
    print(f"wrote {name}: {picture.size}", flush=True)


def main() -> None:
    from sklearn.datasets import load_sample_image  # takes seconds; the tests import this file for its graphs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of the workflows' names (default: all)")
    parser.add_argument("--graphs-only", action="store_true", help="leave the pictures as they are")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        server = Server(find_hosts()[0], Path(base))
        try:
            for file, picture in ((EXAMPLE, "china.jpg"), (SECOND, "flower.jpg")):
                Image.fromarray(load_sample_image(picture)).save(Path(base, "input", file))
            info = server.get("/object_info")
            for name, graph in graphs().items():
                if name.startswith(tuple(options.names)):
                    write(server, name, graph, info, not options.graphs_only and not name.startswith(MiniSD.prefix))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
