"""Features without a trained model: reconstruct.py --untrained."""

import ctypes
import json
import math
import shutil
import signal
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.guidance import kept_bytes
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds.drawn.scenes import draw
from training import reconstruct
from training.cli import run
from training.models.sampling import noise, sample
from training.models.untrained import UntrainedSampling, load_untrained
from training.speed.step_memory import Peak

SMALL = {
    "sample_size": 4,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
#: what makes a U-Net one of SDXL
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
FEW = ["--untrained", "--steps", "2", "--moves", "1", "--recurrence", "1"]


@pytest.fixture(scope="module")
def pipeline():
    return load_untrained()


@pytest.fixture(scope="module")
def features(pipeline):
    return pipeline.features(pipeline.backbone.preprocess(draw(0, torch.arange(4), "held-out").image))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Stable Diffusion's folder, tiny and at random weights; in it the folder of a small decoder."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    torch.manual_seed(0)
    UNet2DConditionModel(**SMALL).save_pretrained(folder / "unet")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=(32,) * 4, **levels).save_pretrained(folder / "vae")
    AutoencoderTiny().save_pretrained(folder / "taesd")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    save_file({"": torch.randn(1, 7, 32)}, folder / "prompts.safetensors")
    return str(folder)


@pytest.fixture
def scene(tmp_path):
    picture = draw(0, torch.arange(1), "held-out").image[0]
    Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def test_the_cosine_rises_far_above_the_unconditional_baseline(pipeline, features):
    """18 gradients; 0.2 is a good half of what is seen, and many times the spread of the means of four."""
    guided, alone = (
        pipeline.score(features, pipeline.draw(features, UntrainedSampling(moves, 0.1, 2, steps=3))).mean()
        for moves in (3, 0)
    )
    assert guided > alone + 0.2


def test_the_batch_bounds_the_memory_and_changes_nothing(pipeline, features):
    """Maps and samples in turn: each row keeps its noise, that which is added back too."""
    sampling = UntrainedSampling(1, 0.05, 2, steps=2)
    maps = features.select(slice(0, 2)).repeat(2)
    whole = pipeline.draw(maps, sampling, samples=2, batch=4)
    parts = pipeline.draw(maps, sampling, samples=2, batch=3)
    assert (whole - parts).abs().max() < 0.02  # ReLUs tip over by the size of a batch; other noise changes it by 0.5
    assert (pipeline.draw(maps, sampling, seed=1, samples=2) - whole).abs().max() > 0.3
    assert (whole[0] - whole[1]).abs().max() > 0.3
    second = pipeline.draw(maps.select(slice(2, 4)), sampling, samples=2)  # the other map, from the same noise
    assert (whole[2:] - second).abs().max() < 0.02


def test_the_guidance_scale_is_that_of_the_prompt(pipeline, features):
    """Without moves it is the base model's own sampling with as much classifier-free guidance."""
    still = UntrainedSampling(0, steps=2, guidance=3.0)
    drawn = pipeline.draw(features.select(slice(0, 2)), still, seed=4)
    start = noise(pipeline.base, 4, 2)
    expected, plain = (
        pipeline.base.decode(sample(pipeline.base, None, None, start, Sampling(2, guidance=g), pipeline.prompt))
        for g in (3.0, 1.0)
    )
    assert (drawn - expected).abs().max() < 1e-3 < 0.01 < (drawn - plain).abs().max()  # float32, in another order


