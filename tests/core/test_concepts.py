"""Concepts: the parts sum to the map, scaling does what it says, and files come back as they were."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from featinv_nodes.core.concepts import REST, Concepts, SparseEncoder, load_concepts, save_concepts
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.viz import affected, difference, normalised

SOURCE = FeatureSource("net.tag", "last", False, 24, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bases(*sizes):
    """Oblique subspaces: orthonormal rows each, not orthogonal to one another."""
    return [torch.linalg.qr(draw(24, d, seed=i + 1))[0].T for i, d in enumerate(sizes)]


def dictionary(atoms, active, source=SOURCE):
    """Directions of any length, more than channels, of which few are active at once, and a mean."""
    rows, c = draw(atoms, source.channels, seed=3), source.channels
    encoder = SparseEncoder(draw(atoms, c, seed=4), draw(atoms, seed=5), active)
    return Concepts(
        list(rows[:, None]),
        [f"atom {i}" for i in range(atoms)],
        source,
        draw(c, seed=9),
        "by hand",
        {"seed": 1},
        encoder,
    )


@pytest.fixture(params=["plain", "mean", "sparse"])
def concepts(request):
    if request.param == "sparse":
        return dictionary(40, 3)
    oblique = torch.nn.functional.normalize(draw(2, 24, seed=7))  # a user's own directions need not be orthogonal
    return Concepts(
        [*bases(3, 5), oblique],
        ["a", "b", "c"],
        SOURCE,
        draw(24, seed=9) if request.param == "mean" else None,
        "by hand",
        {"seed": 1},
    )


@pytest.fixture
def features():
    return FeatureMap(draw(2, 24, 3, 4), SOURCE)


def close(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()  # float32 sums


def test_parts_sum_to_the_map(concepts, features):
    parts = concepts.parts(features)
    assert parts.shape == (len(concepts) + 1, *features.values.shape) and close(parts.sum(0), features.values)


def test_a_part_is_its_coefficients_times_its_basis(concepts, features):
    parts = concepts.parts(features)
    for number, basis in enumerate(concepts.bases):
        z = concepts.coefficients(features, number)
        assert z.shape == (2, len(basis), 3, 4) and close(torch.einsum("bdhw,dc->bchw", z, basis), parts[number])
        assert torch.equal(concepts.part(features, number), torch.einsum("bdhw,dc->bchw", z, basis))
    assert close(concepts.coefficients(features, REST), parts[-1]) and close(concepts.part(features, REST), parts[-1])


def test_each_part_lies_in_its_subspace_and_the_rest_is_orthogonal_to_all(features):
    concepts = Concepts(bases(3, 5), ["a", "b"], SOURCE)
    parts = concepts.parts(features)
    for basis, part in zip(concepts.bases, parts):
        along = torch.einsum("dc,bchw->bdhw", basis, part)
        assert close(torch.einsum("dc,bdhw->bchw", basis, along), part)
        assert torch.einsum("dc,bchw->bdhw", basis, parts[-1]).abs().max() < 1e-4
    again = concepts.parts(FeatureMap(parts[0], SOURCE))  # taking apart a part gives the part
    assert close(again[0], parts[0]) and again[1:].abs().max() < 1e-4


def test_a_sparse_code_is_the_largest_of_what_is_positive(features):
    concepts = dictionary(40, 3)
    code = torch.cat([concepts.coefficients(features, i) for i in range(40)], 1)
    x = features.values.movedim(1, -1) - concepts.mean
    every = (x @ concepts.encoder.weight.T + concepts.encoder.bias).relu().movedim(-1, 1)
    assert ((code > 0).sum(1) == 3).all() and close(code[code > 0], every[code > 0])
    few = concepts.encoder.select(torch.tensor([7, 2]))
    assert few.active == 2 and torch.equal(few.weight, concepts.encoder.weight[[7, 2]])
    assert (every.masked_fill(code > 0, 0).amax(1) <= every.masked_fill(code == 0, torch.inf).amin(1)).all()


def test_scaling(concepts, features):
    name = concepts.labels[1]
    for factors in ({name: 1.0}, dict.fromkeys(concepts.names, 1.0)):
        assert torch.equal(concepts.scale(features, factors).values, features.values)
    everything = concepts.scale(features, dict.fromkeys(concepts.names, 0.3))
    assert close(everything.values, 0.3 * features.values)
    parts = concepts.parts(features)
    assert close(concepts.scale(features, {name: 0.25}).values, features.values - 0.75 * parts[1])
    assert close(concepts.scale(features, {REST: 0.25, 0: 2}).values, features.values - 0.75 * parts[-1] + parts[0])


def test_scaling_and_activation_never_hold_all_parts():
    """Hundreds of atoms: the largest tensor on the way is far smaller than all parts, which would be 300 maps."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numbers = max(
                self.numbers, out.numel() if isinstance(out, torch.Tensor) and out.layout == torch.strided else 0
            )
            return out

    source = FeatureSource(**{**SOURCE.to_dict(), "grid": (64, 64)})
    concepts, features = dictionary(300, 8, source), FeatureMap(draw(1, 24, 64, 64), source)
    with Largest() as mode:
        concepts.scale(features, {5: 0.25, REST: 0.5})
        concepts.part(features, 7)
    assert mode.numbers <= 4 * features.values.numel()  # an encoder's chunk of 1024 vectors is three
    with Largest() as mode:
        activation = concepts.activation(features)
    assert mode.numbers <= activation.numel()


def test_concepts_are_named_or_numbered(features):
    concepts = Concepts(bases(3, 5, 2), ["a", "b", "c"], SOURCE)
    assert concepts.names == ["a", "b", "c", REST] and [concepts.index(x) for x in ("b", "1", 1, REST)] == [1, 1, 1, 3]
    for wrong in ("d", "4", -1):
        with pytest.raises(FeatInvError, match="there are 4: 0 a, 1 b, 2 c, 3 rest"):
            concepts.index(wrong)
        with pytest.raises(FeatInvError, match="there are 4"):
            concepts.scale(features, {wrong: 0.5})
        with pytest.raises(FeatInvError, match="there are 4"):
            concepts.coefficients(features, wrong)
    with pytest.raises(FeatInvError, match="there are 41: 0 atom 0, .* 11 atom 11, ..., 40 rest"):
        dictionary(40, 3).index("41")


def test_activation_is_a_share_of_the_longest_vector(concepts, features):
    activation = concepts.activation(features)
    lengths = features.values.norm(dim=1)
    expected = concepts.parts(features).norm(dim=2) / lengths.amax((1, 2), keepdim=True)
    assert activation.shape == (len(concepts) + 1, 2, 3, 4) and close(activation, expected)


def test_files_come_back_bit_for_bit(concepts, features, tmp_path):
    save_concepts(tmp_path / "c.safetensors", concepts)
    again = load_concepts(tmp_path / "c.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.bases, concepts.bases)) and again.labels == concepts.labels
    assert torch.equal(again.parts(features), concepts.parts(features))
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
    with pytest.raises(FeatInvError, match="an encoder of shape \\(3, 24\\) for 2 concepts"):
        Concepts(bases(1, 1), ["a", "b"], SOURCE, encoder=SparseEncoder(torch.zeros(3, 24), torch.zeros(3), 1))
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
    assert affected(distance).tolist() == affected(distance, 1.0).tolist() == [[1.0, 0.0]]
    assert affected(distance, 0.0).all() and normalised(torch.zeros(2, 2)).abs().max() == 0
    with pytest.raises(FeatInvError, match="same seed"):
        difference(original, attenuated[:2])
