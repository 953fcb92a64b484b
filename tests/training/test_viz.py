"""FeatInv-Viz as a program: equal seeds, honest slopes, and heat maps measured as the literature does."""

import json

import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from featinv_nodes.core.concepts import load_concepts
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.viz import VizSettings, difference, edit, slope
from featinv_nodes.worlds import concepts_file
from featinv_nodes.worlds.drawn.scenes import draw
from training import visualize_concepts
from training.concepts import localisation
from training.concepts.viz import visualize
from training.experiments import measure_concepts
from training.models.pipeline import load_pipeline
from training.models.sampling import noise
from training.worlds import concepts as tiny_concepts


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny_cnn_last")


@pytest.fixture(scope="module")
def concepts():
    return load_concepts(concepts_file("tiny_cnn_concepts"))


@pytest.fixture(scope="module")
def features(pipeline):
    return pipeline.features(pipeline.backbone.preprocess(draw(0, torch.arange(1), "held-out").image))


def test_both_maps_are_drawn_with_the_same_seeds_and_read_again(pipeline, concepts, features):
    sampling = pipeline.recommended(steps=3)
    (visualization,) = visualize(
        pipeline, features, concepts, [["object"]], VizSettings(0.25, seeds=2, seed=5), sampling
    )
    start = noise(pipeline.base, 5, 2)
    changed = edit(features, concepts, [["object"]], 0.25).changed
    original, attenuated = (pipeline.draw(m.repeat(2), sampling, start) for m in (features, changed))
    for result, expected in ((visualization.original, original), (visualization.changed, attenuated)):
        assert (result - expected).abs().max() < 1e-4  # float32, other batch sizes
    assert torch.allclose(visualization.distance, difference(original, attenuated), atol=1e-4)
    assert visualization.slope.own == pytest.approx(
        slope(concepts, [concepts.index("object")], features, pipeline.extract(attenuated)), abs=1e-3
    )


def test_a_factor_of_one_changes_nothing(pipeline, concepts, features):
    (visualization,) = visualize(
        pipeline, features, concepts, [["object"]], VizSettings(1.0, seeds=2), pipeline.recommended(steps=2)
    )
    assert (
        visualization.distance.abs().max() < 1e-4
        and visualization.slope.passed
        and visualization.slope.own == pytest.approx(visualization.slope.untouched, abs=1e-3)
    )


def test_the_closed_loop_comes_nearer_to_what_was_asked(pipeline, concepts, features):
    sampling = pipeline.recommended(steps=4)
    asked, closed = (
        visualize(pipeline, features, concepts, [["object"]], VizSettings(0.25, seeds=1, rounds=r), sampling)[0]
        for r in (1, 5)
    )
    assert not asked.slope.passed and asked.commanded == 0.25
    assert (
        abs(closed.slope.own - 0.25) < abs(asked.slope.own - 0.25)
        and closed.commanded != 0.25
        and closed.slope.asked == 0.25
    )


