"""Writes workflows/: every graph in the frontend's form, the pictures of the tiny ones drawn by a real host.

    python tests/host/make_workflows.py            with the first ComfyUI checkout that the tests find

NAME.json is the workflow, NAME.jpg its thumbnail, NAME.png the same picture carrying the workflow for drag and drop.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from graph import Graph, Node, Ref, dump, to_prompt
from hosts import PACK, Server, find_hosts
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file

FOLDER = PACK / "workflows"
RESULT, REPORT = "Result", "What came of it"
GIVEN = ("Original, as", "Outside", "Inside")  # titles of the pictures that a result is made from
PROMPT = "a high-quality, detailed, and professional image"
HUB = "https://huggingface.co"


class Tiny:
    """The embedded world: nothing to download."""

    name, side = "tiny", 64
    note = "Runs at once, on a processor too: models and pictures are part of the pack."

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        world = graph.add("FeatInv_LoadTinyWorld")
        self.model, self.positive, self.negative, self.vae = (world[i] for i in range(4))

    def settings(self, kind: str = "cnn") -> dict:
        """How the inversion model is best drawn with."""
        return read_info(model_file(f"tiny_{kind}_last")).recommended

    def backbone(self, kind: str = "cnn") -> Node:
        return self.graph.add("FeatInv_LoadBackbone", weights=f"tiny-{kind} (embedded)", timm_name="", input_size=0)

    def control(self, kind: str = "cnn") -> Node:
        return self.graph.add("FeatInv_LoadFeatInvControlNet", weights=f"tiny_{kind}_last (embedded)")

    def picture(self, number: int) -> Node:
        return self.graph.add("FeatInv_TinyWorldScenes", first=(2, 13, 24, 25, 4, 7)[number], count=1)

    def concepts(self) -> Node:
        return self.graph.add("FeatInv_LoadConcepts", file="tiny_cnn_concepts (embedded)")

    def many(self) -> dict:
        """Pictures to find concepts in, and how many of them: inputs of Discover Concepts."""
        return {"images": self.graph.add("FeatInv_TinyWorldScenes", first=100, count=64)[0], "folder": "", "concepts": 4, "name": ""}


class MiniSD:
    """The paper's base model and backbones; the inversion model is one that train.py made."""

    name, side = "minisd", 256
    note = (
        f"Needs MiniSD ({HUB}/justinpinkney/miniSD) in models/checkpoints, the backbone's timm weights in models/backbones, "
        "and an inversion model in models/featinv, trained with "
        "`accelerate launch training/train.py --config training/configs/convnext_last.yaml` (or `swinv2_last.yaml`)."
    )
    TIMM = {"cnn": "convnext_base.fb_in22k_ft_in1k", "vit": "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k"}

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        models = [{"name": "miniSD.ckpt", "url": f"{HUB}/justinpinkney/miniSD/resolve/main/miniSD.ckpt", "directory": "checkpoints"}]
        checkpoint = graph.add("CheckpointLoaderSimple", models=models, ckpt_name="miniSD.ckpt")
        self.model, self.vae = checkpoint[0], checkpoint[2]
        self.positive, self.negative = (graph.add("CLIPTextEncode", clip=checkpoint[1], text=text)[0] for text in (PROMPT, ""))

    def settings(self, kind: str = "cnn") -> dict:
        """The paper's (Table 3's caption); what the gradient gains at real size is not measured."""
        return {"strength": 1.0, "guidance": 1.75, "negative": "text", "steps": 50}

    def backbone(self, kind: str = "cnn") -> Node:
        name = self.TIMM[kind]
        models = [{"name": f"{name}.safetensors", "url": f"{HUB}/timm/{name}/resolve/main/model.safetensors", "directory": "backbones"}]
        size = {"cnn": 288, "vit": 0}[kind]  # the paper's ConvNeXt
        return self.graph.add("FeatInv_LoadBackbone", models=models, weights=f"{name}.safetensors", timm_name="", input_size=size)

    def control(self, kind: str = "cnn") -> Node:
        return self.graph.add("FeatInv_LoadFeatInvControlNet", weights={"cnn": "convnext_last.safetensors", "vit": "swinv2_last.safetensors"}[kind])

    def picture(self, number: int) -> Node:
        return self.graph.add("LoadImage", image="example.png")

    def concepts(self) -> Node:
        return self.graph.add("FeatInv_LoadConcepts", file="convnext_last_concepts.safetensors")

    def many(self) -> dict:
        return {"folder": "my_class", "concepts": 8, "name": "my_class"}


