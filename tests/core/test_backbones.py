"""Feature maps are the model's own, of any timm family, and go back through its own head."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from featinv_nodes.core.backbone_opening import load_backbone, untrained_backbone
from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts.statistics import top_classes
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn import DRAWN

SMALL = {"depth": 2, "num_classes": 7}
FAMILIES = [
    ("resnet18", {"pretrained_cfg_overlay": {"input_size": (3, 64, 96)}}),  # timm's way to state a CNN's input size
    ("convnext_atto", {}),
    ("swinv2_tiny_window8_256", {"img_size": (64, 96), "window_size": 4, "depths": (1, 1, 1, 1)}),  # NHWC
    ("pvt_v2_b0", {}),  # NCHW, though it has a patch embedding
    ("levit_128s", {}),  # tokens of a grid smaller than the patches'
    ("coat_lite_tiny", {}),  # a class token that num_prefix_tokens does not state
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"img_size": (64, 96), "global_pool": "avg", **SMALL}),
    ("deit3_small_patch16_224", {"depth": 2}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": (70, 56), **SMALL}),
    ("vit_base_patch16_siglip_224", {"embed_dim": 96, "num_heads": 3, **SMALL}),  # attention pooling
]
NAMED = [(name, arguments) for name, arguments in FAMILIES if name.startswith(("resnet", "swin", "levit", "vit_small"))]


def each(families):
    return pytest.mark.parametrize("name, arguments", families, ids=[f"{n}-{'-'.join(a)}" for n, a in families])


def random_backbone(name, arguments):
    torch.manual_seed(0)
    return Backbone(timm.create_model(name, **arguments), name)


def normalised(backbone, x):
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    return (x - mean) / std


def assert_close(ours, own):
    assert ours.shape == own.shape
    assert (own - ours).abs().max() <= 1e-5 * own.abs().max()  # float32 rounding of the same operations


@each(FAMILIES)
def test_head_on_the_extracted_map_gives_the_models_own_logits(name, arguments):
    backbone = random_backbone(name, arguments)
    x = torch.rand(2, 3, *backbone.input_size)
    with torch.inference_mode():
        own = backbone.model(normalised(backbone, x))
        assert_close(backbone.logits(backbone(x)), own)
    assert (own[0] - own[1]).abs().max() > 1e-3 * own.abs().max()  # two pictures, two answers


@each(NAMED)
def test_every_offered_layer_is_timms_own_map_with_its_stated_source(name, arguments):
    backbone = random_backbone(name, arguments)
    x = torch.rand(1, 3, *backbone.input_size)
    with torch.inference_mode():
        timms = backbone.model.forward_intermediates(
            normalised(backbone, x), intermediates_only=True, output_fmt="NCHW"
        )
        last = backbone.model.forward_intermediates(
            normalised(backbone, x), indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        assert len(backbone.layers) == 1 + len(timms)
        for layer, own in zip(backbone.layers, [*last, *timms]):
            result, pooled = backbone(x, layer), backbone(x, layer, pooled=True)
            assert_close(result.values, own)
            assert (result.source.channels, *result.source.grid) == own.shape[1:]
            assert torch.allclose(pooled.values[:, :, 0, 0], result.values.mean((2, 3)), atol=1e-6)
            assert pooled.source == backbone.source(layer, pooled=True)


@each(NAMED)
def test_gradients_reach_the_pictures_also_after_an_extraction(name, arguments):
    """timm keeps some tensors of an earlier pass (LeViT's biases); those of an extraction must not stand in the way."""
    backbone = random_backbone(name, arguments)
    x = torch.rand(1, 3, *backbone.input_size)
    backbone.extract(x)
    for layer in backbone.layers[:2]:
        picture = x.clone().requires_grad_()
        backbone.values(picture, layer).square().sum().backward()
        assert picture.grad.isfinite().all() and picture.grad.abs().sum() > 0


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_map_without_its_prefix_serves_a_head_that_does_not_read_it(pool):
    backbone = random_backbone("vit_tiny_patch16_224", {"img_size": 64, "global_pool": pool, **SMALL})
    with torch.inference_mode():
        features = backbone(torch.rand(2, 3, 64, 64))
        mixed = features.with_values(features.values)
        if pool == "avg":
            assert torch.equal(backbone.logits(mixed), backbone.logits(features))
        else:
            with pytest.raises(FeatInvError, match="class token"):
                backbone.logits(mixed)


@pytest.mark.parametrize("name, reason", [("crossvit_9_240", "2 maps"), ("pit_ti_224", "no spatial map")])
def test_a_head_without_one_map_leaves_the_named_layers(name, reason):
    backbone = random_backbone(name, {})
    with pytest.raises(FeatInvError, match=f"{reason}.*{backbone.layers[1]}"):
        backbone.source()
    assert backbone.source(backbone.layers[1]).grid > (1, 1)


def test_tokens_keep_their_place_on_the_grid():
    """The patch that changes is the cell that changes most, at the first block."""
    backbone = random_backbone("vit_tiny_patch16_224", {"depth": 1})
    x = torch.full((1, 3, 224, 224), 0.5)
    y = x.clone()
    y[:, :, 32:48, 160:176] = 1.0  # patch row 2, column 10
    with torch.inference_mode():
        change = (backbone(y, "blocks.0").values - backbone(x, "blocks.0").values).norm(dim=1)[0]
    assert divmod(change.argmax().item(), 14) == (2, 10)


def test_what_comes_after_the_layers_that_are_read_is_not_computed():
    backbone, ran = random_backbone("vit_tiny_patch16_224", {"depth": 3}), []
    for number, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    x = torch.rand(1, 3, 224, 224)
    backbone.values(x, "blocks.0")
    backbone.several(x, ["blocks.1"])
    assert ran == [0, 0, 1]


@pytest.mark.parametrize("short", DRAWN.backbones)
def test_embedded_backbones_classify_held_out_scenes(short):
    from featinv_nodes.worlds.drawn.scenes import draw

    backbone = open_backbone(short)
    scenes = draw(0, torch.arange(300), "held-out")
    single = scenes.count == 1
    with torch.inference_mode():
        logits = backbone.logits(backbone(backbone.preprocess(scenes.image)))
    right = (logits[:, :10].argmax(1) == scenes.shape[:, 0])[single].float().mean()
    assert right > {"tiny-cnn": 0.99, "tiny-vit": 0.97}[short]  # measured 1.00 and 0.99 on 2,000 scenes
    assert backbone.classes[0].startswith("shape: ")
    (best,) = top_classes(backbone, backbone(backbone.preprocess(scenes.image[:1])))  # one of each group
    assert [backbone.classes[number].partition(": ")[0] for number in best] == list(backbone.groups)


def test_frame_crops_the_centre_or_takes_the_whole_picture():
    backbone = open_backbone("tiny-cnn")
    x = torch.zeros(1, 3, 64, 192)
    x[..., 64:128] = 1
    assert backbone.preprocess(x, "crop").min() == 1
    stretched = backbone.preprocess(x, "stretch")
    assert stretched.shape == (1, 3, 64, 64) and stretched[..., 0].max() < 0.1 and stretched[..., 32].min() > 0.9
    with pytest.raises(FeatInvError, match="expected one of"):
        backbone.preprocess(x, "pad")


def test_bad_names_layers_and_files_are_named(tmp_path):
    with pytest.raises(FeatInvError, match="convnext_base"):
        load_backbone("convnext_bas")
    with pytest.raises(FeatInvError, match="resnet18.a1_in1k"):
        load_backbone("resnet18.a9_in1k")
    with pytest.raises(FeatInvError, match="weights from a local file"):
        load_backbone("resnet18")
    with pytest.raises(FeatInvError, match="does not exist|do not exist"):
        load_backbone("resnet18", tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(FeatInvError, match="not a complete safetensors"):
        load_backbone("resnet18", tmp_path / "text.safetensors")
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FeatInvError, match="conv1.weight"):
        load_backbone("resnet18", tmp_path / "foreign.safetensors")
    with pytest.raises(FeatInvError, match="layer4"):
        open_backbone("tiny-cnn").source("layer9")


def test_weights_file_of_a_timm_model_loads(tmp_path):
    model = timm.create_model("resnet18")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("resnet18.a1_in1k", tmp_path / "w.safetensors")
    assert backbone.name == "resnet18.a1_in1k" and torch.equal(backbone.model.fc.weight, model.fc.weight)


def test_weights_of_another_architecture_are_told_key_by_key(tmp_path):
    """Briefly: some keys of every kind by name, the others counted."""
    file = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet50").state_dict(), file)
    with pytest.raises(FeatInvError) as error:
        load_backbone("resnet18.a1_in1k", file)
    message = str(error.value)
    assert "unexpected layer1.0.bn3.bias" in message and "resnet18.a1_in1k" in message and "missing" not in message
    assert "misshapen layer1.0.conv1.weight [64, 64, 1, 1] instead of [64, 64, 3, 3]" in message
    assert message.count(" more") == 2 and len(message) < 700
    save_file(timm.create_model("resnet18", num_classes=10).state_dict(), file)
    with pytest.raises(FeatInvError, match=r"misshapen fc.weight \[10, 512\] instead of \[1000, 512\], fc.bias"):
        load_backbone("resnet18", file)


def test_missing_weights_name_the_command_and_the_page():
    with pytest.raises(FeatInvError, match=r"run.py download CONFIG.*timm/resnet18.a1_in1k"):
        load_backbone("resnet18.a1_in1k")


def test_another_input_size_is_read_and_refused_where_the_model_is_fixed():
    backbone = untrained_backbone("convnext_atto.d2_in1k", 288)
    assert backbone.input_size == (288, 288) and backbone.source().grid == (9, 9)
    assert (
        backbone.crop_pct == timm.get_pretrained_cfg("convnext_atto.d2_in1k").test_crop_pct
    )  # timm evaluates at 288 so
    with pytest.raises(FeatInvError, match="cannot be set to 288"):
        open_backbone("tiny-vit", input_size=288)
    with pytest.raises(FeatInvError, match="at 8 pixels"):
        untrained_backbone("vit_tiny_patch16_224", 8)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_backbone_of_one_channel_is_refused(tmp_path, name):
    model = timm.create_model(name, in_chans=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": name, "model_args": {"in_chans": 1}, "pretrained_cfg": {"input_size": [1, 224, 224]}}
    for config in (about, about | {"pretrained_cfg": {}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(FeatInvError, match="channel count of 1; expected 3"):
            load_backbone(str(tmp_path))


def test_a_model_that_cannot_read_its_own_input_is_told_in_a_line():
    model = timm.create_model("resnet10t")
    model.layer4 = torch.nn.Linear(3, 3)
    with pytest.raises(FeatInvError, match="resnet10t cannot read images of 3 x 176 x 176") as error:
        Backbone(model, "resnet10t").source()
    assert "\n" not in str(error.value)


def test_a_stage_is_read_at_a_given_size_where_the_head_reads_no_map():
    """An inversion model is opened with the size that it was trained at."""
    backbone = untrained_backbone("pit_ti_224", 224)
    assert backbone.source(backbone.layers[1]).input_size == (224, 224)


@pytest.mark.parametrize(
    "name, count, expected",
    [
        ("vit_tiny_patch16_224", 1000, True),
        ("vit_tiny_patch16_224", 512, True),  # somebody's own 512 classes
        ("vit_small_patch14_dinov2.lvd142m", 0, False),
        ("vit_base_patch16_siglip_224.webli", 0, False),
        ("vit_base_patch16_clip_224.openai", 512, False),  # timm counts the channels of CLIP's embedding
        ("vit_base_patch16_clip_224.openai_ft_in1k", 1000, True),
        ("vit_base_patch16_clip_224", 10, True),  # fine-tuned
    ],
)
def test_an_embedding_is_no_classifier(name, count, expected):
    backbone = Backbone(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=count), name)
    assert backbone.has_classes == expected
    if not expected:
        with pytest.raises(FeatInvError, match=f"{name} has no classes"):
            backbone.top_classes(torch.zeros(1, max(count, 1)), 1)
        with pytest.raises(FeatInvError, match="has no classes"):  # relevance is of classes
            top_classes(backbone, backbone.extract(torch.zeros(1, 3, 32, 32)))
