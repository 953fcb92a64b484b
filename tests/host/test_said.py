"""What the nodes find out is said where people look: on the node, in its lists, and by the words people search."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
DRAWN = HERE.parents[1] / "featinv_nodes" / "worlds" / "drawn"
MENU = {f"FeatInv/{part}" for part in ("load", "features", "control", "concepts", "look")}
NOTHING = "(nothing saved yet: use Save Features)"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def first_picture(backbone="resnet10t.tiny_world", layer="last", **extract):
    """The graph for a first picture, with the loader. 1 loader, 2 scene, 3 features, 5 control, 8 similarity."""
    features = {"layer": "last", "pooled": False, "fit": "crop", "control_net": ["1", 1], **extract}
    return {
        "1": node("FeatInv_Loader", backbone=backbone, layer=layer),
        "2": node("FeatInv_TinyWorldScenes", first=0, count=1),
        "3": node("FeatInv_ExtractFeatures", backbone=["1", 0], image=["2", 0], **features),
        "4": node("FeatInv_LoadTinyWorld"),
        "5": node(
            "FeatInvControlNet",
            positive=["4", 1],
            negative=["4", 2],
            control_net=["1", 1],
            features=["3", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            guide_away_from="text and features",
        ),
        "6": node(
            "KSampler",
            model=["4", 0],
            positive=["5", 0],
            negative=["5", 1],
            latent_image=["4", 4],
            seed=1,
            steps=10,
            cfg=1.5,
            sampler_name="ddim",
            scheduler="simple",
            denoise=1.0,
        ),
        "7": node("VAEDecode", samples=["6", 0], vae=["4", 3]),
        "8": node("FeatInv_FeatureSimilarity", features=["3", 0], backbone=["1", 0], image=["7", 0]),
    }


def said(outputs, number):
    """The one text that a node shows."""
    (text,) = outputs[number]["text"]
    return text


def test_a_first_picture_has_six_nodes_of_ours_and_each_says_what_it_found(server):
    prompt = first_picture()
    assert sum(n["class_type"].startswith("FeatInv") for n in prompt.values()) <= 6
    outputs = server.run(prompt)
    assert said(outputs, "1").startswith("inverts resnet10t.tiny_world, layer last, 128 channels, 8x8\n")
    assert said(outputs, "3") == "resnet10t.tiny_world, layer last, 128 channels, 8x8"
    assert said(outputs, "5").startswith("inside (direction ")
    assert float(said(outputs, "8").removeprefix("cosine ")) > 0.9  # the pair fits, and nothing else shows the text


def test_the_loaders_name_settings_as_the_widgets_are_named(server):
    info = server.get("/object_info")
    outputs = server.run(
        {
            "1": node("FeatInv_LoadFeatInvControlNet", weights="tiny_vit_last (embedded)"),
            "2": node("FeatInv_Loader", backbone="vit_tiny_patch16_224.tiny_world", layer="last"),
            "3": node("PreviewAny", source=["1", 1]),
            "4": node("PreviewAny", source=["2", 2]),
        }
    )
    text = said(outputs, "1")
    assert text == said(outputs, "2") == said(outputs, "3") == said(outputs, "4")
    assert "FeatInv ControlNet: strength 1, guide_away_from text and features" in text
    assert "KSampler: steps 10, cfg 1.25" in text and "Feature Guidance: step 0.03, last 0.5" in text
    assert "base model: Load World, world drawn" in text
    nodes = {about["display_name"]: about["input"]["required"] for about in info.values()}
    for line in text.splitlines():
        name, _, settings = line.partition(": ")
        if name in ("FeatInv ControlNet", "KSampler", "Feature Guidance"):
            assert {setting.split(" ")[0] for setting in settings.split(", ")} <= nodes[name].keys(), line


def test_concepts_slopes_and_classes_are_said(server):
    prompt = first_picture() | {
        "10": node("FeatInv_LoadConcepts", file="tiny_cnn_concepts (embedded)"),
        "11": node(
            "FeatInv_ConceptAttenuate",
            features=["3", 0],
            concepts=["10", 0],
            names="object",
            factor=0.25,
            keep_length=True,
            control_net=["1", 1],
        ),
        "12": node("FeatInv_PairedLatents", edit=["11", 1], latent=["4", 4]),
        "13": node("FeatInv_ClassifyImage", backbone=["1", 0], image=["2", 0], fit="crop", top=1),
        "14": node("FeatInv_Viz", pictures=["7", 0], edit=["11", 1], backbone=["1", 0], threshold=0.33),
        "15": node("MaskToImage", mask=["14", 3]),
        "16": node("PreviewImage", images=["15", 0]),
        "17": node("FeatInv_KeepMostSimilar", image=["2", 0], features=["3", 0], backbone=["1", 0], keep=1),
        "18": node("PreviewImage", images=["17", 0]),
        "19": node("FeatInv_LoadBackbone", weights="tiny-cnn (embedded)", timm_name="", input_size=0),
        "20": node("PreviewAny", source=["19", 1]),
    }
    prompt["5"]["inputs"]["features"], prompt["6"]["inputs"]["latent_image"] = ["12", 0], ["12", 1]
    prompt["6"]["inputs"]["steps"] = 2
    outputs = server.run(prompt)
    assert said(outputs, "10").startswith("0 sky") and said(outputs, "11").startswith(("inside", "outside"))
    assert said(outputs, "14").startswith("object: slope ") and said(outputs, "17").startswith("number 0: cosine 1.0")
    assert said(outputs, "13") and "reads 64 x 64 pixels\nlayers: last, act1" in said(outputs, "19")


def test_the_loader_s_layer_is_what_extract_features_reads(server):
    """Whatever its own widgets say; and another backbone is named."""
    prompt = first_picture(layer="last, pooled")
    short = {number: prompt[number] for number in "123"}
    short["9"] = node("FeatInv_SaveFeatures", features=["3", 0], filename_prefix="features/pooled")
    assert said(server.run(short), "3") == "resnet10t.tiny_world, layer last, 128 channels, pooled"
    short["1"]["inputs"]["layer"] = "layer2"
    assert "layer layer2, 64 channels" in said(server.run(short), "3")
    short["10"] = node("FeatInv_LoadBackbone", weights="tiny-vit (embedded)", timm_name="", input_size=0)
    short["3"]["inputs"]["backbone"] = ["10", 0]
    message = server.failure(short)
    assert "vit_tiny_patch16_224.tiny_world" in message and "Use the same backbone" in message
    compared = {**{number: first_picture()[number] for number in "123"}, "10": short["10"]}
    compared["8"] = node("FeatInv_FeatureSimilarity", features=["3", 0], backbone=["10", 0], image=["2", 0])
    message = server.failure(compared)
    assert "the backbone (vit_tiny_patch16_224.tiny_world" in message and "Use the same backbone" in message


def test_a_mask_that_nobody_painted_is_named_on_the_node(server):
    """Load Image gives a black one for a picture without transparency."""
    prompt = {number: first_picture()[number] for number in "12345"}
    prompt["6"] = node("PreviewAny", source=["5", 2])
    prompt["7"] = node("LoadImage", image="example.png")
    prompt["5"]["inputs"]["mask"] = ["7", 1]
    assert said(server.run(prompt), "5").startswith("The mask is black everywhere")
    prompt["8"] = node("InvertMask", mask=["7", 1])
    prompt["5"]["inputs"]["mask"] = ["8", 0]
    assert said(server.run(prompt), "5").startswith("inside (direction ")


def layers_of(server):
    return server.get("/object_info/FeatInv_Loader")["FeatInv_Loader"]["input"]["required"]["layer"][1]["layers_of"]


def test_the_loader_lists_the_layers_of_each_backbone(server):
    listed = layers_of(server)
    assert listed["resnet10t.tiny_world"] == ["last", "layer2", "last, pooled"]
    assert listed["tf_efficientnet_lite0.in1k"] == ["blocks.2", "blocks.4", "last", "last, pooled"]
    message = server.failure(first_picture(layer="blocks.4"))
    assert "no inversion model of resnet10t.tiny_world, layer blocks.4" in message and "layer2" in message


@pytest.fixture
def of_ones_own(server):
    """An inversion model and a backbone as users have them: the drawn world's under names of another."""
    mine, folder = server.base / "models" / "featinv" / "mine.safetensors", server.base / "models" / "backbones" / "hub"
    mine.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(DRAWN / "backbone_cnn", folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["tag"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(DRAWN / "tiny_cnn_last.safetensors", "pt") as shipped:
        texts = {k: v.replace("resnet10t.tiny_world", "resnet10t.mine") for k, v in shipped.metadata().items()}
        save_file({key: shipped.get_tensor(key) for key in shipped.keys()}, mine, texts)
    (mine.parent / "foreign.safetensors").write_bytes(b"no such file")
    yield mine
    shutil.rmtree(folder)
    mine.unlink()
    (mine.parent / "foreign.safetensors").unlink()


def test_a_pair_of_one_s_own_is_listed_by_its_file_and_opened(server, of_ones_own):
    layer = "last (mine.safetensors)"
    assert layers_of(server)["resnet10t.mine"] == [layer]
    assert "resnet10t.mine, layer last" in said(server.run(first_picture("resnet10t.mine", layer)), "3")
    shutil.move(of_ones_own.parents[1] / "backbones" / "hub", server.base / "away")
    message = server.failure(first_picture("resnet10t.mine", layer, fit="stretch"))
    assert "the backbone resnet10t.mine is not in" in message and "resnet10t.mine.safetensors" in message
    shutil.move(server.base / "away", of_ones_own.parents[1] / "backbones" / "hub")


def test_the_layers_of_a_backbone_are_told_before_it_runs(server):
    """To the page: for the loaders' widgets, without reading the weights of a file."""
    there = server.base / "models" / "backbones" / "resnet18.a1_in1k.safetensors"
    there.parent.mkdir(parents=True, exist_ok=True)
    there.touch()
    tiny = ["last", "act1", "layer1", "layer2", "layer3", "layer4"]
    assert server.get(f"/featinv/layers?weights={quote('tiny-cnn (embedded)')}&timm_name=") == tiny
    assert server.get("/featinv/layers?backbone=resnet10t.tiny_world") == tiny
    assert server.get(f"/featinv/layers?weights={there.name}&timm_name=")[:2] == ["last", "act1"]
    assert server.get("/featinv/layers?weights=nothing.safetensors") == server.get("/featinv/layers") == []
    there.unlink()


def files(server):
    return server.get("/object_info/FeatInv_LoadFeatures")["FeatInv_LoadFeatures"]["input"]["required"]["file"][1][
        "options"
    ]


def test_load_features_lists_what_was_saved_under_any_prefix_and_says_when_nothing_was(server):
    for file in server.base.glob("output/**/*.safetensors"):
        file.unlink()
    save_file({}, server.base / "output" / "checkpoint.safetensors")
    load = {"1": node("FeatInv_LoadFeatures", file=NOTHING), "2": node("FeatInv_PreviewFeatures", features=["1", 0])}
    assert files(server) == [NOTHING]
    assert "Save a feature map with Save Features" in server.failure(load)
    prompt = {number: first_picture()[number] for number in "123"}
    for number, prefix in (("4", "deep/down/cat"), ("5", "dog")):
        prompt[number] = node("FeatInv_SaveFeatures", features=["3", 0], filename_prefix=prefix)
    outputs = server.run(prompt)
    names = ["deep/down/cat_00001.safetensors [output]", "dog_00001.safetensors [output]"]
    assert files(server) == names
    assert [said(outputs, number) for number in "45"] == [
        f"saved {name}\nPress R to see it in Load Features." for name in names
    ]
    load["1"]["inputs"]["file"] = names[0]
    assert said(server.run(load), "1").startswith("resnet10t.tiny_world, layer last")


def test_nodes_stand_in_their_menu_and_are_found_by_what_people_type(server):
    """The oldest host searches names and menus alone."""
    ours = {name: about for name, about in server.get("/object_info").items() if name.startswith("FeatInv")}
    assert {about["category"] for about in ours.values()} == MENU
    if "search_aliases" not in ours["FeatInvControlNet"]:
        pytest.skip("this host has no search aliases")
    words = {name: " ".join(about["search_aliases"]).lower() for name, about in ours.items()}
    for word in ("feature inversion", "what the model sees", "interpret", "timm"):
        assert all(word in text for text in words.values()), word
    for word, name in {
        "cosine": "FeatInv_FeatureSimilarity",
        "heatmap": "FeatInv_ConceptMap",
        "resnet": "FeatInv_LoadBackbone",
        "mix images": "FeatInv_FeatureMix",
        "what does the network see": "FeatInv_ExtractFeatures",
    }.items():
        assert word in words[name]