def empty(world: Tiny | MiniSD, batch: int) -> Ref:
    return world.graph.add("EmptyLatentImage", width=world.side, height=world.side, batch_size=batch)[0]


def steer(world: Tiny | MiniSD, features: Ref, control: Node, settings: dict) -> Node:
    """The conditionings of the steered sampler."""
    away = {"text": "text", "features": "text and features"}[settings["negative"]]
    return world.graph.add(
        "FeatInvControlNet", positive=world.positive, negative=world.negative, control_net=control[0], features=features,
        strength=settings["strength"], start_percent=0.0, end_percent=1.0, guide_away_from=away,
    )  # fmt: skip


def guided(world: Tiny | MiniSD, features: Ref, backbone: Node, settings: dict) -> Ref:
    """The model that looks at what it draws; the world's own where the settings have no gradient."""
    if not settings.get("gradient"):
        return world.model
    step, last = settings["gradient"], settings["gradient_steps"] / settings["steps"]
    return world.graph.add("FeatInv_FeatureGuidance", model=world.model, vae=world.vae, backbone=backbone[0], features=features, step=step, last=last)[0]


def draw(world: Tiny | MiniSD, features: Ref, control: Node, batch: int = 1, kind: str = "cnn", latent: Ref | None = None, model: Ref | None = None) -> Node:
    """Feature maps -> pictures, by the stock sampler; latent: what it starts from if not from empty latents; model: if
    not the world's own."""
    g, settings = world.graph, world.settings(kind)
    steered = steer(world, features, control, settings)
    latent = latent or empty(world, batch)
    sampled = g.add(
        "KSampler", model=model or world.model, positive=steered[0], negative=steered[1], latent_image=latent, seed=7, steps=settings["steps"],
        cfg=settings["guidance"], sampler_name="ddim", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    return g.add("VAEDecode", samples=sampled[0], vae=world.vae)


def extract(world: Tiny | MiniSD, backbone: Node, number: int) -> tuple[Node, Node]:
    picture = world.picture(number)
    return picture, world.graph.add("FeatInv_ExtractFeatures", backbone=backbone[0], image=picture[0], layer="last", pooled=False, fit="crop")


def compare(world: Tiny | MiniSD, features: Ref, backbone: Node, pictures: Node, title: str = RESULT) -> None:
    """The pictures with their cosine similarity, which is also shown as a number."""
    similar = world.graph.add("FeatInv_FeatureSimilarity", features=features, backbone=backbone[0], image=pictures[0])
    world.graph.add("PreviewImage", title=title, images=similar[0])
    world.graph.add("PreviewAny", title="Cosine similarity", source=similar[2])


def reconstruct(world: Tiny | MiniSD) -> str:
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 0)
    pictures = draw(world, features[0], control, model=guided(world, features[0], backbone, world.settings()))
    compare(world, features[0], backbone, pictures)
    world.graph.add("FeatInv_PreviewFeatures", features=features[0])
    classes = world.graph.add("FeatInv_ClassifyImage", backbone=backbone[0], image=pictures[0], fit="stretch", top=1)
    world.graph.add("PreviewImage", title="What the model takes it for", images=classes[0])
    world.graph.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    text = "**What did the model see?** The picture on the left becomes a feature map; the sampler draws a new picture that has the same map. The number below it, the cosine similarity, says how alike the two maps are: 1 is the same."
    return text + (" Feature Guidance lets the sampler look at what it draws; bypass it to see what it is worth." if "gradient" in world.settings() else "")


