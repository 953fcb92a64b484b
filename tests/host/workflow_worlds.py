"""What a workflow is built in: an embedded world, or the paper's own models. Each gives the nodes that differ."""

from __future__ import annotations

from graph import Graph, Node, Ref

from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file

PROMPT = "a high-quality, detailed, and professional image"
HUB = "https://huggingface.co"
PHOTO_BACKBONE = "tf_efficientnet_lite0.in1k"
EXAMPLE = "example.png"  # in the input folder of every ComfyUI
TURNED = "Mirrored: bypass it for yours"


class World:
    """name: its own. prefix: of its workflows' names. side: of its pictures in pixels. kind: the backbone, or the
    layer, of a workflow that asks for no other. embedded: whether it runs without downloads. batch:
    widget and node that set the number of pictures. second: what to
    do for want of a second picture. paint: where the mask is from. note: what every workflow needs. scaled: how
    pictures are enlarged."""

    name, prefix, kind, side, embedded = "", "", "cnn", 0, False
    batch = ("batch size", "Empty Latent Image")
    second, note, scaled = "", "", "bicubic"
    paint = (
        "Paint your own mask on a loaded image with the mask editor. It is cropped like the image, and resized to"
        " the feature map."
    )

    def __init__(self, graph: Graph, workflow: str) -> None:
        self.graph = graph

    def backbone(self, kind: str) -> Ref:
        raise NotImplementedError

    def control(self, kind: str) -> Ref:
        """The inversion model."""
        raise NotImplementedError

    def pair(self) -> tuple[Ref, Ref, dict[str, Ref]]:
        """The backbone, its inversion model, and what tells Extract Features the layer, for a first picture."""
        return self.backbone(self.kind), self.control(self.kind), {}

    def loader(self, backbone: str, layer: str) -> tuple[Ref, Ref, dict[str, Ref]]:
        """The same, from one node."""
        both = self.graph.add("FeatInv_Loader", backbone=backbone, layer=layer)
        return both[0], both[1], {"control_net": both[1]}

    def empty(self, batch: int) -> Ref:
        return self.graph.add("EmptyLatentImage", width=self.side, height=self.side, batch_size=batch)[0]

    def sized(self) -> str:
        """Where the size of what is drawn is set, in a sentence."""
        return f"Empty Latent Image sets the size of the image: {self.side} x {self.side} is the model's own."

    def layer(self, kind: str) -> dict:
        return {"layer": "last", "pooled": False}

    def as_seen(self, features: Node) -> Ref:
        """The picture that Extract Features read."""
        return self.enlarged(features[1])

    def enlarged(self, picture: Ref) -> Ref:
        """As large as the results beside it."""
        return self.graph.add(
            "ImageScale",
            title="At one size",
            folded=True,
            image=picture,
            upscale_method=self.scaled,
            width=256,
            height=256,
            crop="disabled",
        )[0]

    def mask(self, inner: Node, backbone: Ref) -> dict:
        """Where b goes: inputs of Feature Mix."""
        return {"mask": inner[1], "backbone": backbone}


