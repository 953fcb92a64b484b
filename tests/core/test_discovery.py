"""Discovery: planted subspaces are found, decompositions are complete, relevance is exact, bad input is named."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts import (
    METHODS,
    REST,
    completeness,
    discover,
    discovery,
    load_concepts,
    load_directions,
    save_concepts,
    sparse,
)
from featinv_nodes.core.concepts.discovery import dependent
from featinv_nodes.core.concepts.relevance import class_weights, relevance
from featinv_nodes.core.concepts.statistics import Statistics, concept_statistics, listing, table, top_weights
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.waiting import unchecked

CHANNELS = 48
SOURCE = FeatureSource("net.tag", "last", False, CHANNELS, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
SIZES = {4: 300, 6: 500, 5: 400}  # dimension: vectors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def union(noise=0.0, times=1.0):
    """Planted subspaces [d, C] and vectors [N, C] from them, in a mixed order."""
    g = generator()
    planted = [torch.linalg.qr(torch.randn(CHANNELS, d, generator=g))[0].T for d in SIZES]
    vectors = torch.cat(
        [torch.randn(int(times * n), d, generator=g) @ basis for (d, n), basis in zip(SIZES.items(), planted)]
    )
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
    for basis in concepts.bases if concepts.encoder is None else []:  # a code that is not linear leaves what it leaves
        assert torch.einsum("dc,bchw->bdhw", basis, rest).abs().max() < 1e-5 * features.values.norm(dim=1).max()


def test_files_of_discovered_concepts_come_back(concepts, tmp_path):
    save_concepts(tmp_path / "c.safetensors", concepts)
    again = load_concepts(tmp_path / "c.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.bases, concepts.bases)) and again.settings == concepts.settings


@pytest.mark.parametrize("method", METHODS)
def test_the_same_data_and_seed_give_the_same_concepts(method):
    vectors = union(0.02, 0.3)[1].abs()
    first = discover(vectors, SOURCE, method, 3, seed=5)
    with torch.inference_mode():  # as hosts run
        second = discover(vectors.clone(), SOURCE, method, 3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.bases, second.bases))


def test_the_best_of_several_runs_counts_and_a_direction_points_to_its_largest_channel():
    """k-means as scikit-learn's with as many runs; a principal direction whose sign no solver chooses."""
    points = torch.nn.functional.normalize(torch.randn(80, CHANNELS, generator=generator()))
    own = KMeans(6, n_init=discovery.RUNS, random_state=3).fit(points.numpy()).cluster_centers_
    assert torch.allclose(torch.from_numpy(discovery._centres(points, 6, 3, unchecked)), torch.from_numpy(own))
    assert all(b[0, b.abs().argmax()] > 0 for b in discover(union(0.02, 0.3)[1], SOURCE, "pca", 9).bases)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("method", ["mcd", "mcd-elastic-net"])
def test_planted_subspaces_are_recovered(method, noise):
    """By the cosine of the largest principal angle. Noise of 0.05 a channel turns a subspace of n unit-variance vectors
    by about 0.05 sqrt(C / n), 0.04 at most here; 0.1 (a cosine of 0.995) leaves room for a few in a wrong cluster."""
    planted, vectors = union(noise, 0.3 if method == "mcd-elastic-net" else 1)
    result = discover(vectors, SOURCE, method, 3)
    assert [len(b) for b in result.bases] == sorted(SIZES, key=SIZES.get, reverse=True)  # largest cluster first
    for basis in planted:
        same = next(b for b in result.bases if len(b) == len(basis))
        assert torch.linalg.svdvals(basis @ same.T).min() > 0.995


def test_a_planted_sparse_dictionary_is_recovered():
    """Two of 24 atoms in each vector; 32 are trained, all 24 found to a cosine of 0.95 (seen: 0.97), others fall
    silent."""
    g = generator()
    atoms = torch.nn.functional.normalize(torch.randn(24, CHANNELS, generator=g))
    code = torch.zeros(2000, 24).scatter(
        1, torch.rand(2000, 24, generator=g).topk(2)[1], 1 + torch.rand(2000, 2, generator=g)
    )
    vectors = code @ atoms + torch.randn(CHANNELS, generator=g)
    steps = []
    result = discover(vectors, SOURCE, "sae", 32, active=2, progress=lambda done, total: steps.append((done, total)))
    rows = torch.cat(list(result.bases))
    assert result.encoder.active == 2 and torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    assert (atoms @ rows.T).amax(1).min() > 0.95 and steps[-1][0] == steps[-1][1]
    features = FeatureMap(
        vectors[:24].T.reshape(1, CHANNELS, 24, 1), FeatureSource(**{**SOURCE.to_dict(), "grid": (24, 1)})
    )
    known = replace(result, source=features.source)
    left = known.part(features, REST) - result.mean[:, None, None]
    assert left.norm() < 0.3 * (features.values - result.mean[:, None, None]).norm()
    energy = known.lengths(features).square().sum((1, 2, 3))
    assert energy[:8].sum() > energy[-9:-1].sum()  # the largest first
    assert result.settings["rejected"] == [f"{32 - len(result)} of 32 atoms: never active"]


