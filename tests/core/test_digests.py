"""Weights of one name and other content are told apart: in models, maps, and the files that are made of them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from featinv_nodes.core.backbone_opening import load_backbone, untrained_backbone
from featinv_nodes.core.concepts import Concepts, load_concepts, save_concepts
from featinv_nodes.core.digests import SAMPLED, digest, in_full_or_half
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_files import load_features, save_features
from featinv_nodes.core.feature_map import FeatureMap, concatenate

NAME = "test_resnet.r160_in1k"


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a.weight": torch.randn(8, 5, 64, 3, generator=generator), "b.bias": torch.randn(4, generator=generator)}
    return weights | {"b.num_batches_tracked": torch.tensor(seed)}


def opened(folder, seed):
    """A backbone of NAME whose weights file has weights of its own."""
    torch.manual_seed(seed)
    save_file(timm.create_model(NAME.partition(".")[0]).state_dict(), folder / f"{seed}.safetensors")
    return load_backbone(NAME, folder / f"{seed}.safetensors")


def test_a_digest_depends_on_the_weights_alone():
    weights = state()
    expected, same = digest(weights), dict(reversed(weights.items()))
    same["b.num_batches_tracked"] = torch.tensor(9)
    same["a.weight"] = weights["a.weight"].contiguous(memory_format=torch.channels_last)
    assert weights["a.weight"].numel() > SAMPLED and digest(same) == expected
    assert digest({name: value.half() for name, value in weights.items()}) == expected  # as a half-precision variant
    assert digest(state(1)) != expected and digest({"a.x": weights["a.weight"], **weights}) != expected
    assert digest(weights | {"a.weight": weights["a.weight"].view(8, 5, 3, 64)}) != expected
    for position in ((0, 0, 0, 0), (-1, -1, -1, -1)):  # the first and the last are read
        other = weights["a.weight"].clone()
        other[position] += 1
        assert digest(weights | {"a.weight": other}) != expected


def test_weights_in_other_numbers_have_no_digest_of_their_file():
    assert in_full_or_half({"a": torch.zeros(1), "b": torch.nn.Parameter(torch.zeros(1).half())})
    assert not in_full_or_half({"a": torch.zeros(1).bfloat16()})
    assert not in_full_or_half({"a": torch.zeros(1, device="meta")})


def test_files_of_other_weights_are_refused_and_older_ones_are_not(tmp_path):
    first, again, other = opened(tmp_path, 0), opened(tmp_path, 0), opened(tmp_path, 1)
    assert first.weights == again.weights != other.weights and untrained_backbone(NAME).weights == ""
    assert first.source(pooled=True).weights == first.source().weights == first.weights
    pictures = torch.rand(1, 3, *first.input_size)
    maps, others = first.extract(pictures), other.extract(pictures)
    assert len(concatenate([maps, again.extract(pictures)])) == 2
    save_features(tmp_path / "f", maps)
    save_concepts(tmp_path / "c", Concepts([torch.eye(maps.values.shape[1])[:2]], ["a"], maps.source))
    features, concepts = load_features(tmp_path / "f"), load_concepts(tmp_path / "c")
    assert features.source.weights == concepts.source.weights == first.weights
    words = f"{NAME} with other weights .*{first.weights}.*the name is the same, the network is not"
    for refusing in (
        lambda: concatenate([features, others]),
        lambda: other.logits(features),
        lambda: concepts.part(others, "a"),
    ):
        with pytest.raises(FeatInvError, match=words):
            refusing()
    unknown = untrained_backbone(NAME).source()
    save_features(tmp_path / "f", FeatureMap(maps.values, unknown))
    older = load_features(tmp_path / "f")
    assert len(concatenate([older, others])) == 2 and "weights" not in older.source.to_dict()