def seeds(world: Tiny | MiniSD) -> str:
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 1)
    model = guided(world, features[0], backbone, world.settings())
    compare(world, features[0], backbone, draw(world, features[0], control, batch=4, model=model))
    world.graph.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    return "**What does the model not care about?** Four pictures of one feature map, each from other noise. What stays the same is what the model sees; what varies is what it ignores."


def interpolate(world: Tiny | MiniSD) -> str:
    backbone, control = world.backbone(), world.control()
    a, b = (extract(world, backbone, i)[1] for i in (0, 1))
    mixed = world.graph.add("FeatInv_FeatureMix", features_a=a[0], features_b=b[0], mode="sweep", weight_a=0.5, weight_b=0.5, steps=5, soft_edge=False)
    compare(world, mixed[0], backbone, draw(world, mixed[0], control, batch=5))
    return "**What lies between two pictures?** Feature maps in equal steps from a to b, each drawn (the paper's Fig. 7). The similarity is usually lowest in the middle: a mean of two maps is not always a map that some picture has. Steps in Feature Mix and batch size in Empty Latent Image belong together."


def compose(world: Tiny | MiniSD) -> str:
    g = world.graph
    backbone, control = world.backbone(), world.control()
    (_, a), (inner, b) = (extract(world, backbone, i) for i in (0, 1))
    mask = inner[1]
    mixed = g.add("FeatInv_FeatureMix", features_a=a[0], features_b=b[0], mode="compose", weight_a=0.5, weight_b=0.5, steps=5, soft_edge=False, mask=mask, backbone=backbone[0])
    compare(world, mixed[0], backbone, draw(world, mixed[0], control))
    g.add("PreviewImage", title="Outside", images=a[1])
    g.add("PreviewImage", title="Inside", images=b[1])
    shown = g.add("MaskToImage", mask=mask)
    g.add("PreviewImage", title="Mask", images=shown[0])
    return "**Put one picture's object into another.** The feature map of b inside the mask, of a outside (the paper's Fig. 8). Paint your own mask on a loaded picture with the mask editor; it is cropped as the picture is and brought to the feature map's resolution."


def attenuate(world: Tiny | MiniSD) -> str:
    g = world.graph
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 3)
    concepts = world.concepts()
    name = "water" if world.name == "tiny" else "0"
    weaker = turned_down(world, features, concepts, control, name, 0.25)
    compare(world, weaker[0], backbone, draw(world, weaker[0], control))
    g.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    shown = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title="Where each concept is active", images=shown[0])
    g.add("PreviewAny", title="The concepts", source=concepts[1])
    return f"**Turn a concept down.** The feature map is taken apart into concepts; one of them ({name}) is multiplied by the factor, and the result is drawn. Names and numbers of the concepts are listed; try another. *Scope* says whether the changed map is like one that a picture has; where it is not, the sampler draws the nearest that is."


def turned_down(world: Tiny | MiniSD, features: Node, concepts: Node, control: Node, names: str, factor: float) -> Node:
    """The edit, and what the inversion model says of it."""
    weaker = world.graph.add("FeatInv_ConceptAttenuate", features=features[0], concepts=concepts[0], names=names, factor=factor, keep_length=True, control_net=control[0])
    world.graph.add("PreviewAny", title="Scope", source=weaker[2])
    return weaker


