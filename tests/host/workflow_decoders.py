"""The workflows that decode feature maps, with no diffusion model: with a published decoder, and the same with the
embedded one. Each function adds its nodes and returns its note."""

from __future__ import annotations

from graph import Graph, Node, Ref
from layout import DRAWN, SEEN
from workflow_parts import ORIGINAL, RESULT, SIMILARITY, compare, extract, sweep
from workflow_worlds import EXAMPLE, HUB, Photo, World, mirrored_concepts


class PhotoRAE(Photo):
    """The world of photographs, drawn by its feature decoder."""

    prefix, decoder = "photo_rae", "decoder_lite0_blocks4 (embedded)"
    #: of its pictures in pixels: what the backbone reads
    side = 160
    note = (
        "Runs at once, even without a GPU: the pack contains the decoder. Load a photograph of your own: ComfyUI's"
        " example is a drawing, which this decoder of photographs reproduces poorly."
    )

    def __init__(self, graph: Graph, workflow: str) -> None:
        self.graph, self.loaded = graph, 0  # and no diffusion model


class RAE(World):
    """A published decoder of a feature map of DINOv2, which anybody can download."""

    name, prefix, side = "rae", "rae", 224
    decoder = "RAE-dinov2-wReg-base-ViTXL-n08"
    TIMM = "vit_base_patch14_reg4_dinov2.lvd142m"
    second = "Image b is the example too. Load your own in the second Load Image."
    note = (
        "Run `python3 run.py download rae-dinov2-base` in the pack's folder. It fetches two models into ComfyUI's"
        " folders:\n"
        f"- `{TIMM}`, the backbone, in `models/backbones` ([timm]({HUB}/timm/{TIMM}))\n"
        f"- `{decoder}`, the decoder, in `models/featinv_decoders` ([its page]({HUB}/nyu-visionx/{decoder}))"
    )

    def backbone(self, kind: str) -> Ref:
        weights = f"{self.TIMM}/model.safetensors"
        return self.graph.add("FeatInv_LoadBackbone", weights=weights, timm_name="", input_size=self.side)[0]

    def picture(self, number: int) -> Node:
        return self.graph.add("LoadImage", image=EXAMPLE)

    def concepts(self, backbone: Ref, picture: Node) -> Node:
        return mirrored_concepts(self.graph, backbone, picture, "last")


def decoder(world: World) -> tuple[Ref, Ref]:
    """The backbone, and the decoder of its maps."""
    backbone = world.backbone(world.kind)
    loaded = world.graph.add("FeatInv_LoadFeatureDecoder", decoder=world.decoder, backbone=backbone)
    return backbone, loaded[0]


def decoded(graph: Graph, decoder: Ref, features: Ref) -> Ref:
    return graph.add("FeatInv_DecodeFeatures", feature_decoder=decoder, features=features)[0]


def reconstruct(world: World) -> str:
    g = world.graph
    backbone, decode = decoder(world)
    _, features = extract(world, backbone, 0)
    compare(world, features[0], backbone, decoded(g, decode, features[0]))
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    return (
        "**What is in the feature map?** A decoder turns the map into one image, in one step and without a diffusion"
        " model. This is the mean of all images with this map, so details that the map does not contain are blurred."
        " An inversion model gives sharp images instead, a different one for each seed."
    )


def mix(world: World) -> str:
    g = world.graph
    backbone, decode = decoder(world)
    a, b = (extract(world, backbone, i)[1] for i in (0, 1))
    mixed = sweep(world, a, b)
    compare(world, mixed[0], backbone, decoded(g, decode, mixed[0]))
    for letter, features in (("a", a), ("b", b)):
        g.add("PreviewImage", title=f"Original {letter}", images=world.as_seen(features))
    g.needs = world.second
    return (
        "**What lies between two images?** Feature maps in equal steps from a to b, each decoded. Often no image"
        " has the mean of two maps, and the middle shows both images at once. An inversion model gives one image"
        " even there."
    )


def attenuate(world: World) -> str:
    g = world.graph
    backbone, decode = decoder(world)
    picture, features = extract(world, backbone, 0)
    concepts = world.concepts(backbone, picture)
    g.add("PreviewAny", title="The concepts", stage=SEEN, source=concepts[1])
    weaker = g.add(
        "FeatInv_ConceptAttenuate",
        features=features[0],
        concepts=concepts[0],
        names="1",
        factor=0.25,
        keep_length=True,
    )
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title="Where each concept is active", stage=SEEN, images=previews[0])
    compare(world, weaker[0], backbone, decoded(g, decode, weaker[0]), number=f"{SIMILARITY} with the changed map")
    g.add("PreviewImage", title=f"{RESULT} without the change", images=decoded(g, decode, features[0]))
    return (
        "**Turn a concept down.** Concepts are groups of directions in feature space, found in the image without"
        " labels. One of them is multiplied by the factor, and both maps are decoded. Decoding has no noise, so every"
        " difference between the two results comes from the concept. Try other numbers in Concept Attenuate."
    )


def guide(world: World) -> str:
    g = world.graph
    base = g.add("FeatInv_LoadTinyWorld", world="photo")
    model, positive, negative, vae = (base[i] for i in range(4))
    backbone, decode = decoder(world)
    _, features = extract(world, backbone, 0)
    picture = decoded(g, decode, features[0])
    g.add("PreviewImage", title="Decoded", stage=DRAWN, images=world.enlarged(picture))
    scaled = g.add(
        "ImageScale",
        title="At the base model's size",
        stage=DRAWN,
        image=picture,
        upscale_method="area",
        width=Photo.side,
        height=Photo.side,
        crop="disabled",
    )
    guider = g.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0)
    sampled = g.add(
        "SamplerCustomAdvanced",
        noise=g.add("RandomNoise", noise_seed=7)[0],
        guider=guider[0],
        sampler=g.add("FeatInv_GuidanceSampler", vae=vae, backbone=backbone, features=features[0])[0],
        sigmas=g.add("BasicScheduler", model=model, scheduler="simple", steps=2, denoise=0.5)[0],
        latent_image=g.add("VAEEncode", pixels=scaled[0], vae=vae)[0],
    )
    compare(world, features[0], backbone, g.add("VAEDecode", samples=sampled[0], vae=vae)[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    g.needs = (
        "To use your own checkpoint, replace the embedded models by Load Checkpoint and by DINOv2 with its decoder."
        " Set the checkpoint's size in *At the base model's size*."
    )
    return (
        "**A sharp image without an inversion model.** The decoder's image says what is where. Noise is added"
        " (*denoise*), and two guided steps of a diffusion model make it sharp. On photographs this is about as"
        " faithful as the trained model without the gradient (docs/methods.md)."
    )


DECODED = {PhotoRAE: (reconstruct, mix, attenuate, guide), RAE: (reconstruct, mix, attenuate)}
