"""Feature maps are the model's own, of any timm family, and go back through its own head."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from featinv_nodes.core.backbones import Backbone, load_backbone
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.tiny_world import BACKBONES, open_backbone

FAMILIES = {
    "resnet18": {},
    "convnext_atto": {},
    "swinv2_tiny_window8_256": {},
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {"depth": 2},
    "vit_small_patch14_reg4_dinov2": {"img_size": 70, "depth": 2, "num_classes": 7},
    "vit_base_patch16_siglip_224": {"depth": 1, "embed_dim": 96, "num_heads": 3, "num_classes": 7},
}


def random_backbone(name, **arguments):
    torch.manual_seed(0)
    return Backbone(timm.create_model(name, **arguments), name)


def normalised(backbone, x):
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    return (x - mean) / std


@pytest.mark.parametrize("name", FAMILIES)
def test_head_on_the_extracted_map_gives_the_models_own_logits(name):
    backbone = random_backbone(name, **FAMILIES[name])
    x = torch.rand(2, 3, *backbone.input_size)
    with torch.inference_mode():
        own = backbone.model(normalised(backbone, x))
        ours = backbone.logits(backbone(x))
    assert (own - ours).abs().max() <= 1e-5 * own.abs().max().clamp(min=1)  # float32 rounding of the same operations


@pytest.mark.parametrize("name", ["resnet18", "swinv2_tiny_window8_256", "vit_tiny_patch16_224"])
def test_every_offered_layer_has_a_spatial_map_of_its_stated_source(name):
    backbone = random_backbone(name)
    for layer in backbone.layers:
        x = torch.rand(1, 3, *backbone.input_size)
        with torch.inference_mode():
            found, pooled = backbone(x, layer), backbone(x, layer, pooled=True)
        assert tuple(found.values.shape[1:]) == (found.source.channels, *found.source.grid)
        assert torch.allclose(pooled.values[:, :, 0, 0], found.values.mean((2, 3)), atol=1e-6)
        assert pooled.source == backbone.source(layer, pooled=True)


def test_tokens_keep_their_place_on_the_grid():
    """The patch that changes is the cell that changes most, at the first block."""
    backbone = random_backbone("vit_tiny_patch16_224", depth=1)
    x = torch.full((1, 3, 224, 224), 0.5)
    y = x.clone()
    y[:, :, 32:48, 160:176] = 1.0  # patch row 2, column 10
    with torch.inference_mode():
        change = (backbone(y, "blocks.0").values - backbone(x, "blocks.0").values).norm(dim=1)[0]
    assert divmod(change.argmax().item(), 14) == (2, 10)


@pytest.mark.parametrize("short", BACKBONES)
def test_embedded_backbones_classify_held_out_scenes(short):
    from featinv_nodes.tiny_world.scenes import draw

    backbone = open_backbone(short)
    scenes = draw(0, torch.arange(300), "held-out")
    single = scenes.count == 1
    with torch.inference_mode():
        logits = backbone.logits(backbone(backbone.frame(scenes.image)))
    right = (logits[:, :10].argmax(1) == scenes.shape[:, 0])[single].float().mean()
    assert right > {"tiny-cnn": 0.99, "tiny-vit": 0.97}[short]  # measured 1.00 and 0.99 on 2,000 scenes
    assert backbone.classes[0].startswith("shape: ")


def test_frame_crops_the_centre_or_takes_the_whole_picture():
    backbone = open_backbone("tiny-cnn")
    x = torch.zeros(1, 3, 64, 192)
    x[..., 64:128] = 1
    assert backbone.frame(x, "crop").min() == 1
    stretched = backbone.frame(x, "stretch")
    assert stretched.shape == (1, 3, 64, 64) and stretched[..., 0].max() < 0.1 and stretched[..., 32].min() > 0.9
    with pytest.raises(FeatInvError, match="expected one of"):
        backbone.frame(x, "pad")


def test_bad_names_layers_and_files_are_named(tmp_path):
    with pytest.raises(FeatInvError, match="convnext_base"):
        load_backbone("convnext_bas")
    with pytest.raises(FeatInvError, match="weights file"):
        load_backbone("resnet18")
    with pytest.raises(FeatInvError, match="does not exist|do not exist"):
        load_backbone("resnet18", tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(FeatInvError, match="not a readable safetensors"):
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