def viz(world: Tiny | MiniSD) -> str:
    g = world.graph
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 4)
    names, factor = ("object; sky", 0.0) if world.name == "tiny" else ("0; 1; 2", 0.25)
    weaker = turned_down(world, features, world.concepts(), control, names, factor)
    paired = g.add("FeatInv_PairedLatents", edit=weaker[1], latent=empty(world, 5))
    pictures = draw(world, paired[0], control, latent=paired[1])
    found = g.add("FeatInv_Viz", pictures=pictures[0], edit=weaker[1], backbone=backbone[0], threshold=0.33)
    g.add("PreviewImage", title=RESULT, images=found[0])
    g.add("PreviewAny", title=REPORT, source=found[4])
    g.add("PreviewImage", title="Difference", images=found[1])
    g.add("PreviewImage", title="Darker (blue) or brighter (red)", images=found[2])
    g.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    compare(world, paired[0], backbone, pictures, "All reconstructions")
    return (
        "**Where does a concept live?** FeatInv-Viz (the paper's Algorithm 1): five pictures of the map, and five of each map with a concept turned down, "
        "seed by seed from the same noise; the pixels that change are the concept's. The *slope* says whether the pictures show what was asked: the backbone "
        f"reads them again, and finds the concept at that share of what it was. Semicolons part variants, as in {names!r}; commas would turn concepts down together. "
        "The paper's factor is 0.25; 0 removes the concept. Change the number of seeds in Empty Latent Image, and keep to samplers without noise of their own (ddim, euler)."
    )


def discover(world: Tiny | MiniSD) -> str:
    g = world.graph
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 5)
    concepts = g.add("FeatInv_DiscoverConcepts", backbone=backbone[0], layer="last", method="mcd", vectors=20_000, seed=0, fit="crop", **world.many())
    g.add("PreviewAny", title="The concepts", source=concepts[1])
    shown = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    g.add("PreviewImage", title="Result: where each concept is active", images=shown[0])
    weaker = turned_down(world, features, concepts, control, "2", 0.25)
    compare(world, weaker[0], backbone, draw(world, weaker[0], control))
    where = "64 scenes" if world.name == "tiny" else "the pictures of one class, in the folder `my_class` of ComfyUI's input folder"
    return f"**Which concepts does the model have?** Directions in feature space that belong together, found in {where} without any labels (multi-dimensional concept discovery). Then: where each is active in one picture, and what is drawn when one is turned down. The list says how much of the features each is, and which classes it speaks for; put another number into Concept Attenuate."


def backbones(world: Tiny | MiniSD) -> str:
    for kind, title in (("cnn", RESULT), ("vit", "Result of the transformer")):
        backbone, control = world.backbone(kind), world.control(kind)
        picture, features = extract(world, backbone, 2)
        model = guided(world, features[0], backbone, world.settings(kind))
        compare(world, features[0], backbone, draw(world, features[0], control, 2, kind, model=model), title)
    return "**Do two models see the same?** One picture, inverted from the feature map of a convolutional network and from that of a transformer, with the same noise. What one keeps and the other loses tells them apart."


def two_guidances(world: Tiny | MiniSD) -> str:
    g = world.graph
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 3)
    steered = steer(world, features[0], control, world.settings() | {"negative": "features"})
    guider = g.add("DualCFGGuider", model=world.model, cond1=steered[0], cond2=steered[3], negative=steered[1], cfg_conds=1.0, cfg_cond2_negative=2.0, style="regular")
    noise, sampler = g.add("RandomNoise", noise_seed=7), g.add("KSamplerSelect", sampler_name="ddim")
    schedule = g.add("BasicScheduler", model=world.model, scheduler="simple", steps=world.settings()["steps"], denoise=1.0)
    sampled = g.add("SamplerCustomAdvanced", noise=noise[0], guider=guider[0], sampler=sampler[0], sigmas=schedule[0], latent_image=empty(world, 2))
    compare(world, features[0], backbone, g.add("VAEDecode", samples=sampled[0], vae=world.vae))
    g.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    return (
        "**How much features, how much prompt?** Guidance in two parts, each with a scale of its own: `cfg_cond2_negative` towards the features, from no features at all; "
        "`cfg_conds` from there towards the prompt. With equal scales the picture is KSampler's. Raise the first for a picture more like the feature map, the second for one more like the prompt; "
        "0 for the second leaves the prompt out."
    )