def test_a_sparse_dictionary_knows_no_unit_of_length(monkeypatch):
    """Vectors 64 times as long, exactly, have the same atoms and coefficients 64 times as large."""
    monkeypatch.setattr(sparse, "STEPS", 50)
    vectors = union(0.02, 0.3)[1]
    one, other = (discover(vectors * factor, SOURCE, "sae", 16, active=3) for factor in (1, 64))
    features = FeatureMap(torch.randn(2, CHANNELS, 3, 4, generator=generator(1)), SOURCE)
    assert one.encoder.bias.abs().max() > 0.01
    assert close(other.lengths(features.with_values(64 * features.values)), 64 * one.lengths(features))


def test_silent_atoms_are_trained_on_what_is_left():
    x, g = torch.randn(20, CHANNELS, generator=generator()), generator(1)
    decoder, weight = torch.randn(6, CHANNELS, generator=g), torch.randn(6, CHANNELS, generator=g).requires_grad_()
    bias = torch.tensor([100.0] * 4 + [0.0] * 2)  # the last are never among the largest two
    for silent, reached in (([False] * 6, 4), ([False] * 4 + [True] * 2, 6)):
        loss, seen = sparse._loss(x, decoder, weight, bias, 2, torch.tensor(silent))
        (gradient,) = torch.autograd.grad(loss, weight)
        assert seen.tolist() == [True] * 4 + [False] * 2 and (gradient.norm(dim=1) > 0).sum() == reached


def test_clusters_grow_until_the_concepts_are_complete(monkeypatch):
    """For a class of which 0.6 lies in the planted subspaces; the affinity is computed once, however far it goes."""
    planted, vectors = union()
    inside, outside = sum(b[0] for b in planted), torch.linalg.svd(torch.cat(planted))[2][-1]
    weights = (0.6 * inside / inside.norm() + 0.8 * outside)[:, None]
    calls = []
    for complete, last in ((0.5, 2), (0.7, 4)):
        monkeypatch.setattr(discovery, "COMPLETE", complete)
        monkeypatch.setattr(discovery, "MOST_CLUSTERS", 4)
        calls.clear()
        grown = discover(vectors, SOURCE, concepts=0, weights=weights, progress=lambda done, total: calls.append(done))
        way = grown.settings["grown"]
        assert [clusters for clusters, _ in way] == list(range(2, last + 1)) and calls == sorted(calls)
        assert way[-1][1] == pytest.approx(completeness(grown.bases, weights).mean().item(), abs=1e-4)
    with pytest.raises(FeatInvError, match="give a number of them for pca"):
        discover(vectors, SOURCE, "pca", concepts=0, weights=weights)
    with pytest.raises(FeatInvError, match="with the weights of classes"):
        discover(vectors, SOURCE, concepts=0)


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
    result = discover(torch.cat([vectors, stray]), SOURCE, concepts=4)
    assert len(result) == 3 and result.settings["rejected"] == ["cluster of 22 of 1222 vectors: under 2 %"]


def test_directions_in_the_span_of_earlier_ones_are_dropped():
    a, b = torch.linalg.qr(torch.randn(CHANNELS, 2, generator=generator()))[0].T
    assert dependent(torch.stack([a, b, (a + b) / 2**0.5, torch.zeros(CHANNELS)])) == [2, 3]


def test_vectors_without_length_do_no_harm():
    planted, vectors = union()
    result = discover(torch.cat([vectors, torch.zeros(200, CHANNELS)]), SOURCE, concepts=3)
    assert [len(b) for b in result.bases] == [6, 5, 4]


