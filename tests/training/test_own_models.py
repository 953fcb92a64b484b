"""docs/own-models.md: a backbone and a base model of one's own train and draw like any other."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import write_safetensors
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds.drawn.scenes import draw
from training.config import DEFAULT, read_config
from training.files import write_json
from training.loop.training import train
from training.models.base_model import load_base
from training.models.pipeline import load_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "own-models.md"


@pytest.fixture(scope="module")
def page():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def base(page, tmp_path_factory):
    """A small U-Net, the worlds' autoencoder and the page's embeddings, all at random weights."""
    work = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=4,
        in_channels=6,
        out_channels=6,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).save_pretrained(work / "base/unet")
    vae = PatchAutoencoder(8, 6)
    write_safetensors(work / "base/vae/diffusion_pytorch_model.safetensors", vae.state_dict(), {"format": "pt"})
    write_json(work / "base/vae/config.json", vae.config)
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(work / "base/scheduler")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        exec(page[1], {})  # prompts.safetensors
    return work / "base"


def test_the_pages_prompts_make_a_base_model(base):
    opened = load_base(base, "a photograph")
    assert opened.resolution == 32 and opened.text["a photograph"].shape == opened.text[""].shape == (1, 1, 16)
    assert opened.decode(opened.encode(torch.rand(1, 3, 32, 32))).shape == (1, 3, 32, 32)


def test_both_train_and_draw_and_no_weights_file_runs_code(page, base, tmp_path):
    (tmp_path / "backbones.py").write_text(page[0])
    own, folder = f"module:{tmp_path / 'backbones.py'}:dinov2", str(tmp_path / "weights")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(draw(0, torch.arange(4)).image):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"images/{i}.png")
    changes = {
        "backbone": own,
        "backbone_weights": folder,
        "base": str(base),
        "data": str(tmp_path / "images"),
        "prompt": "a photograph",
        "max_images": "4",
        "batch": "2",
        "encoder_width": "16",
        "precision": "fp32",
        "panel_every": "4",
        "workers": "0",
        "scope": "0",
        "recommended": "{strength: 1.0, guidance: 1.75, negative: text, steps: 2}",
    }
    file = train(read_config(DEFAULT, changes), tmp_path / "run")
    source = read_info(file).source
    assert source.backbone == "facebook/dinov2-base" and "encoder.layer.1 as NLC after 1 tokens" in source.definition
    pipeline = load_pipeline(str(file), backbone=own, backbone_weights=folder)
    features = pipeline.features(torch.rand(1, 3, 32, 32))
    assert pipeline.draw(features, pipeline.recommended(), pipeline.noise([0])).shape == (1, 3, 32, 32)
    with pytest.raises(FeatInvError, match="give its adapter with --backbone module:FILE.py:NAME"):
        load_pipeline(str(file))

    with_code = tmp_path / "evil.safetensors"  # names the file that its reader should run
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    about["featinv"] = about["featinv"].replace(source.backbone, f"module:{tmp_path / 'evil.py'}:make")
    about["featinv"] = about["featinv"].replace(source.definition, "")
    save_file(load_file(file), with_code, about)
    with pytest.raises(FeatInvError, match="is never run"):
        load_pipeline(str(with_code))
    assert not (tmp_path / "ran").exists()
