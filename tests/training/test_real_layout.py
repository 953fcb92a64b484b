"""The same program trains on a Stable Diffusion folder and a folder of images: everything real but the size."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_nodes.worlds.drawn.scenes import draw
from training.config import DEFAULT, read_config
from training.loop.training import train
from training.models.base_model import load_base
from training.models.pipeline import load_pipeline
from training.models.sampling import round_trip

PROMPT = "a b"


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """SD 1.x in diffusers' layout at random weights: four levels, noise prediction, a CLIP text encoder."""
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
    ).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    ).save_pretrained(folder / "scheduler")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[1], "pad_token": words[1]}
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special})
    )
    return folder


def test_text_is_encoded_once_and_latents_are_scaled(stable_diffusion):
    base = load_base(stable_diffusion, PROMPT)
    assert {p: tuple(e.shape) for p, e in base.text.items()} == {"": (1, 77, 32), PROMPT: (1, 77, 32)}
    assert not torch.equal(base.text[""], base.text[PROMPT])
    assert base.resolution == 64 and base.scheduler.config.prediction_type == "epsilon"
    x = torch.rand(1, 3, 64, 64)
    expected = base.vae.encode(x * 2 - 1).latent_dist.mean * 0.18215
    assert torch.allclose(base.encode(x), expected) and round_trip(base, torch.rand(1, 3, 80, 80)).shape == (
        1,
        3,
        64,
        64,
    )


def test_train_and_open_on_a_real_layout(stable_diffusion, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, picture in enumerate(draw(0, torch.arange(4)).image):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).resize((90, 70)).save(images / f"{i}.png")
    changes = {
        "base": str(stable_diffusion),
        "data": str(images),
        "prompt": PROMPT,
        "max_images": "8",
        "batch": "2",
        "encoder_width": "16",
        "precision": "fp32",
        "flips": "both",
        "panel_every": "8",
        "ema": "0",
        "schedule": "constant",
        "lr": "1e-5",
        "workers": "0",
        "recommended": "{strength: 1.0, guidance: 1.75, negative: text, steps: 2}",
    }
    file = train(read_config(DEFAULT, changes), tmp_path / "run")
    pipeline = load_pipeline(str(file))
    pictures = pipeline.draw(pipeline.features(torch.rand(1, 3, 64, 64)), pipeline.recommended(), pipeline.noise([0]))
    assert pictures.shape == (1, 3, 64, 64) and pipeline.info.prompt == PROMPT
