"""Discovery: planted subspaces are found, decompositions are complete, relevance is exact, bad input is named."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts import METHODS, REST, discover, load_concepts, own_directions, save_concepts
from featinv_nodes.core.concepts.discovery import dependent
from featinv_nodes.core.concepts.relevance import class_weights, completeness, relevance
from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, FeatureSource

CHANNELS = 48
SOURCE = FeatureSource("net.tag", "last", False, CHANNELS, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
SIZES = {4: 300, 6: 500, 5: 400}  # dimension: vectors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def union(noise=0.0, times=1.0):
    """Planted subspaces [d, C] and vectors [N, C] from them, in a mixed order."""
    g = generator()
    planted = [torch.linalg.qr(torch.randn(CHANNELS, d, generator=g))[0].T for d in SIZES]
    vectors = torch.cat([torch.randn(int(times * n), d, generator=g) @ basis for (d, n), basis in zip(SIZES.items(), planted)])
    vectors += noise * torch.randn(vectors.shape, generator=g)
    return planted, vectors[torch.randperm(len(vectors), generator=g)]


def close(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()  # float32 sums


@pytest.fixture(params=METHODS)
def concepts(request):
    vectors = union(0.02, 0.3)[1]
    return discover(vectors.abs() if request.param in ("nmf", "kmeans") else vectors, SOURCE, request.param, 3)


def test_every_method_decomposes_completely(concepts):
    features = FeatureMap(torch.randn(2, CHANNELS, 3, 4, generator=generator(1)), SOURCE)
    parts = concepts.parts(features)
    assert len(concepts) == 3 and close(parts.sum(0), features.values)
    assert torch.equal(concepts.scale(features, dict.fromkeys(concepts.names, 1.0)).values, features.values)
    assert close(concepts.scale(features, dict.fromkeys(concepts.names, 0.3)).values, 0.3 * features.values)
    rest = parts[-1] if concepts.mean is None else parts[-1] - concepts.mean[:, None, None]
    for basis in concepts.bases:
        assert torch.einsum("dc,bchw->bdhw", basis, rest).abs().max() < 1e-5 * features.values.norm(dim=1).max()


def test_files_of_discovered_concepts_come_back(concepts, tmp_path):
    save_concepts(tmp_path / "c.safetensors", concepts)
    again = load_concepts(tmp_path / "c.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.bases, concepts.bases)) and again.settings == concepts.settings


@pytest.mark.parametrize("method", METHODS)
def test_the_same_data_and_seed_give_the_same_concepts(method):
    vectors = union(0.02, 0.3)[1].abs()
    first, second = (discover(vectors, SOURCE, method, 3, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.bases, second.bases))


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("method", ["mcd", "mcd-elastic-net"])
def test_planted_subspaces_are_recovered(method, noise):
    """By the cosine of the largest principal angle. Noise of 0.05 a channel turns a subspace of n unit-variance vectors
    by about 0.05 sqrt(C / n), 0.04 at most here; 0.1 (a cosine of 0.995) leaves room for a few in a wrong cluster."""
    planted, vectors = union(noise, 0.3 if method == "mcd-elastic-net" else 1)
    found = discover(vectors, SOURCE, method, 3)
    assert [len(b) for b in found.bases] == sorted(SIZES, key=SIZES.get, reverse=True)  # largest cluster first
    for basis in planted:
        same = next(b for b in found.bases if len(b) == len(basis))
        assert torch.linalg.svdvals(basis @ same.T).min() > 0.995


def test_centred_bases_follow_the_spread_about_the_mean():
    g = generator()
    one, two = torch.linalg.qr(torch.randn(CHANNELS, 6, generator=g))[0].T.split(3)
    vectors = torch.cat([b[0] * 5 + torch.randn(300, 2, generator=g) @ b[1:] for b in (one, two)])
    vectors += 0.01 * torch.randn(vectors.shape, generator=g)
    plain, centred = (discover(vectors, SOURCE, concepts=2, centred=c) for c in (False, True))
    along = torch.stack([one[0], two[0]])
    assert min((b @ along.T).abs().max() for b in plain.bases) > 0.95  # the mean is the largest direction
    assert max((b @ along.T).abs().max() for b in centred.bases) < 0.3


def test_collapsed_clusters_are_reported_and_not_returned():
    planted, vectors = union()
    stray = torch.randn(22, 1, generator=generator(3)) * torch.randn(CHANNELS, generator=generator(4))
    found = discover(torch.cat([vectors, stray]), SOURCE, concepts=4)
    assert len(found) == 3 and found.settings["rejected"] == ["cluster of 22 of 1222 vectors: under 2 %"]


def test_directions_in_the_span_of_earlier_ones_are_dropped():
    a, b = torch.linalg.qr(torch.randn(CHANNELS, 2, generator=generator()))[0].T
    assert dependent(torch.stack([a, b, (a + b) / 2**0.5, torch.zeros(CHANNELS)])) == [2, 3]


def test_vectors_without_length_do_no_harm():
    planted, vectors = union()
    found = discover(torch.cat([vectors, torch.zeros(200, CHANNELS)]), SOURCE, concepts=3)
    assert [len(b) for b in found.bases] == [6, 5, 4]


def test_bad_input():
    vectors = union(0.02)[1]
    cases = [
        (vectors[:40], "mcd", 3, "40 vectors of 48 channels"), (vectors, "mcd", 1, "1 concepts by mcd; expected 2 to 47"),
        (vectors, "pca", 48, "expected 1 to 47"), (vectors * 0 + 3, "mcd", 3, "all feature vectors are alike"),
        (vectors * float("nan"), "pca", 3, "NaN"), (vectors, "nmf", 3, "without negative values"),
        (vectors, "magic", 3, "expected one of mcd, "), (vectors[:, :5], "mcd", 3, "expected \\[N, 48\\]"),
        (torch.randn(1200, 1, generator=generator()) * vectors[0] + 1e-4 * vectors, "mcd", 2, "single cluster"),
    ]
    for given, method, count, words in cases:
        with pytest.raises(FeatInvError, match=words):
            discover(given, SOURCE, method, count)


def test_own_directions(tmp_path):
    file = tmp_path / "own.safetensors"
    save_file({"sky": torch.randn(CHANNELS, generator=generator()), "paw": torch.randn(3, CHANNELS, generator=generator(1))}, file)
    own = own_directions(file, SOURCE)
    assert {n: len(b) for n, b in zip(own.labels, own.bases)} == {"sky": 1, "paw": 3} and own.names[-1] == REST
    save_file({"directions": torch.randn(5, CHANNELS, generator=generator())}, file)
    assert [len(b) for b in own_directions(file, SOURCE).bases] == [1] * 5
    for wrong, words in ((torch.ones(2, 7), "expected \\[d, 48\\]"), (torch.ones(2, CHANNELS), "none in the span"), (torch.zeros(1, CHANNELS), "no row zero")):
        save_file({"x": wrong}, file)
        with pytest.raises(FeatInvError, match=words):
            own_directions(file, SOURCE)
    with pytest.raises(FeatInvError, match="missing"):
        own_directions(tmp_path / "none.safetensors", SOURCE)


def network(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments)
    for parameter in model.parameters():  # timm starts norms at one and biases at zero, which would hide a mistake
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0, 0.2)
    return Backbone(model, name)


HEADS = {
    "linear": ("resnet10t", {"channels": [8, 8, 16, 24]}),
    "layer norm in the head": ("test_convnext", {}),
    "tokens, layer norm in the head": ("test_vit", {"global_pool": "avg", "img_size": 64}),
}


@pytest.mark.parametrize("head", HEADS)
def test_relevance_sums_to_the_logits_exactly(head):
    name, arguments = HEADS[head]
    backbone = network(name, **arguments)
    features = backbone(torch.rand(3, 3, *backbone.input_size, generator=generator()))
    g, c = generator(1), features.source.channels
    concepts = discover(torch.randn(4 * c, c, generator=g), features.source, "pca", 5)
    contributions, bias = relevance(backbone, concepts, features)
    assert contributions.shape == (6, 3, 7) and close(contributions.sum(0) + bias, backbone.logits(features))
    weights = class_weights(backbone, features)
    expected = concepts.parts(features)[:-1, 0].mean((2, 3)) @ weights  # w . phi_i, in the first picture's own scale
    assert (contributions[:-1, 0] - expected).norm() <= 1e-4 * expected.norm()


def test_completeness_is_the_share_of_the_weights_in_the_span():
    planted, _ = union()
    inside, outside = planted[0][0], torch.linalg.svd(torch.cat(planted))[2][-1]
    own = discover(union()[1], SOURCE, concepts=3)
    eta = completeness(own, torch.stack([inside, outside, 3 * inside + 4 * outside], 1))
    assert torch.allclose(eta, torch.tensor([1.0, 0.0, 0.6]), atol=1e-3)


def test_a_head_with_an_activation_is_refused():
    backbone = network("mobilenetv3_small_050")
    features = backbone(torch.rand(1, 3, *backbone.input_size, generator=generator()))
    c = features.source.channels
    concepts = discover(torch.randn(2 * c, c, generator=generator(1)), features.source, "pca", 3)
    with pytest.raises(FeatInvError, match="not pool, norm and a linear layer"):
        relevance(backbone, concepts, features)