def test_the_program_writes_pictures_and_slopes(tmp_path, capsys):
    for i, picture in enumerate(draw(0, torch.arange(2), "held-out").image):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    visualize_concepts.main(
        [
            "--image",
            *images,
            "--names",
            "object; sky, night",
            "--seeds",
            "2",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    result = json.loads((tmp_path / "out" / "results.json").read_text())["maps"]
    assert [(m["picture"], m["concepts"]) for m in result] == [
        (f"{i:03d}_{i}", c) for i in range(2) for c in (["object"], ["sky", "night"])
    ]
    assert all(m["scope"]["verdict"] in ("inside", "at the edge", "outside") and -1 <= m["cosine"] <= 1 for m in result)
    printed = capsys.readouterr().out
    assert all(f"slope {m['own']:.2f} for factor 0.25 (" in printed for m in result) and (
        "NOT as requested" in printed
    ) == any(not m["passed"] for m in result)
    for name in ("grid.png", "details.png", result[0]["difference"], result[0]["mask"]):
        assert Image.open(tmp_path / "out" / name).size[0] >= 64
    for wrong, words in (
        (["--names", "dog"], "there is no concept 'dog'; there are 8"),
        (["--names", ";"], "no concept named"),
        (["--names", "0", "--seeds", "0"], "--seeds 0"),
        (["--names", "0", "--rounds", "0"], "--rounds 0"),
    ):
        with pytest.raises(FeatInvError, match=words):
            visualize_concepts.main(["--image", images[0], *wrong, "--out", str(tmp_path / "no")])
    assert not list((tmp_path / "no").iterdir())


def test_measures_of_a_heat_map():
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5:15, 5:15] = True
    heat = (torch.rand(20, 20, generator=g) * 10).round() + 3 * mask  # with ties
    assert localisation.auroc(heat, mask) == pytest.approx(roc_auc_score(mask.flatten(), heat.flatten()), abs=1e-9)
    assert localisation.iou(mask, mask) == 1 and localisation.boundary_f(mask, mask) == 1
    near, far = mask.roll(2, 1), mask.roll(3, 1)
    assert localisation.boundary_f(near, mask) == 1 > localisation.boundary_f(far, mask)
    assert localisation.boundary_f(torch.ones_like(mask), mask) == 0
    assert localisation.iou(mask.roll(5, 1), mask) == pytest.approx(50 / 150)
    perfect = localisation.measures(mask.float(), mask, 0.5, 0.5)
    assert all(value == 1 for value in perfect.values())
    graded = torch.where(mask, 1.0, torch.linspace(0, 0.6, 400).view(20, 20))
    assert (
        0.55 < localisation.best_threshold([graded], [mask], localisation.iou) < 0.7
    )  # the lowest that leaves nothing outside


def test_other_maps_find_a_concept_that_is_there(pipeline, concepts):
    """On a scene with one object, each map of the object concept is hotter inside its true mask."""
    scene = draw(0, torch.arange(1), "held-out")
    picture, mask = pipeline.backbone.preprocess(scene.image)[0], scene.masks[0].sum(0) > 0.5
    features = pipeline.features(picture[None])
    active = localisation.activation(concepts, "object", features, (64, 64))
    logit = pipeline.backbone.logits(features)[0, pipeline.backbone.groups["shape"]].argmax()
    maps = {
        "activation": active,
        "guided": localisation.guided(active, picture),
        "GradCAM": localisation.grad_cam(pipeline.backbone, features, int(logit), (64, 64)),
        "occlusion": localisation.occlusion(pipeline.backbone, concepts, "object", picture, "last"),
    }
    assert {name for name, heat in maps.items() if localisation.auroc(heat, mask) < 0.7} == set()
    low, high = localisation.deletion(pipeline.backbone, concepts, "object", picture, mask.float(), "last")
    worse = localisation.deletion(pipeline.backbone, concepts, "object", picture, 1 - mask.float(), "last")
    assert low < worse[0] and high > worse[1]


def test_a_random_subspace_has_the_dimension_of_the_concept(concepts):
    random = localisation.random_subspace(concepts, "object", 3)
    assert random.bases[0].shape == concepts.bases[concepts.index("object")].shape and torch.allclose(
        random.bases[0] @ random.bases[0].T, torch.eye(len(random.bases[0])), atol=1e-5
    )


def test_the_measurement_runs_and_says_how_it_falls(tmp_path, monkeypatch):
    for module, name, small in (
        (tiny_concepts, "SCENES", 500),
        (measure_concepts, "TRAINING_SCENES", 150),
        (measure_concepts, "VECTORS", 1500),
        (localisation, "STRIDE", 12),
        (localisation, "STEPS", 4),
    ):
        monkeypatch.setattr(module, name, small)
    measure_concepts.main(
        ["--count", "2", "--validation", "2", "--seeds", "2", "--steps", "2", "--workers", "1", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "results.json").read_text())
    for track in ("true masks", "discovered by MCD", "discovered by k-means"):
        for kind in ("object", "background"):
            part = result[track][kind]
            assert (
                part["localisation"]["FeatInv-Viz"]["AUROC"]["n"] == 2
                and part["faithfulness"]["FeatInv-Viz"]["slope"]["n"] == 2
            )
    assert {"random subspace", "seeds alone", "GradCAM", "edges"} < result["true masks"]["object"][
        "localisation"
    ].keys()
    text, digests = (tmp_path / "report.md").read_text(), result["digests"]
    assert digests["backbone"] and f"backbone {digests['backbone']}, base model {digests['base model']}." in text
    assert (
        "mean slope" in text
        and "boundary F" in text
        and (tmp_path / "panel.webp").exists()
        and "<table>" in (tmp_path / "index.html").read_text()
    )
    with pytest.raises(FeatInvError, match="true masks are known for the drawn world"):
        measure_concepts.main(["--model", "tiny_cnn_pooled", "--out", str(tmp_path)])