def test_it_writes_the_same_files_as_with_a_model(scene, tmp_path):
    out = tmp_path / "out"
    reconstruct.main(["--image", scene, "--out", str(out), "--samples", "2", *FEW, "--distance", "squared"])
    results = json.loads((out / "results.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["000_scene_0.png", "000_scene_1.png", "panel.png", "results.json"]
    assert results["model"] is None and results["source"]["backbone"] == "resnet10t.tiny_world"
    assert results["sampling"] == {
        **{"moves": 1, "step": 0.1, "recurrence": 1, "start": 0.0, "end": 1.0, "distance": "squared"},
        **{"steps": 2, "guidance": 1.0},
    }
    assert "without a trained inversion model" in results["note"]


def test_an_embedded_world_brings_its_backbone_and_any_layer_is_inverted(scene, tmp_path):
    few = ["--untrained", "--steps", "1", "--moves", "1", "--recurrence", "1"]
    for options, backbone, layer in (
        (["--base", "photo", "--layer", "blocks.4", "--pooled"], "tf_efficientnet_lite0", "blocks.4"),
        (["--backbone", "tiny-vit", "--guidance", "2"], "vit_tiny", "last"),
    ):
        out = tmp_path / layer
        reconstruct.main(["--image", scene, "--out", str(out), *few, *options])
        source = json.loads((out / "results.json").read_text())["source"]
        assert source["backbone"].startswith(backbone) and source["layer"] == layer


def test_values_that_are_not_finite_end_it_and_the_last_finite_picture_stays(scene, tmp_path, capsys):
    calls = []

    def toward(clean, **settings):
        calls.append(1)
        return clean * math.nan if len(calls) == 4 else clean

    argv = ["--image", scene, "--out", str(tmp_path / "out"), "--untrained", "--steps", "3"]
    with (
        patch("training.models.untrained.toward_features", toward),
        pytest.raises(SystemExit, match="2"),
    ):
        run(lambda: reconstruct.main([*argv, "--moves", "1", "--recurrence", "2"]))
    said = capsys.readouterr().err
    assert "a move in step 2 of 3" in said and "lower step" in said and "last_finite_N.png" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["last_finite_0.png"]
    assert Image.open(tmp_path / "out" / "last_finite_0.png").size == (64, 64)


def test_stable_diffusion_is_guided_through_its_own_decoder_or_a_small_one(stable_diffusion, features):
    """Weights are random: nothing but the moves can bring the features, as the decoder that guides shows them. Blocks
    that are computed again give the same."""
    sampling, still = UntrainedSampling(3, 0.2, 2, steps=2), UntrainedSampling(0, steps=2)
    one = features.select(slice(0, 1))
    for small in (None, f"{stable_diffusion}/taesd"):
        pipeline = load_untrained(stable_diffusion, "tiny-cnn", small_decoder=small)
        if small:
            pipeline.base.decode = pipeline.guiding_picture
            latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
            expected = pipeline.guiding_picture(latents)
            pipeline.small.register_to_config(scaling_factor=2.0)
            assert torch.allclose(pipeline.guiding_picture(2 * latents), expected, atol=1e-5)
            pipeline.small.register_to_config(scaling_factor=1.0)
        plain, moved = (pipeline.draw(one, s) for s in (still, sampling))
        assert pipeline.score(one, moved) > pipeline.score(one, plain) + 0.015
        again = load_untrained(stable_diffusion, "tiny-cnn", small_decoder=small, checkpointing=True)
        again.base.decode = pipeline.base.decode
        assert torch.equal(again.draw(one, sampling), moved)


def test_what_a_backbone_keeps_for_its_gradient_is_counted_beforehand(pipeline):
    """All that is new on the way forth; but for what each layer holds only while it computes."""
    backbone, picture = pipeline.backbone, torch.zeros(1, 3, *pipeline.backbone.input_size, requires_grad=True)
    for layer in ("last", "layer2"):
        backbone.values(picture, layer)  # what is counted once in a process
        with (count := Peak()):
            values = backbone.values(picture, layer)
        assert 0.9 * count.now < kept_bytes(backbone, layer) <= count.now, layer
        del values


def test_ctrl_c_ends_a_gradient_on_its_way(stable_diffusion, features):
    """At the next layer: a real decoder's gradient takes half a minute on a processor."""
    pipeline, later = load_untrained(stable_diffusion, "tiny-cnn"), []
    decoder, ctrl_c = pipeline.base.vae.decoder, ctypes.pythonapi.PyErr_SetInterrupt
    ctrl_c.argtypes, ctrl_c.restype = [ctypes.py_object], None  # of C, as list.append is: nothing notices it in them

    def forth(layer, inputs, output):
        if output.requires_grad:
            output.register_hook(ctrl_c if layer is decoder.conv_out else later.append)

    for layer in decoder.modules():
        if layer is not decoder:
            layer.register_forward_hook(forth)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start the tests deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.draw(features.select(slice(0, 1)), UntrainedSampling(1, 0.2, 1, steps=1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(later) == 0


def test_checkpointing_computes_the_decoder_again(stable_diffusion, features):
    calls, sampling = [], UntrainedSampling(1, 0.2, 1, steps=1)
    for checkpointing in (False, True):
        pipeline = load_untrained(stable_diffusion, "tiny-cnn", checkpointing=checkpointing)
        block = pipeline.base.vae.decoder.mid_block
        block.register_forward_pre_hook(lambda *_, n=checkpointing: calls.append(n))
        pipeline.draw(features.select(slice(0, 1)), sampling)
    assert calls.count(False) == 2 and calls.count(True) == 3  # the last one is of the finished picture


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--untrained", "--strength", "1"], "--strength is a setting of an inversion model"),
        (["--untrained", "--best-of", "2"], "--best-of is a setting of an inversion model"),
        (["--untrained", "--steps", "0"], "steps 0: expected at least 1"),
        (["--untrained", "--moves", "-1"], "moves -1; expected a whole number"),
        (["--untrained", "--layer", "nowhere"], "nowhere"),
        (["--untrained", "--base", "owner/name"], "has no backbone of its own; name one with --backbone"),
        (["--moves", "2"], "--moves is a setting of --untrained"),
        (["--pooled"], "--pooled is a setting of --untrained"),
        (["--cost", "good"], "--cost is a setting of --untrained"),
        (["--untrained", "--other-weights"], "--untrained opens none"),
        (["--untrained", "--model", "tiny_cnn_last"], "--model tiny_cnn_last: --untrained uses no inversion model"),
        (["--untrained", "--checkpointing"], "--checkpointing: the decoder of tiny is small"),
        (["--small-decoder", "taesd"], "--small-decoder is a setting of --untrained"),
        (["--untrained", "--small-decoder", "SD/taesd"], "4 channels with 8 pixels per cell; base model tiny has 24"),
        (["--untrained", "--small-decoder", "SD/vae"], "is a AutoencoderKL; expected AutoencoderTiny"),
    ],
)
def test_what_does_not_go_together_is_named(scene, tmp_path, stable_diffusion, options, words):
    options = [option.replace("SD/", f"{stable_diffusion}/") for option in options]
    with pytest.raises(FeatInvError, match=words):
        reconstruct.main(["--image", scene, "--out", str(tmp_path / "out"), *options])
    assert not list((tmp_path / "out").glob("*"))


def test_checkpoints_that_only_comfyui_guides_are_refused_with_where(stable_diffusion, scene, tmp_path):
    """SDXL has a U-Net that reads more; SD 3 and Flux have none."""
    for name, part in (("sdxl", "unet"), ("flux", "transformer")):
        folder = tmp_path / name
        shutil.copytree(stable_diffusion, folder)
        shutil.rmtree(folder / "unet")
        UNet2DConditionModel(**SMALL, **SDXL).save_pretrained(folder / part)
        with pytest.raises(FeatInvError, match=r"node Feature Guidance Sampler inverts features with SDXL, SD 3, Flux"):
            argv = ["--untrained", "--base", str(folder), "--backbone", "tiny-cnn"]
            reconstruct.main([*argv, "--image", scene, "--out", str(tmp_path / "out")])