class Drawn(World):
    """The world of drawn scenes: nothing to download."""

    name, prefix, side, scaled, embedded = "drawn", "tiny", 64, "nearest-exact", True
    note = "Runs at once, even without a GPU: the pack contains the models, and makes the images."

    def __init__(self, graph: Graph, workflow: str) -> None:
        super().__init__(graph, workflow)
        world = graph.add("FeatInv_LoadTinyWorld")
        self.model, self.positive, self.negative, self.vae = (world[i] for i in range(4))

    def settings(self, kind: str) -> dict:
        """The recommended settings of the inversion model."""
        return read_info(model_file(f"tiny_{kind}_last")).recommended

    def backbone(self, kind: str) -> Ref:
        return self.graph.add("FeatInv_LoadBackbone", weights=f"tiny-{kind} (embedded)", timm_name="", input_size=0)[0]

    def control(self, kind: str) -> Ref:
        return self.graph.add("FeatInv_LoadFeatInvControlNet", weights=f"tiny_{kind}_last (embedded)")[0]

    def pair(self) -> tuple[Ref, Ref, dict[str, Ref]]:
        return self.loader("resnet10t.tiny_world", "last")

    def picture(self, number: int) -> Node:
        return self.graph.add("FeatInv_TinyWorldScenes", first=(2, 13, 24, 25, 4, 7)[number], count=1)

    def concepts(self, backbone: Ref, picture: Node) -> Node:
        return self.graph.add("FeatInv_LoadConcepts", file="tiny_cnn_concepts (embedded)")

    def many(self) -> dict:
        """Pictures to find concepts in, and how many of them: inputs of Discover Concepts."""
        return {
            "images": self.graph.add("FeatInv_TinyWorldScenes", first=100, count=64)[0],
            "folder": "",
            "concepts": 4,
            "name": "",
        }


