"""Feature decoders: diffusers' images from timm's maps, and folders, backbones and maps that do not fit."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from rae import backbone_of, own_decoder, published, trained
from safetensors.torch import load_file, save_file

from featinv_nodes import feature_decoders
from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.concepts import Concepts
from featinv_nodes.core.digests import digest
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.mixing import interpolate
from featinv_nodes.core.transformers_weights import from_transformers
from featinv_nodes.feature_decoders import find_decoder, open_feature_decoder
from featinv_nodes.worlds import DECODERS, WORLDS, decoder_folder, open_backbone

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """(AutoencoderRAE, its backbone with timm's weights) of DINOv2 small, one layer deep."""
    folder = tmp_path_factory.mktemp("dinov2")
    made = trained("dinov2", folder / "rae")
    return made, backbone_of(made, folder / "timm", from_transformers(made.transformers))


@pytest.fixture
def folder(dinov2, tmp_path):
    """A copy of the decoder's folder, to be damaged."""
    return shutil.copytree(dinov2[0].folder, tmp_path / "copy")


def changed(folder, **fields):
    about = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    return folder


def rewritten(folder, change):
    """The folder with other tensors. change: of their dictionary."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    return folder


@pytest.mark.parametrize("family", ["siglip2", "mae"])
def test_pictures_are_diffusers_own_from_weights_in_transformers_layout(family, tmp_path):
    """Sums in another order; 2e-6 seen. The weights are those of timm's layout."""
    made = trained(family, tmp_path / "rae")
    backbone = backbone_of(made, tmp_path / "transformers", published(made))
    same_pictures(made, backbone)
    assert backbone.weights == digest(from_transformers(made.transformers))


def same_pictures(made, backbone):
    pictures = torch.rand(1, 3, made.size, made.size)
    with torch.inference_mode():
        expected = made.rae.decode(made.rae.encode(pictures).latent).sample.clamp(0, 1)
    decoder = open_feature_decoder(made.folder, backbone)
    assert (decoder.decode(backbone.extract(pictures)) - expected).abs().max() < 1e-5
    assert decoder.picture_size == tuple(expected.shape[2:]) and expected.std() > 0.1
    assert decoder.source == backbone.source() and decoder.source.weights == backbone.weights


def test_pictures_are_diffusers_own_from_weights_in_either_layout(dinov2, tmp_path):
    """As above, of a network whose position embedding is resampled."""
    made, backbone = dinov2
    for one in (backbone, backbone_of(made, tmp_path, published(made))):
        same_pictures(made, one)
        assert one.weights == backbone.weights


def test_a_digest_of_weights_holds_at_every_input_size(dinov2, tmp_path):
    made, backbone = dinov2
    larger = backbone_of(made, tmp_path, made.transformers, 518)
    assert larger.weights == backbone.weights and larger.input_size == (518, 518)


@pytest.mark.parametrize("family, hidden, patch", [key for key in feature_decoders.BACKBONES if key[1] != 384])
def test_the_larger_encoders_have_a_tensor_for_each_of_the_backbone_s(family, hidden, patch):
    """By name and shape, without their memory."""
    from diffusers.models.autoencoders.autoencoder_rae import _build_encoder

    name = feature_decoders.BACKBONES[family, hidden, patch]
    with torch.device("meta"):
        encoder = _build_encoder(family, hidden, patch, 24 if "large" in name else 12).state_dict()
        backbone = untrained_backbone(name).model.state_dict()
    norm = {
        f"{'post_layernorm' if family == 'siglip2' else 'layernorm'}.{end}": torch.empty(hidden)
        for end in ("weight", "bias")
    }
    state = from_transformers(encoder | norm)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in backbone.items()}


def test_mixed_and_attenuated_maps_are_decoded(dinov2):
    made, backbone = dinov2
    decoder, features = open_feature_decoder(made.folder, backbone), backbone.extract(torch.rand(2, 3, 224, 224))
    concepts = Concepts([torch.eye(384)[:8]], ["a"], features.source)
    for edited in (
        interpolate([features.select(0), features.select(1)], [0.5, 0.5]),
        concepts.scale(features, {"a": 0.0}),
    ):
        picture, plain = decoder.decode(edited)[:1], decoder.decode(features.select(0))
        assert picture.shape == (1, 3, 256, 256) and (picture - plain).abs().max() > 0.01


def test_batches_change_nothing_and_progress_ends_it(dinov2):
    made, backbone = dinov2
    decoder, features = open_feature_decoder(made.folder, backbone), backbone.extract(torch.rand(3, 3, 224, 224))
    said = []
    parts = decoder.decode(features, 2, lambda *done: said.append(done))
    assert (parts - decoder.decode(features)).abs().max() < 1e-5 and said == [(2, 3), (3, 3)]

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.decode(features, 2, cancel)


