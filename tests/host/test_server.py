"""The pack in a running ComfyUI, over HTTP, linked in under an unusual name."""

import json
import re
from pathlib import Path

from graph import declared

HERE = Path(__file__).parent


def nodes_of(server):
    return {name: about for name, about in server.get("/object_info").items() if name.startswith("FeatInv")}


def frozen(about):
    """What a saved workflow depends on: names, types, order and defaults of inputs, names and types of outputs."""
    inputs = [[name, kind, options.get("default")] for name, kind, options in declared(about)]
    return {"inputs": inputs, "outputs": [list(pair) for pair in zip(about["output_name"], about["output"])]}


def test_loads_without_a_warning(server):
    assert not [
        line
        for line in server.log_of_start.splitlines()
        if re.search("featinv|timm", line.lower()) and re.search("fail|warn|error|traceback|missing", line.lower())
    ]


def test_schemas_are_frozen(server):
    """Saved workflows keep widget values by their place. To change a schema on purpose, append, and write the file
    anew."""
    snapshot = json.loads((HERE / "schema.json").read_text())
    result = {name: frozen(about) for name, about in nodes_of(server).items()}
    assert result.keys() == snapshot.keys()
    assert {name: value for name, value in result.items() if value != snapshot[name]} == {}


def test_everything_is_explained(server):
    """A description, a tooltip on each input and output, and a help page with a picture that names every input."""
    for name, about in nodes_of(server).items():
        assert about["description"] and about["category"].split("/")[0] == "FeatInv"
        assert all(about["output_tooltips"]), name
        page = server.file(f"/extensions/FeatInv-copy.2/docs/{name}.md").decode()
        assert server.file(f"/extensions/FeatInv-copy.2/docs/{name}.png")[:4] == b"\x89PNG"
        for part in ("## Inputs", "## Outputs", "## Example", "## Errors"):
            assert part in page, (name, part)
        for entry, _, options in declared(about):
            assert options.get("tooltip"), (name, entry)
            assert f"**{entry}**" in page and options["tooltip"] in page, (name, entry)


def test_workflows_stand_in_the_template_browser(server):
    listed = server.get("/api/workflow_templates")
    assert {path.stem for path in (HERE.parents[1] / "workflows").glob("*.json")} <= set(listed["FeatInv-copy.2"])


def inversion(backbone="tiny-cnn", first=0, steps=3):
    """A whole inversion as the server takes it; node 9 shows the picture."""
    return {
        "1": {"class_type": "FeatInv_TinyWorldScenes", "inputs": {"first": first, "count": 1}},
        "2": {
            "class_type": "FeatInv_LoadBackbone",
            "inputs": {"weights": f"{backbone} (embedded)", "timm_name": "", "input_size": 0},
        },
        "3": {
            "class_type": "FeatInv_ExtractFeatures",
            "inputs": {"backbone": ["2", 0], "image": ["1", 0], "layer": "last", "pooled": False, "fit": "crop"},
        },
        "4": {"class_type": "FeatInv_LoadTinyWorld", "inputs": {}},
        "5": {"class_type": "FeatInv_LoadFeatInvControlNet", "inputs": {"weights": "tiny_cnn_last (embedded)"}},
        "6": {
            "class_type": "FeatInvControlNet",
            "inputs": {
                "positive": ["4", 1],
                "negative": ["4", 2],
                "control_net": ["5", 0],
                "features": ["3", 0],
                "strength": 1.0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "guide_away_from": "text and features",
            },
        },
        "7": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["6", 1],
                "latent_image": ["10", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 3.0,
                "sampler_name": "ddim",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 3]}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
        "10": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    }


def test_a_failing_prompt_says_what_to_connect(server):
    message = server.failure(inversion("tiny-vit"))
    assert (
        "vit_tiny_patch16_224.tiny_world" in message
        and "resnet10t.tiny_world" in message
        and "Use the same backbone" in message
    )
    assert server.run(inversion())["9"]["images"]


def test_cancelled_in_the_sampler_then_queued_again(host, server):
    """By the events that the host sends: it is cancelled as soon as it has reported a step, and ends for that."""
    prompts = (json.dumps(inversion(steps=steps)) for steps in (10_000, 3))
    said = host.run_inside(HERE / "cancelling.py", server.url, "7", *prompts)
    assert 0 < said["step"]["value"] < said["step"]["max"] == 10_000
    assert (said["end"], said["node"], said["again"]) == ("execution_interrupted", "KSampler", "execution_success")