def faithful(world: Tiny | MiniSD) -> str:
    g = world.graph
    backbone, control = world.backbone(), world.control()
    picture, features = extract(world, backbone, 1)
    how = world.settings() | {"gradient": 0.05, "gradient_steps": world.settings()["steps"] // 2}
    pictures = draw(world, features[0], control, batch=4, model=guided(world, features[0], backbone, how))
    kept = g.add("FeatInv_KeepMostSimilar", image=pictures[0], features=features[0], backbone=backbone[0], keep=1)
    compare(world, features[0], backbone, kept)
    g.add("PreviewAny", title="The best, and the range of all", source=kept[1])
    g.add("PreviewImage", title="Original, as the model saw it", images=features[1])
    return (
        "**As faithful as it gets.** Two ways to a higher cosine similarity, for more time: in the last steps Feature Guidance decodes the picture so far, lets the backbone read it, "
        "and moves the latents towards the feature map; and of several pictures from different noise, Keep Most Similar keeps the best. Bypass Feature Guidance to see what each is worth. "
        "The backbone is asked for what it is then judged by: another backbone may like the picture less."
    )


WORKFLOWS = {
    "reconstruct": reconstruct, "seeds": seeds, "interpolate": interpolate, "compose": compose, "attenuate": attenuate, "viz": viz, "discover": discover,
    "backbones": backbones, "two_guidances": two_guidances, "faithful": faithful,
}  # fmt: skip


def graphs() -> dict[str, Graph]:
    """All workflows by name."""
    found = {}
    for kind in (Tiny, MiniSD):
        for name, build in WORKFLOWS.items():
            graph = Graph()
            world = kind(graph)
            graph.note = f"{build(world)}\n\n{world.note}"
            found[f"{world.name}_{name}"] = graph
    return found


def results(server: Server, workflow: dict, outputs: dict) -> Image.Image:
    """The pictures of the nodes titled Result (and those beside them that show an original), in a row."""
    shown = [n for n in workflow["nodes"] if n["type"] == "PreviewImage" and n["title"].startswith((RESULT, *GIVEN))]
    shown.sort(key=lambda n: not n["title"].startswith(GIVEN))
    pictures = []
    for node in shown:
        for entry in outputs[str(node["id"])]["images"]:
            query = f"/view?filename={entry['filename']}&subfolder={entry['subfolder']}&type={entry['type']}"
            pictures.append(Image.open(io.BytesIO(server.file(query))).convert("RGB"))
    side = 256
    pictures = [p.resize((side, round(p.height * side / p.width)), Image.Resampling.NEAREST) if p.width != side else p for p in pictures]
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + 8 * (len(pictures) - 1), max(p.height for p in pictures)), "white")
    x = 0
    for p in pictures:
        sheet.paste(p, (x, 0))
        x += p.width + 8
    return sheet


def write(server: Server, name: str, graph: Graph, info: dict) -> None:
    workflow = graph.frontend(info)
    (FOLDER / f"{name}.json").write_text(dump(workflow))
    if not name.startswith("tiny"):
        return
    prompt = to_prompt(workflow, info)
    picture = results(server, workflow, server.run(prompt))
    carried = PngInfo()
    carried.add_text("prompt", json.dumps(prompt))
    carried.add_text("workflow", json.dumps(workflow))
    picture.save(FOLDER / f"{name}.png", pnginfo=carried)
    picture.save(FOLDER / f"{name}.jpg", quality=88)
    print(f"wrote {name}: {picture.size}")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        server = Server(find_hosts()[0], Path(base))
        try:
            info = server.get("/object_info")
            for name, graph in graphs().items():
                write(server, name, graph, info)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