class Photo(World):
    """The world of photographs: starts from the picture that every ComfyUI has. Kinds are depths of its one
    backbone."""

    name, prefix, kind, side, embedded = "photo", "photo", "blocks4", 128, True
    batch = ("amount", "Repeat Latent Batch")
    note = (
        "Runs at once, even without a GPU: the pack contains the models. Load a photograph of your own: ComfyUI's"
        " example is a drawing, which these models of photographs reproduce poorly. The layer blocks.2 keeps nearly the"
        " whole photograph, blocks.4 its things, layout and colours, the last layer only the kind of thing."
    )
    second = (
        "Image b is the example, mirrored. Load your own in the second Load Image, and bypass the node that mirrors it."
    )
    paint = (
        "The mask is a rectangle in pixels of a 128 x 128 image: *Where the rectangle is* moves it. Or paint a mask"
        " on the loaded image with the mask editor, and connect it and the backbone to Feature Mix, which then crops"
        " it like the image."
    )
    #: from which depth a workflow draws, where that is not `kind`
    KINDS: dict[str, str] = {}
    LAYERS = {
        "blocks2": ("blocks.2", False),
        "blocks4": ("blocks.4", False),
        "last": ("last", False),
        "pooled": ("last", True),
    }

    def __init__(self, graph: Graph, workflow: str) -> None:
        super().__init__(graph, workflow)
        self.kind = self.KINDS.get(workflow, self.kind)
        world = graph.add("FeatInv_LoadTinyWorld", world="photo")
        self.model, self.positive, self.negative, self.vae, self.latent = (world[i] for i in range(5))
        self.loaded = 0

    def settings(self, kind: str) -> dict:
        return read_info(model_file(f"photo_lite0_{kind}")).recommended

    def layer(self, kind: str) -> dict:
        return dict(zip(("layer", "pooled"), self.LAYERS[kind]))

    def backbone(self, kind: str) -> Ref:
        return self.graph.add(
            "FeatInv_LoadBackbone", weights=f"{PHOTO_BACKBONE} (embedded)", timm_name="", input_size=0
        )[0]

    def control(self, kind: str, folded: bool = False) -> Ref:
        name = f"photo_lite0_{kind}"
        title = name if folded else None
        return self.graph.add(
            "FeatInv_LoadFeatInvControlNet", title=title, folded=folded, weights=f"{name} (embedded)"
        )[0]

    def pair(self) -> tuple[Ref, Ref, dict[str, Ref]]:
        return self.loader(PHOTO_BACKBONE, self.LAYERS[self.kind][0])

    def picture(self, number: int) -> Node:
        """The host's example, for want of another the second time mirrored."""
        loaded, self.loaded = self.graph.add("LoadImage", image=EXAMPLE), self.loaded + 1
        return (
            loaded
            if self.loaded == 1
            else self.graph.add("ImageFlip", title=TURNED, image=loaded[0], flip_method="y-axis: horizontally")
        )

    def empty(self, batch: int) -> Ref:
        return self.latent if batch == 1 else self.graph.add("RepeatLatentBatch", samples=self.latent, amount=batch)[0]

    def sized(self) -> str:
        return (
            f"The latent of Load World sets the size of the image, {self.side} x {self.side}. Use an Empty Latent"
            " Image for another size."
        )

    def mask(self, inner: Node, backbone: Ref) -> dict:
        """A rectangle in the middle: the example has no mask."""
        outside = self.graph.add("SolidMask", title="Everything", value=0.0, width=self.side, height=self.side)
        inside = self.graph.add("SolidMask", title="Rectangle", value=1.0, width=self.side // 2, height=self.side // 2)
        corner = self.side // 4
        return {
            "mask": self.graph.add(
                "MaskComposite",
                title="Where the rectangle is",
                destination=outside[0],
                source=inside[0],
                x=corner,
                y=corner,
                operation="add",
            )[0]
        }

    def concepts(self, backbone: Ref, picture: Node) -> Node:
        return mirrored_concepts(self.graph, backbone, picture, self.LAYERS[self.kind][0])


def mirrored_concepts(graph: Graph, backbone: Ref, picture: Node, layer: str) -> Node:
    """Concepts found in a picture and its mirror image: twice the vectors, more than the layer has channels."""
    mirrored = graph.add(
        "ImageFlip",
        title="Mirrored, for more vectors",
        image=picture[0],
        flip_method="y-axis: horizontally",
    )
    both = graph.add("ImageBatch", image1=picture[0], image2=mirrored[0])
    return graph.add(
        "FeatInv_DiscoverConcepts",
        backbone=backbone,
        images=both[0],
        folder="",
        layer=layer,
        method="mcd",
        concepts=4,
        vectors=20_000,
        seed=0,
        fit="crop",
        name="",
    )


class MiniSD(World):
    """The paper's base model and backbones; the inversion model is one that train.py made."""

    name, prefix, side = "minisd", "minisd", 256
    TIMM = {"cnn": "convnext_base.fb_in22k_ft_in1k", "vit": "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k"}
    CONFIGS = {"cnn": "convnext_last", "vit": "swinv2_last"}

    def __init__(self, graph: Graph, workflow: str) -> None:
        super().__init__(graph, workflow)
        name = "miniSD.safetensors"  # the oldest hosts offer no other kind of file for download
        models = [{"name": name, "url": f"{HUB}/webui/miniSD/resolve/main/{name}", "directory": "checkpoints"}]
        checkpoint = graph.add("CheckpointLoaderSimple", models=models, ckpt_name=name)
        self.model, self.vae = checkpoint[0], checkpoint[2]
        self.positive, self.negative = (
            graph.add("CLIPTextEncode", clip=checkpoint[1], text=text)[0] for text in (PROMPT, "")
        )
        self.files = [f"`{name}`, the base model, in `models/checkpoints` ([miniSD]({HUB}/webui/miniSD))"]

    @property
    def note(self) -> str:
        return "\n".join(["Files that this workflow needs:", *(f"- {file}" for file in self.files)])

    def settings(self, kind: str) -> dict:
        """The paper's (Table 3's caption); what the gradient gains at real size is not measured."""
        return {"strength": 1.0, "guidance": 1.75, "negative": "text", "steps": 50}

    def backbone(self, kind: str) -> Ref:
        name = f"{self.TIMM[kind]}.safetensors"
        url = f"{HUB}/timm/{self.TIMM[kind]}"
        self.files.append(f"`{name}`, the backbone, in `models/backbones` ([timm]({url}))")
        models = [{"name": name, "url": f"{url}/resolve/main/model.safetensors", "directory": "backbones"}]
        size = {"cnn": 288, "vit": 0}[kind]  # the paper's ConvNeXt
        return self.graph.add("FeatInv_LoadBackbone", models=models, weights=name, timm_name="", input_size=size)[0]

    def control(self, kind: str) -> Ref:
        config = self.CONFIGS[kind]
        self.files.append(
            f"`{config}.safetensors`, the inversion model, in `models/featinv`: train it with `accelerate launch"
            f" training/train.py --config training/configs/{config}.yaml --data IMAGENET/train`"
        )
        return self.graph.add("FeatInv_LoadFeatInvControlNet", weights=f"{config}.safetensors")[0]

    def picture(self, number: int) -> Node:
        return self.graph.add("LoadImage", image=EXAMPLE)

    def concepts(self, backbone: Ref, picture: Node) -> Node:
        name = "convnext_last_concepts.safetensors"
        self.files.append(
            f"`{name}`, the concepts, in `models/featinv_concepts`: find them with `training/discover_concepts.py` or"
            " the node Discover Concepts"
        )
        return self.graph.add("FeatInv_LoadConcepts", file=name)

    def many(self) -> dict:
        self.files.append("images of one class, in the folder `my_class` of ComfyUI's input folder")
        return {"folder": "my_class", "concepts": 8, "name": "my_class"}


class StableDiffusion15(World):
    """A checkpoint that people have, and a backbone to fetch: no inversion model."""

    name, prefix, side = "sd15", "sd15", 512
    CHECKPOINT = "Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors"
    SMALL = "taesd"
    BACKBONE, LAYER, CONFIG = "resnet50.tv_in1k", "layer3", "resnet50_last"

    def __init__(self, graph: Graph, workflow: str) -> None:
        super().__init__(graph, workflow)
        repository, name = self.CHECKPOINT
        models = [{"name": name, "url": f"{HUB}/{repository}/resolve/main/{name}", "directory": "checkpoints"}]
        checkpoint = graph.add("CheckpointLoaderSimple", models=models, ckpt_name=name)
        self.model, self.vae = checkpoint[0], checkpoint[2]
        self.positive, self.negative = (
            graph.add("CLIPTextEncode", clip=checkpoint[1], text=text)[0] for text in (PROMPT, "")
        )

    @property
    def note(self) -> str:
        repository, name = self.CHECKPOINT
        small = f"{self.SMALL}_encoder` and `{self.SMALL}_decoder"
        return (
            f"Files that this workflow needs:\n- a checkpoint in `models/checkpoints`: choose yours in Load Checkpoint,"
            f" or fetch `{name}` ([its page]({HUB}/{repository}))\n- `{self.BACKBONE}.safetensors`, the backbone, in"
            f" `models/backbones` ([timm]({HUB}/timm/{self.BACKBONE})); `python3 run.py download {self.CONFIG}` also"
            f" fetches it, into a folder of its name\n\nTo save time and memory, add Load VAE with `{self.SMALL}`"
            f" (files `{small}` in `models/vae_approx`) and connect it to the *vae* of Feature Guidance Sampler only."
        )

    def settings(self, kind: str) -> dict:
        """The text's guidance is the paper's (Table 3's caption); what is best here is not measured."""
        return {"guidance": 1.75}

    def layer(self, kind: str) -> dict:
        return {"layer": self.LAYER, "pooled": False}

    def backbone(self, kind: str) -> Ref:
        name, url = f"{self.BACKBONE}.safetensors", f"{HUB}/timm/{self.BACKBONE}/resolve/main/model.safetensors"
        models = [{"name": name, "url": url, "directory": "backbones"}]
        return self.graph.add("FeatInv_LoadBackbone", models=models, weights=name, timm_name="", input_size=0)[0]

    def picture(self, number: int) -> Node:
        return self.graph.add("LoadImage", image=EXAMPLE)


class StableDiffusionXL(StableDiffusion15):
    name, prefix, side = "sdxl", "sdxl", 1024
    CHECKPOINT = "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"
    SMALL = "taesdxl"
