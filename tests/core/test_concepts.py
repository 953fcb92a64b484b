"""Concepts: the parts sum to the map, scaling does what it says, and files come back as they were."""

import pytest
import torch
from safetensors.torch import save_file

from featinv_nodes.core.concepts import REST, Concepts, load_concepts, save_concepts
from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, FeatureSource
from featinv_nodes.core.steering import affected, difference, normalised

SOURCE = FeatureSource("net.tag", "last", False, 24, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bases(*sizes):
    """Oblique subspaces: orthonormal rows each, not orthogonal to one another."""
    return [torch.linalg.qr(draw(24, d, seed=i + 1))[0].T for i, d in enumerate(sizes)]


@pytest.fixture(params=[False, True], ids=["plain", "mean"])
def concepts(request):
    return Concepts(bases(3, 5, 2), ["a", "b", "c"], SOURCE, draw(24, seed=9) if request.param else None, "by hand", {"seed": 1})


@pytest.fixture
def features():
    return FeatureMap(draw(2, 24, 3, 4), SOURCE)


def close(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()  # float32 sums


def test_parts_sum_to_the_map(concepts, features):
    assert close(concepts.parts(features).sum(0), features.values)


def test_each_part_lies_in_its_subspace_and_the_rest_is_orthogonal_to_all(features):
    concepts = Concepts(bases(3, 5), ["a", "b"], SOURCE)
    parts = concepts.parts(features)
    for basis, part in zip(concepts.bases, parts):
        along = torch.einsum("dc,bchw->bdhw", basis, part)
        assert close(torch.einsum("dc,bdhw->bchw", basis, along), part)
        assert torch.einsum("dc,bchw->bdhw", basis, parts[-1]).abs().max() < 1e-4
    again = concepts.parts(FeatureMap(parts[0], SOURCE))  # taking apart a part gives the part
    assert close(again[0], parts[0]) and again[1:].abs().max() < 1e-4


def test_scaling(concepts, features):
    assert close(concepts.scale(features, {"a": 1.0}).values, features.values)
    everything = concepts.scale(features, dict.fromkeys(concepts.names, 0.3))
    assert close(everything.values, 0.3 * features.values)
    parts = concepts.parts(features)
    assert close(concepts.scale(features, {"b": 0.25}).values, features.values - 0.75 * parts[1])


def test_concepts_are_named_or_numbered(concepts, features):
    assert concepts.names == ["a", "b", "c", REST] and [concepts.index(x) for x in ("b", "1", 1, REST)] == [1, 1, 1, 3]
    for wrong in ("d", "4", -1):
        with pytest.raises(FeatInvError, match="there are 4: 0 a, 1 b, 2 c, 3 rest"):
            concepts.index(wrong)


def test_activation_is_a_share_of_the_longest_vector(concepts, features):
    activation = concepts.activation(features)
    lengths = features.values.norm(dim=1)
    expected = concepts.parts(features)[0].norm(dim=1) / lengths.amax((1, 2), keepdim=True)
    assert activation.shape == (4, 2, 3, 4) and close(activation[0], expected)


def test_files_come_back_bit_for_bit(concepts, tmp_path):
    save_concepts(tmp_path / "c.safetensors", concepts)
    again = load_concepts(tmp_path / "c.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.bases, concepts.bases)) and again.labels == concepts.labels
    assert again.source == SOURCE and again.method == "by hand" and again.settings == {"seed": 1}
    assert (again.mean is None) == (concepts.mean is None)


def test_bad_files_and_bad_concepts(concepts, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    save_concepts(tmp_path / "c.safetensors", concepts)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:200])
    for name, words in {"foreign": "no concept file", "cut": "not a complete", "none": "does not exist"}.items():
        with pytest.raises(FeatInvError, match=words):
            load_concepts(tmp_path / f"{name}.safetensors")
    with pytest.raises(FeatInvError, match="expected \\[d, 24\\]"):
        Concepts([torch.zeros(2, 23)], ["a"], SOURCE)
    with pytest.raises(FeatInvError, match="labels"):
        Concepts(bases(2), [], SOURCE)
    other = FeatureSource(**{**SOURCE.to_dict(), "layer": "layer1"})
    with pytest.raises(FeatInvError, match="layer: layer1 against last"):
        concepts.parts(FeatureMap(torch.zeros(1, 24, 3, 4), other))


def test_difference_is_the_median_over_seeds_of_the_distance_in_colour():
    """Algorithm 1, by hand: three seeds, one pixel that changes in all, one in a single seed."""
    original, attenuated = torch.zeros(3, 3, 1, 2), torch.zeros(3, 3, 1, 2)
    attenuated[:, :, 0, 0] = torch.tensor([[0.3, 0.4, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 0.2]])
    attenuated[1, 0, 0, 1] = 0.9
    distance = difference(original, attenuated)
    assert torch.allclose(distance, torch.tensor([[0.5, 0.0]]))
    assert affected(distance).tolist() == [[1.0, 0.0]] and normalised(torch.zeros(2, 2)).abs().max() == 0
    with pytest.raises(FeatInvError, match="same seed"):
        difference(original, attenuated[:2])