def test_bad_input():
    vectors = union(0.02)[1]
    cases = [
        (vectors[:40], "mcd", 3, "40 vectors of 48 channels"),
        (vectors, "mcd", 1, "1 concepts by mcd; expected 2 to 47"),
        (vectors, "pca", 48, "expected 1 to 47"),
        (vectors * 0 + 3, "mcd", 3, "all feature vectors are alike"),
        (vectors, "sae", 1201, "expected 1 to 1200"),
        (vectors, "nmf", 0, "give a number of them for nmf"),
        (vectors[:40], "sae", 3, "40 vectors of 48"),
        (vectors * float("nan"), "pca", 3, "NaN"),
        (vectors, "nmf", 3, "without negative values"),
        (vectors, "magic", 3, "expected one of mcd, "),
        (vectors[:, :5], "mcd", 3, "expected \\[N, 48\\]"),
        (
            torch.randn(1200, 1, generator=generator()) * vectors[0] + 1e-4 * vectors,
            "mcd",
            2,
            "fewer than two clusters",
        ),
    ]
    for given, method, count, words in cases:
        with pytest.raises(FeatInvError, match=words):
            discover(given, SOURCE, method, count)


def test_a_number_of_active_atoms_is_for_sparse_dictionaries():
    for method, active in (("pca", 2), ("sae", 4), ("sae", 0)):
        with pytest.raises(FeatInvError, match=f"{active} active atoms by {method}; expected 1 to 3, by sae"):
            discover(union()[1], SOURCE, method, 3, active=active)


def test_own_directions(tmp_path):
    file = tmp_path / "own.safetensors"
    save_file(
        {"sky": torch.randn(CHANNELS, generator=generator()), "paw": torch.randn(3, CHANNELS, generator=generator(1))},
        file,
    )
    own = load_directions(file, SOURCE)
    assert {n: len(b) for n, b in zip(own.labels, own.bases)} == {"sky": 1, "paw": 3} and own.names[-1] == REST
    save_file({"directions": torch.randn(5, CHANNELS, generator=generator()) / 100}, file)  # of any length
    assert [b.norm().item() for b in load_directions(file, SOURCE).bases] == pytest.approx([1] * 5)
    for wrong, words in (
        (torch.ones(2, 7), "expected \\[d, 48\\]"),
        (torch.ones(2, CHANNELS), "none in the span"),
        (torch.zeros(1, CHANNELS), "no row zero"),
    ):
        save_file({"x": wrong}, file)
        with pytest.raises(FeatInvError, match=words):
            load_directions(file, SOURCE)
    with pytest.raises(FeatInvError, match="file of directions .* does not exist"):
        load_directions(tmp_path / "none.safetensors", SOURCE)


def test_own_autoencoder(tmp_path):
    file, g = tmp_path / "own.safetensors", generator()
    given = {
        "decoder": torch.randn(90, CHANNELS, generator=g),
        "encoder": torch.randn(90, CHANNELS, generator=g),
        "bias": torch.randn(90, generator=g),
        "mean": torch.randn(CHANNELS, generator=g),
    }
    save_file(given, file, {"k": "4"})
    own = load_directions(file, SOURCE)
    features = FeatureMap(torch.randn(2, CHANNELS, 3, 4, generator=g), SOURCE)
    every = ((features.values.movedim(1, -1) - given["mean"]) @ given["encoder"].T + given["bias"]).relu()
    code = torch.where(every >= every.topk(4)[0][..., -1:], every, 0)
    expected = features.values - (code @ given["decoder"]).movedim(-1, 1)
    assert len(own) == 90 and close(own.part(features, REST), expected)
    save_concepts(tmp_path / "c.safetensors", own)
    assert torch.equal(load_concepts(tmp_path / "c.safetensors").parts(features), own.parts(features))
    save_file({key: given[key].half() for key in ("decoder", "encoder")}, file)  # a plain ReLU autoencoder
    assert load_directions(file, SOURCE).encoder.active == 90
    bad = {
        "'encoder' has the shape \\(90, 47\\); expected \\[90, 48\\]": {"encoder": torch.zeros(90, 47)},
        "'bias'": {"bias": torch.zeros(3)},
        "'mean' .* finite": {"mean": torch.full((CHANNELS,), torch.nan)},
        "whole number from 1 to 90": {"k": torch.tensor(91)},
    }
    for words, changes in bad.items():
        save_file({**given, **changes}, file)
        with pytest.raises(FeatInvError, match=words):
            load_directions(file, SOURCE)
    save_file(given, file, {"k": "many"})
    with pytest.raises(FeatInvError, match="k, the number of active atoms, is many"):
        load_directions(file, SOURCE)


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
    some, _ = relevance(backbone, concepts, features, torch.tensor([[3], [0], [6]]))
    assert torch.equal(some[..., 0], contributions[:, [0, 1, 2], [3, 0, 6]])


def test_a_head_that_reads_the_class_token_has_no_relevance():
    backbone = network("test_vit", global_pool="token", img_size=64)
    features = backbone(torch.rand(3, 3, *backbone.input_size, generator=generator()))
    concepts = discover(torch.randn(400, features.source.channels, generator=generator(1)), features.source, "pca", 5)
    for asked in (lambda: relevance(backbone, concepts, features), lambda: class_weights(backbone, features)):
        with pytest.raises(FeatInvError, match="reads the class token, not the map"):
            asked()
    result = concept_statistics(backbone, concepts, features)
    assert result.relevance == [] and result.completeness is None and result.remark.startswith("no relevance: ")