def test_twenty_queued_runs_with_changing_features(server):
    """All succeed, and what the host holds does not grow with them."""

    def queue(numbers):
        for number in [server.submit(inversion(first=n)) for n in numbers]:
            assert server.result(number)["status"]["status_str"] == "success"
        return server.resident()

    before = queue(range(100, 110))
    assert queue(range(110, 130)) < before + 50e6  # bytes; the models alone are larger


def test_features_survive_the_disk(server):
    whole = inversion("tiny-vit")
    prompt = {
        **{number: whole[number] for number in "123"},
        "4": {
            "class_type": "FeatInv_SaveFeatures",
            "inputs": {"features": ["3", 0], "filename_prefix": "features/mine"},
        },
    }
    (said,) = server.run(prompt)["4"]["text"]
    name = "features/mine_00001.safetensors"
    assert said.startswith(f"saved {name} [output]\n") and (server.base / "output" / name).is_file()
    again = {
        "1": prompt["1"],
        "2": prompt["2"],
        "3": {"class_type": "FeatInv_LoadFeatures", "inputs": {"file": "features/mine_00001.safetensors [output]"}},
        "4": {
            "class_type": "FeatInv_FeatureSimilarity",
            "inputs": {"features": ["3", 0], "backbone": ["2", 0], "image": ["1", 0]},
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 2]}},
    }
    assert float(server.run(again)["5"]["text"][0]) > 0.9999


def discovery(images=None, **changes):
    """Concepts of the embedded CNN; node 3 says which."""
    inputs = {
        "backbone": ["1", 0],
        "folder": "",
        "layer": "last",
        "method": "mcd",
        "concepts": 4,
        "vectors": 2000,
        "seed": 0,
        "fit": "crop",
        "name": "",
        **({"images": ["2", 0]} if images else {}),
        **changes,
    }
    return {
        "1": {
            "class_type": "FeatInv_LoadBackbone",
            "inputs": {"weights": "tiny-cnn (embedded)", "timm_name": "", "input_size": 0},
        },
        "2": {"class_type": "FeatInv_TinyWorldScenes", "inputs": {"first": 0, "count": images or 1}},
        "3": {"class_type": "FeatInv_DiscoverConcepts", "inputs": inputs},
    }


def test_concepts_are_discovered_saved_and_found_again(server):
    """By MCD and by a sparse autoencoder, which is trained where the host keeps no gradients; from drawn scenes."""
    for method, concepts in (("mcd", 4), ("sae", 12)):
        (text,) = server.run(discovery(64, method=method, concepts=concepts, name=f"mine/{method}"))["3"]["text"]
        assert (
            "read 64 images: 2,000 feature vectors" in text
            and "completeness for the top classes" in text
            and f"saved as mine/{method}.safetensors" in text
        )
        prompt = {
            "1": {
                "class_type": "FeatInv_LoadConcepts",
                "inputs": {"file": str(Path("mine") / f"{method}.safetensors")},
            },
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
        }
        (names,) = server.run(prompt)["2"]["text"]
        assert "0 concept 0" in names and names.splitlines()[-1].endswith("rest")
    (text,) = server.run(discovery(64, concepts=0, vectors=1000))["3"]["text"]
    assert "completeness by number of clusters: 2: 0." in text


def test_concepts_of_a_folder(server):
    """Below the host's input folder; what cannot be read is named. A folder that changes is read again."""
    folder = server.base / "input" / "scenes"
    for number, reference in enumerate(server.run(pictures())["2"]["images"]):
        (folder / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        data = server.file(
            f"/view?filename={reference['filename']}&type={reference['type']}&subfolder={reference['subfolder']}"
        )
        (folder / f"class {number % 2}" / f"{number}.png").write_bytes(data)
    (folder / "broken.png").write_text("no image")
    (text,) = server.run(discovery(folder="scenes"))["3"]["text"]
    assert "skipped 1 of 9 images" in text and "broken.png" in text and "read 8 images in 2 class folders" in text
    (folder / "broken.png").unlink()
    assert "skipped" not in server.run(discovery(folder="scenes"))["3"]["text"][0]


def pictures():
    return {
        "1": {"class_type": "FeatInv_TinyWorldScenes", "inputs": {"first": 0, "count": 8}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def test_discovery_says_what_is_wrong(server):
    for words, mistake in {
        "images or name a folder": discovery(),
        "one of the two": discovery(2, folder="x"),
        "is not a folder": discovery(folder="nowhere"),
        "at least as many": discovery(1),
        "leads out of": discovery(64, name="../../mine"),
        "expected 2 to 127": discovery(64, concepts=1),
        "no layer 'x'": discovery(4, layer="x"),
        "give a number of them: the classifier head": discovery(64, layer="layer2", concepts=0),
    }.items():
        assert words in server.failure(mistake), words