def test_shards_and_older_files_are_the_same_decoder(dinov2, folder):
    made, backbone = dinov2
    features, tensors = backbone.extract(torch.rand(1, 3, 224, 224)), load_file(folder / FILE)
    expected = open_feature_decoder(folder, backbone).decode(features)
    (folder / FILE).unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    assert torch.equal(open_feature_decoder(folder, backbone).decode(features), expected)
    names = sorted(tensors)
    shards = {f"part-{n}.safetensors": names[n::2] for n in range(2)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    assert torch.equal(open_feature_decoder(folder, backbone).decode(features), expected)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(
        FeatInvError, match="is not complete: .*index.json names part-1.safetensors, which is not there"
    ):
        open_feature_decoder(folder, backbone)


DAMAGE = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json; download or copy"),
    "no weights": (lambda f: (f / FILE).unlink(), f"has no {FILE}; download or copy"),
    "cut off": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:9000]), "not a complete safetensors file"),
    "another class": (
        lambda f: changed(f, _class_name="AutoencoderKL"),
        "class AutoencoderKL; expected an AutoencoderRAE",
    ),
    "no class": (lambda f: changed(f, _class_name=None), "names no class; expected an AutoencoderRAE"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is no JSON that can be read"),
    "other type": (lambda f: changed(f, encoder_type="clip"), "field encoder_type should be 'dinov2', 'siglip2'"),
    "patches": (lambda f: changed(f, encoder_patch_size=15), "224 is not a multiple of the patches of 15"),
    "heads": (lambda f: changed(f, decoder_num_attention_heads=7), "not a multiple of 4 and of the 7 heads"),
    "huge": (lambda f: changed(f, decoder_hidden_size=2**30), "misshapen decoder.trainable_cls_token"),
    "unknown encoder": (lambda f: changed(f, encoder_hidden_size=1536), "no timm backbone is known for its encoder"),
    "missing tensor": (
        lambda f: rewritten(f, lambda t: t.pop("decoder.decoder_norm.bias")),
        "missing decoder.decoder_norm.bias",
    ),
    "surplus tensor": (lambda f: rewritten(f, lambda t: t.update(extra=torch.ones(1))), "unexpected extra"),
    "no encoder layer": (
        lambda f: rewritten(f, lambda t: t.pop("encoder.encoder.layer.0.attention.attention.key.bias")),
        "missing blocks.0.attn.qkv.bias",
    ),
    "NaN": (lambda f: rewritten(f, lambda t: t["decoder.decoder_norm.bias"].fill_(torch.nan)), "holds NaN"),
    "colours": (
        lambda f: rewritten(f, lambda t: t.update(encoder_mean=torch.ones(1))),
        "a number for each of 3 colours",
    ),
    "normalisation": (lambda f: rewritten(f, lambda t: t["encoder_mean"].fill_(0.5)), "normalises colours by mean"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=list(DAMAGE))
def test_a_folder_that_is_not_whole_is_named(dinov2, folder, damage, words):
    damage(folder)
    with pytest.raises(FeatInvError, match=words) as error:
        open_feature_decoder(folder, dinov2[1])
    assert "copy" in str(error.value) and "\n" not in str(error.value)


def test_a_backbone_that_is_not_the_decoder_s_is_told_which_is(dinov2, tmp_path):
    made, backbone = dinov2
    for wrong, words in {
        None: "needs that backbone.*open it at 224 pixels",
        untrained_backbone(
            "resnet18.a1_in1k"
        ): "resnet18.a1_in1k, the decoder .* was trained with vit_small_patch14_reg4",
        backbone_of(made, tmp_path / "518", made.transformers, 518): "reads 518 x 518 pixels.*with input_size 224",
    }.items():
        with pytest.raises(FeatInvError, match=words):
            open_feature_decoder(made.folder, wrong)


def test_other_weights_are_refused_unless_they_are_allowed(dinov2, tmp_path):
    """A single tensor of a fine-tune; and a folder without its encoder goes by the name's tag."""
    made, backbone = dinov2
    state = from_transformers(made.transformers)
    state["blocks.0.mlp.fc1.bias"] = state["blocks.0.mlp.fc1.bias"] + 0.01
    tuned = backbone_of(made, tmp_path / "tuned", state)
    features = tuned.extract(torch.rand(1, 3, 224, 224))
    with pytest.raises(FeatInvError, match="with other weights .1 of 19 tensors differ, such as blocks.0.mlp.fc1.bias"):
        open_feature_decoder(made.folder, tuned)
    assert open_feature_decoder(made.folder, tuned, other_weights=True).decode(features).shape == (1, 3, 256, 256)
    with pytest.raises(FeatInvError, match="the feature map and the decoder are of .* with other weights"):
        open_feature_decoder(made.folder, backbone).decode(features)
    bare = shutil.copytree(made.folder, tmp_path / "bare")
    rewritten(bare, lambda t: [t.pop(name) for name in list(t) if name.startswith("encoder.")])
    assert open_feature_decoder(bare, tuned)
    tuned.name = "vit_small_patch14_reg4_dinov2.mine"
    with pytest.raises(FeatInvError, match="the backbone is .*mine, the decoder .* was trained with"):
        open_feature_decoder(bare, tuned)


def test_maps_of_another_source_are_refused_by_name(dinov2):
    made, backbone = dinov2
    decoder, features = open_feature_decoder(made.folder, backbone), backbone.extract(torch.rand(1, 3, 224, 224))
    block = backbone.extract(torch.rand(1, 3, 224, 224), "blocks.0")
    drawn = open_backbone("tiny-cnn").extract(torch.rand(1, 3, 64, 64))
    for wrong, words in (
        (features.pool(), "pooled: True against False"),
        (block, "layer: blocks.0 against last"),
        (drawn, "the feature map .resnet10t.tiny_world, .* and the decoder .vit_small_patch14_reg4_dinov2.lvd142m"),
        (replace(features, source=replace(features.source, weights="0" * 16)), "with other weights"),
    ):
        with pytest.raises(FeatInvError, match=words):
            decoder.decode(wrong)


def test_a_norm_that_cannot_be_taken_back_is_refused(dinov2, tmp_path):
    made, _ = dinov2
    state = from_transformers(made.transformers)
    state["norm.weight"] = state["norm.weight"].index_fill(0, torch.tensor(3), 0.0)
    with pytest.raises(FeatInvError, match="last normalisation of .* has a weight of 0.0e.00"):
        open_feature_decoder(made.folder, backbone_of(made, tmp_path, state))
    with pytest.raises(FeatInvError, match="does not normalise its last map"):
        backbone = backbone_of(made, tmp_path, from_transformers(made.transformers))
        backbone.model.norm = torch.nn.Identity()
        open_feature_decoder(made.folder, backbone)


# --- decoders of the pack's own ---


@pytest.fixture
def own(tmp_path):
    """(folder, backbone, diffusers' decoder) of tiny-cnn's last layer, in 8 bits."""
    backbone = open_backbone("tiny-cnn")
    return tmp_path / "own", backbone, own_decoder(tmp_path / "own", backbone.source(), torch.int8)


def test_a_decoder_of_the_pack_s_own_reads_the_map_as_it_is(own):
    """In 8 bits: 0.003 of the pictures' range seen beside the trained weights."""
    folder, backbone, decoder = own
    features = backbone.extract(torch.rand(2, 3, 64, 64))
    with torch.inference_mode():
        logits = decoder(features.values.flatten(2).transpose(1, 2)).logits
        expected = (decoder.unpatchify(logits) * 0.5 + 0.5).clamp(0, 1)
    for given in (None, backbone):
        opened = open_feature_decoder(folder, given)
        assert opened.source == features.source and opened.source.weights == backbone.weights
        pictures = opened.decode(features)
        assert pictures.shape == (2, 3, 64, 64) and 0 < (pictures - expected).abs().max() < 0.01
    with pytest.raises(FeatInvError, match="the backbone is vit_tiny.*was trained with resnet10t.tiny_world"):
        open_feature_decoder(folder, open_backbone("tiny-vit"))
    with pytest.raises(FeatInvError, match="featinv_source is missing"):
        open_feature_decoder(changed(folder, featinv_source=None))
    changed(folder, featinv_source=replace(features.source, grid=(4, 4)).to_dict())
    with pytest.raises(FeatInvError, match="featinv_source has 128 channels, 4x4; the other fields state .* 8x8"):
        open_feature_decoder(folder)


def test_embedded_decoders_open_by_name():
    """Those that are there; others are told where decoders come from."""
    assert set(DECODERS) <= {name for world in WORLDS.values() for name in world.decoders}
    for name, world in DECODERS.items():
        decoder = open_feature_decoder(name)
        assert decoder_folder(name).parent == world.folder and decoder.picture_size == decoder.source.input_size
        assert decoder.source.backbone in {backbone.name for backbone in world.backbones.values()}
    with pytest.raises(FeatInvError, match="there is no feature decoder 'none'.*run.py download rae-dinov2-base"):
        open_feature_decoder("none")


def test_without_diffusers_it_says_what_to_install(own, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(feature_decoders, "find_spec", lambda name: None)
        with pytest.raises(
            FeatInvError, match=r'diffusers 0.39 or newer, which is missing: .*pip install -U "diffusers>='
        ):
            open_feature_decoder(own[0])
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_rae", None)
    monkeypatch.setattr(feature_decoders, "version", lambda name: "0.32.1")
    with pytest.raises(FeatInvError, match="diffusers 0.32.1 is installed, but feature decoders need 0.39 or newer"):
        open_feature_decoder(own[0])
    assert find_decoder(own[0]).bytes > 0  # which needs no diffusers
