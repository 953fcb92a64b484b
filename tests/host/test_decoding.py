"""Feature decoders in a real ComfyUI's process: what decoding.py measured there."""

import pytest
from test_inside import CLOSE


@pytest.fixture
def seen(measured):
    return measured["decoding"]


def test_a_decoder_s_folder_is_listed_and_draws_what_the_program_draws(seen):
    assert "mine" in seen["listed"] and "mine" not in seen["empty"] and seen["empty"]
    assert seen["size"] == [3, 64, 64, 3] and seen["difference"] <= CLOSE
    (said,) = seen["says"]
    assert said == "decodes resnet10t.tiny_world, layer last, 128 channels, 8x8 into 64 x 64 pixels"
    assert seen["follows the file"]


def test_it_is_managed_and_comes_back(seen):
    assert seen["managed"] and seen["again"] == 0


def test_it_can_be_cancelled_before_each_layer(seen):
    result = seen["cancelled"]
    assert result.pop("finished") == "no error" and result.pop("asked") > 15
    for message, asked, last in result.values():
        assert message.startswith("InterruptProcessingException") and asked == last


def test_mixing_concepts_viz_and_similarity_work_on_such_maps(seen):
    result = seen["edited"]
    assert result["mixed"] == 1 and result["changed"] > 0.01 and -1 < result["cosine"] < 1
    assert result["viz"].startswith("half: slope ")


def test_a_released_folder_decodes_the_maps_of_its_backbone(seen):
    result = seen["released"]
    assert result["size"] == [1, 256, 256, 3] and result["difference"] <= CLOSE
    assert "needs that backbone" in result["without backbone"]
    assert "reads 518 x 518 pixels" in result["other size"] and "with input_size 224" in result["other size"]
    assert "was trained with vit_small_patch14_reg4_dinov2.lvd142m" in result["other backbone"]


@pytest.mark.parametrize(
    "mistake, words",
    {
        "without diffusers": ["need the package diffusers 0.39 or newer, which is missing", "pip install"],
        "none chosen": ["no decoder is chosen", "featinv_decoders", "run.py download rae-dinov2-base"],
        "gone": ["gone is not there", "press R"],
        "another class": ["class AutoencoderKL; expected an AutoencoderRAE"],
        "incomplete": ["it has no diffusion_pytorch_model.safetensors"],
        "other backbone": ["vit_tiny_patch16_224.tiny_world", "resnet10t.tiny_world", "the decoder"],
        "other layer": ["layer: layer2 against last"],
        "pooled": ["pooled: True against False"],
        "transformers folder": ["a configuration of transformers (vit_mae)", "into timm_name"],
        "large decoder": ["the decoder mine needs", "0.0001 GB", "Choose a smaller decoder"],
        "large backbone": [
            "the backbone vit_base_patch14_reg4_dinov2.lvd142m needs 0.0004 GB of memory for its weights alone",
            "vit_small_patch14_reg4_dinov2.lvd142m, which needs 0.088 GB",
        ],
    }.items(),
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_mistake_says_what_to_do(seen, mistake, words):
    message = seen["mistakes"][mistake]
    assert message.startswith("FeatInvError") and not [w for w in words if w not in message], message