def test_a_listing_says_what_the_table_does():
    """On a node, whose lines are short, and on the command line."""
    source = FeatureSource("resnet10t", "last", False, 3, (2, 2), (64, 64), (0.5,) * 3, (0.5,) * 3)
    concepts = discover(torch.randn(40, 3, generator=generator()), source, "pca", 2)
    result = Statistics([0.5, 0.25, 0.3], [0.6, 0.3, 0.1], 0.9, {"cat": [2.0, 0.01, 0.5]})
    assert listing(concepts, result).splitlines() == [
        "0 concept 0: dimension 1, 50.0% of the norm, relevance 60.0%, adds most to cat +2.0",
        "1 concept 1: dimension 1, 25.0% of the norm, relevance 30.0%",
        "2 rest: dimension 1, 30.0% of the norm, relevance 10.0%, adds most to cat +0.5",
    ]
    assert [line.split() for line in table(concepts, result).splitlines()[1:]] == [
        ["0", "concept", "0", "1", "50.0%", "60.0%", "cat", "+2.0"],
        ["1", "concept", "1", "1", "25.0%", "30.0%"],
        ["2", "rest", "1", "30.0%", "10.0%", "cat", "+0.5"],
    ]
    assert "relevance" not in listing(concepts, Statistics(result.share))  # not known


def test_statistics_add_up():
    """Shares are those of the parts; what concepts and rest add to a class's logit is that logit, less the bias."""
    backbone = network("resnet10t", channels=[8, 8, 16, 24])
    features = backbone(torch.rand(8, 3, *backbone.input_size, generator=generator()))
    concepts = discover(torch.randn(96, 24, generator=generator(1)), features.source, "pca", 5)
    result = concept_statistics(backbone, concepts, features)
    logits, parts = backbone.logits(features), concepts.parts(features)
    contributions, bias = relevance(backbone, concepts, features)
    tops = logits.argmax(1)
    assert set(result.classes) == {f"class {c}" for c in tops.tolist()} and sum(result.relevance) == pytest.approx(
        1, abs=1e-4
    )
    for c in tops.unique().tolist():
        assert sum(result.classes[f"class {c}"]) == pytest.approx((logits - bias)[tops == c, c].mean().item(), rel=1e-3)
        added = contributions[:, tops == c, c].mean(1)
        assert result.classes[f"class {c}"] == pytest.approx(added.tolist(), abs=1e-4 * added.abs().max().item())
    assert result.share == pytest.approx(
        (parts.norm(dim=2).sum((1, 2, 3)) / features.values.norm(dim=1).sum()).tolist(), rel=1e-4
    )
    assert result.completeness == pytest.approx(
        completeness(concepts.bases, top_weights(backbone, features)).mean().item(), abs=1e-5
    )


def test_a_concept_speaks_for_the_classes_to_which_it_adds_most():
    added = {"cat": [0.04, 2.0], "dog": [1.0, -3.0], "fox": [0.5, 0.0], "owl": [3.0, 0.05], "hen": [0.2, -1.0]}
    known = Statistics([0.5, 0.5], classes=added)
    assert known.speaks_for(0) == [("owl", 3.0), ("dog", 1.0), ("fox", 0.5)]
    assert known.speaks_for(0, 9)[-1] == ("hen", 0.2) and known.speaks_for(1) == [("cat", 2.0)]
    assert known.classes_of(0) == "owl +3.0, dog +1.0, fox +0.5"


def test_completeness_is_the_share_of_the_weights_in_the_span():
    planted, _ = union()
    inside, outside = planted[0][0], torch.linalg.svd(torch.cat(planted))[2][-1]
    own = discover(union()[1], SOURCE, concepts=3)
    eta = completeness(own.bases, torch.stack([inside, outside, 3 * inside + 4 * outside], 1))
    assert torch.allclose(eta, torch.tensor([1.0, 0.0, 0.6]), atol=1e-3)


def test_a_head_with_an_activation_is_refused():
    backbone = network("mobilenetv3_small_050")
    features = backbone(torch.rand(1, 3, *backbone.input_size, generator=generator()))
    c = features.source.channels
    concepts = discover(torch.randn(2 * c, c, generator=generator(1)), features.source, "pca", 3)
    with pytest.raises(FeatInvError, match="not pool, norm and a linear layer"):
        relevance(backbone, concepts, features)
