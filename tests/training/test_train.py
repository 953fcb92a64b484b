"""Training goes on exactly where it stopped, and its configuration says what is wrong with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import load_scope
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn.scenes import draw
from training.config import CONFIGS, DEFAULT, read_config
from training.data.listing import Folder, open_listing
from training.data.loader import Photographs, Scenes, loader
from training.loop import memory
from training.loop.graph import check_device
from training.loop.objective import observed_features, training_loss
from training.loop.schedule import due, lr_at, step_seed
from training.loop.setup import start_from
from training.loop.training import train
from training.models.base_model import load_base
from training.models.controlnet import FeatureControlNet
from training.models.pipeline import load_pipeline

SMALL = {
    "batch": "8",
    "cycle": "0.0",
    "encoder_width": "16",
    "schedule": "constant",
    "precision": "fp32",
    "panel_every": "1000",
    "save_every": "16",
    "warmup": "0",
}


def run(output, images, **changes):
    return train(read_config(DEFAULT, SMALL | {"max_images": str(images)} | changes), output)


def test_a_resumed_run_equals_one_never_stopped(tmp_path):
    run(tmp_path / "two", 16)
    resumed = load_file(run(tmp_path / "two", 48))
    straight = load_file(run(tmp_path / "one", 48))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    assert any(not torch.equal(straight[k], v) for k, v in load_file(run(tmp_path / "short", 16)).items())


def test_starting_from_a_model_of_the_same_or_of_other_features(tmp_path):
    first = load_file(run(tmp_path / "first", 16))
    same = run(
        tmp_path / "same",
        16,
        init_from=str(tmp_path / "first" / "tiny_cnn_last.safetensors"),
        lr="0.0",
        weight_decay="0.0",
        ema="0.0",
    )
    assert (
        all(torch.equal(first[k], v) for k, v in load_file(same).items())
        and load_pipeline(str(same)).info.images_seen == 32
    )
    other = run(tmp_path / "other", 8, init_from=str(same), layer="layer2", lr="0.0", weight_decay="0.0", ema="0.0")
    kept = load_file(other)
    assert all(torch.equal(first[k], v) for k, v in kept.items() if not k.startswith("controlnet_cond_embedding"))
    assert kept["controlnet_cond_embedding.block.0.weight"].shape[1] == 64


def test_a_taken_over_encoder_keeps_its_own_statistics(tmp_path, monkeypatch):
    """Whatever its file says of the images it has seen: a converted one says none."""
    base, file = load_base("tiny", ""), tmp_path / "converted.safetensors"
    model, info = FeatureControlNet.load(model_file("tiny_cnn_last"), base)
    model.save(file, replace(info, images_seen=0))
    mean, given, observed = (
        model.encoder.mean.clone(),
        {"lr": "0.0", "weight_decay": "0.0", "ema": "0.0", "standardise": "true"},
        [],
    )

    def observing(backbone, seen, config):
        observed.append(len(seen["pictures"]))
        return observed_features(backbone, seen, config)

    monkeypatch.setattr("training.loop.setup.observed_features", observing)
    width = str(info.encoder["width"])
    assert torch.equal(
        load_file(run(tmp_path / "same", 8, init_from=str(file), encoder_width=width, **given))[
            "controlnet_cond_embedding.mean"
        ],
        mean,
    )
    assert not observed
    source = replace(info.source, weights="0" * 16)  # features of the same name, by other weights
    other = FeatureControlNet.start(base, source, info.encoder["width"])
    assert start_from(other, str(file), base) is None and not other.encoder.mean.any()
    run(tmp_path / "other", 8, init_from=str(file), layer="layer2", **given)
    assert sum(observed) == 256 and max(observed) == 8  # no more at once than a step sees


def test_another_models_run_is_not_continued(tmp_path, capsys):
    run(tmp_path, 8, ema="0")
    with pytest.raises(FeatInvError, match="layer: last there, layer2 now"):
        run(tmp_path, 16, layer="layer2")
    with pytest.raises(FeatInvError, match="optimizer: adamw there, adamw8bit now"):
        run(tmp_path, 16, optimizer="adamw8bit")
    assert run(tmp_path, 16, ema="0.9").exists()  # an average can begin at any time
    capsys.readouterr()
    run(tmp_path, 16)
    assert (
        "16 of 16 images are seen: nothing is left to train; begin anew with another --output"
        in capsys.readouterr().out
    )


def test_the_result_opens_as_a_model_and_states_how_it_was_made(tmp_path):
    file = run(tmp_path, 16, pooled="true", name="mine", panel_every="16")
    pipeline = load_pipeline(str(file))
    assert pipeline.info.images_seen == 16 and pipeline.info.source.pooled and pipeline.info.config["batch"] == 8
    assert (tmp_path / "panel_000000016.png").exists() and (tmp_path / "config.yaml").exists()
    assert read_config(tmp_path / "config.yaml").pooled


def test_training_helps_on_scenes_it_never_saw(tmp_path):
    """50 steps lower the loss on held-out scenes, at equal noise and timesteps: by 0.9 and 1.0 % with two seeds."""
    pipeline = load_pipeline(
        str(run(tmp_path, 800, batch="16", lr="1e-3", encoder_width="64", save_every="4000", panel_every="4000"))
    )
    scenes = draw(0, torch.arange(128), "held-out").image
    latents, features = pipeline.base.encode(scenes), pipeline.features(scenes)
    config = read_config(DEFAULT, {"dropout": "0.0", "cycle": "0.0"})
    losses = []
    for model in (FeatureControlNet.start(pipeline.base, features.source, 64), pipeline.model):
        torch.manual_seed(0)
        with torch.inference_mode():
            losses.append(
                training_loss(pipeline.base, pipeline.backbone, model, latents, features.values, config).item()
            )
    assert losses[1] < losses[0] * 0.997


def test_the_perceiver_encoder_trains_and_opens(tmp_path):
    pipeline = load_pipeline(str(run(tmp_path, 16, encoder="perceiver")))
    assert (
        pipeline.info.encoder["kind"] == "perceiver"
        and pipeline.info.encoder["tokens"] == [8, 8]
        and pipeline.info.encoder["queries"] == [8, 8]
    )
    assert pipeline.draw(
        pipeline.features(draw(0, torch.arange(1)).image), pipeline.recommended(steps=1), pipeline.noise([0])
    ).shape == (1, 3, 64, 64)
    oblong = FeatureControlNet.start(pipeline.base, replace(pipeline.source, grid=(3, 4)), 16, "perceiver")
    assert oblong.hint(torch.zeros(1, 128, 3, 4), (8, 12)).shape == (1, 64, 8, 12)


def test_the_encoder_on_the_maps_own_grid_trains_and_opens(tmp_path):
    """A 4 x 4 map of pictures of half the size, for latents of 8 x 8."""
    pipeline = load_pipeline(str(run(tmp_path, 16, encoder="conv_at_map", input_size="32")))
    assert pipeline.info.encoder["kind"] == "conv_at_map" and pipeline.info.source.grid == (4, 4)
    pixel_values = pipeline.backbone.preprocess(draw(0, torch.arange(1)).image)
    assert pipeline.draw(pipeline.features(pixel_values), pipeline.recommended(steps=1), pipeline.noise([0])).shape == (
        1,
        3,
        64,
        64,
    )


def test_cycle_consistency_counts_from_a_number_of_images_on(tmp_path):
    """Before them the run is one without, bit by bit; stopped, it goes on exactly."""
    often = {"save_every": "8", "keep": "9"}
    staged = often | {"cycle": "2.0", "cycle_after": "16"}
    straight, plain = (
        load_file(run(tmp_path / "straight", 24, **staged)),
        load_file(run(tmp_path / "plain", 24, **often)),
    )
    before = [
        torch.load(next((tmp_path / name).glob("checkpoint-000000000016-*")), weights_only=True)["average"]
        for name in ("straight", "plain")
    ]
    assert all(torch.equal(before[0][k], before[1][k]) for k in before[1])
    assert any(not torch.equal(straight[k], plain[k]) for k in plain)
    run(tmp_path / "stopped", 8, **staged)
    resumed = load_file(run(tmp_path / "stopped", 24, **staged))
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)


def test_cycle_consistency_that_does_not_count_yet_costs_nothing(tmp_path, monkeypatch):
    def refused(*_):
        raise AssertionError("the features of the predicted image were computed")

    monkeypatch.setattr("training.loop.objective.cycle_distance", refused)
    monkeypatch.setattr("training.loop.run.step_gmac", lambda *_: 1.0)
    run(tmp_path, 16, cycle="2.0", cycle_after="16")
    with pytest.raises(AssertionError, match="were computed"):
        run(tmp_path, 24, cycle="2.0", cycle_after="16")


def test_a_run_can_end_with_scope_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.scope.DRAWN", 2)
    file = run(tmp_path, 16, scope="200", recommended="{strength: 1.0, guidance: 1.0, negative: text, steps: 1}")
    scope = load_scope(file)
    assert scope.maps == 200 and "cycle" in scope.quantiles and load_pipeline(str(file)).info.images_seen == 16
    (tmp_path / "own").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "own" / "one.png")
    with pytest.raises(FeatInvError, match="holds 1 images; asked for 200"):
        run(tmp_path / "two", 16, scope="200", scope_data=str(tmp_path / "own"))
    assert not list((tmp_path / "two").glob("*.safetensors"))


def test_fields_that_do_not_go_together_are_refused():
    wrong = {
        "leave out --graph or --cycle": {"cycle_after": "8", "graph": "true"},
        "take bf16 and adamw": {"precision": "fp16", "graph": "true"},
        "optimizer adamw8bit": {"optimizer": "adamw8bit", "graph": "true"},
        "give --cycle": {"cycle_after": "8", "cycle": "0"},
        "at least 200": {"scope": "100"},
        "--scope-data FOLDER": {"scope": "4000", "data": "photos"},
        "without --init-from": {"encoder_first": "100"},
    }
    for message, changes in wrong.items():
        with pytest.raises(FeatInvError, match=message):
            read_config(DEFAULT, changes)


def test_too_little_memory_is_said_before_and_during_training(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 0.02)
    with pytest.raises(FeatInvError, match="GB for weights and optimizer alone"):
        run(tmp_path, 16)
    monkeypatch.undo()

    def step(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("training.loop.run.training_loss", step)
    with pytest.raises(FeatInvError, match=r"at batch 8.*lower --batch.*no room"):
        run(tmp_path, 16)


def test_memory_counts_weights_gradients_moments_and_average():
    million = torch.nn.Linear(1000, 1000, bias=False)
    assert memory.needed(million, [million], True) == pytest.approx(0.024) and memory.needed(
        million, [], False
    ) == pytest.approx(0.016)


def test_a_graph_needs_a_cuda_device_and_one_process(tmp_path):
    with pytest.raises(FeatInvError, match="CUDA device only"):
        run(tmp_path, 16, graph="true")
    with pytest.raises(FeatInvError, match="one process, not of 2"):
        check_device("cuda", 2)


#: the rows of the paper's Tables 1 and 3 and of Fig. 4: name -> (timm name, input size, layer, pooled, encoder, images)
EPOCH = 1_281_167
CONVNEXT = ("convnext_base.fb_in22k_ft_in1k", 288)
SWINV2 = ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", None)
PAPER = {
    **{
        f"{name}_{'pooled' if pooled else 'last'}": (*backbone, "last", pooled, "conv", 3 * EPOCH)
        for pooled in (False, True)
        for name, backbone in {
            "resnet50": ("resnet50.tv_in1k", None),
            "resnet50b": ("resnet50.a1_in1k", None),
            "convnext": CONVNEXT,
            "swinv2": SWINV2,
        }.items()
    },
    "swinv2_perceiver": (*SWINV2, "last", False, "perceiver", 3 * EPOCH),
    **{f"convnext_stage{n}": (*CONVNEXT, f"stages.{n - 1}", False, "conv", EPOCH) for n in (1, 2, 3)},
}


def test_a_configuration_for_every_row_of_the_paper():
    for name, row in PAPER.items():
        c = read_config(CONFIGS / f"{name}.yaml")
        assert (c.backbone, c.input_size, c.layer, c.pooled, c.encoder, c.max_images) == row
        assert (c.batch, c.lr, c.dropout, c.schedule, c.ema, c.cycle, c.standardise, c.encoder_width) == (
            8,
            1e-5,
            0.15,
            "constant",
            0,
            0,
            False,
            512,
        )
        assert (c.recommended["strength"], c.recommended["guidance"]) == ((1.5, 8.0) if c.pooled else (1.0, 1.75))
        fast = read_config(CONFIGS / f"{name}_fast.yaml")
        assert (fast.backbone, fast.layer, fast.pooled, fast.encoder, fast.prompt) == (
            c.backbone,
            c.layer,
            c.pooled,
            c.encoder,
            c.prompt,
        ) and fast.batch > c.batch


def test_shipped_configurations_are_valid_and_overrides_are_typed(tmp_path):
    for file in CONFIGS.glob("*.yaml"):
        assert read_config(file).name == file.stem
    (tmp_path / "mine.yaml").write_text("extends: nothing.yaml\nname: mine\n")
    with pytest.raises(FeatInvError, match="extends nothing.yaml"):
        read_config(tmp_path / "mine.yaml")
    assert read_config(DEFAULT, {"lr": "1e-5"}).lr == 1e-5
    for field, value in {"nonsense": "1", "batch": "many", "schedule": "square", "pooled": "3"}.items():
        with pytest.raises(FeatInvError, match=field):
            read_config(DEFAULT, {field: value})
    with pytest.raises(FeatInvError, match="tiny_cnn_last.yaml"):
        read_config(CONFIGS / "none.yaml")
    named = read_config(DEFAULT, {"data": "2024", "prompt": "a photo: bright", "backbone_weights": "null"})
    assert (named.data, named.prompt, named.backbone_weights) == ("2024", "a photo: bright", None)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("dropout", "2", "dropout 2.0: expected 0 to 1"),
        ("ema", "1.5", "ema 1.5: expected 0 to"),
        ("ema", "true", "ema is True; expected float"),
        ("min_snr", "-1", "min_snr -1.0: expected at least 0"),
        ("lr", "-1", "lr -1.0"),
        ("images", "0", "images 0: expected at least 1"),
        ("cycle_below", "5000", "cycle_below 5000: expected 1 to 1000"),
        ("cycle_below", "0", "cycle_below 0: expected 1 to 1000"),
        ("save_every", "many", "^--save-every is 'many'; expected int"),  # not blamed on the file
        ("recommended", "{foo: 2}", "recommended .*foo"),
        ("recommended", "{steps: 0}", "steps 0: expected at least 1"),
        ("recommended", "{a: [", "recommended is"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(field, value, message):
    with pytest.raises(FeatInvError, match=message):
        read_config(DEFAULT, {field: value})


def test_files_that_are_no_configuration_are_refused(tmp_path):
    for text, message in {"": "holds no fields", "[1, 2]": "holds no fields", "a: [": "is not a YAML file"}.items():
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(FeatInvError, match=message):
            read_config(tmp_path / "mine.yaml")


def test_learning_rate_warms_up_and_falls():
    config = read_config(DEFAULT, {"warmup": "1000", "max_images": "10000", "lr": "1.0"})
    assert lr_at(0, config, 128) == 128 / 1000
    assert 0.9 < lr_at(1000, config, 128) <= 1.0 and lr_at(10_000, config, 128) < 1e-6
    assert (
        lr_at(5000, config, 128) == pytest.approx(0.5) and lr_at(9000, replace(config, schedule="constant"), 128) == 1
    )


def test_what_is_due_comes_with_the_step_that_reaches_its_number_of_images():
    assert [n for n in range(4, 41, 4) if due(10, n, 4)] == [12, 20, 32, 40]


def test_the_random_numbers_of_a_step_are_the_same_on_every_computer():
    """Seeds as they were when this test was written: another Python or numpy must not change a run."""
    assert [step_seed(0, 0), step_seed(0, 64), step_seed(1, 64)] == [
        15793235383387715774,
        15284237626711964920,
        16279313290175969372,
    ]


def test_image_folder_is_a_function_of_seed_and_number(tmp_path):
    for i in range(5):
        Image.fromarray(np.full((40, 60, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    one, two = (Photographs(Folder(tmp_path), {"pictures": 32, "target": 16}, "both", seed=1) for _ in range(2))
    batch = one.__getitems__(list(range(10))).tensors
    assert batch["pictures"].shape == (10, 3, 32, 32) and batch["target"].shape == (10, 3, 16, 16)
    assert torch.equal(batch["pictures"][7:8], two.__getitems__([7]).tensors["pictures"])
    assert sorted((batch["pictures"][:5].mean((1, 2, 3)) * 255 / 50).round().tolist()) == [
        0,
        1,
        2,
        3,
        4,
    ]  # each file once an epoch
    (tmp_path / "none").mkdir()
    with pytest.raises(FeatInvError, match="no images"):
        open_listing(str(tmp_path / "none"), None)
    with pytest.raises(FeatInvError, match="neither 'drawn' nor a folder"):
        open_listing(str(tmp_path / "nothing"), None)


def test_processes_share_a_global_batch_without_overlap():
    whole = next(loader(Scenes(0), 8, 8, 0, 1, 0)).tensors["pictures"]
    parts = [next(loader(Scenes(0), 8, 4, rank, 2, 0)).tensors["pictures"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
