"""The measures of an evaluation are what they are called: against plain references on a handful of vectors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.metrics import frechet_distance
from featinv_nodes.worlds import open_backbone
from training.evaluation import metrics
from training.evaluation.context import EvalContext, ModelSpec, ModelUnderTest
from training.evaluation.evaluator import Evaluator, Features
from training.evaluation.inception import Inception
from training.evaluation.metrics import kid, mean_entry, set_entries
from training.evaluation.sources import open_source
from training.evaluation.spaces import scaled

SOURCE = FeatureSource("net", "last", False, 5, (2, 3), (8, 8), (0.0,) * 3, (1.0,) * 3)


def vectors(seed, n=7, size=4, shift=0.0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)) + shift


def kernel(x, y):
    return (float(np.dot(x, y)) / len(x) + 1) ** 3


def mean_of(pairs):
    values = [kernel(x, y) for x, y in pairs]
    return sum(values) / len(values)


def plain_kid(a, b, paired):
    def within(v):
        return mean_of((v[i], v[j]) for i in range(len(v)) for j in range(len(v)) if i != j)

    return (
        within(a)
        + within(b)
        - 2 * mean_of((a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if not paired or i != j)
    )


def test_kid_is_the_mean_of_the_kernel_over_pairs(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 4)  # the matrix comes in parts, the last one smaller
    a, b = vectors(0), vectors(1, 9, shift=0.5)
    # 1e-9: float64 sums of 63 terms around 1 to 100
    assert kid(a, b).item() == pytest.approx(plain_kid(a.double().numpy(), b.double().numpy(), False), rel=1e-9)
    assert kid(a, b[:7], True).item() == pytest.approx(
        plain_kid(a.double().numpy(), b[:7].double().numpy(), True), rel=1e-9
    )


def test_a_resample_counts_its_pairs_and_never_a_copy():
    a, b, picks = vectors(0).double(), vectors(1, shift=0.5).double(), [0, 0, 3, 5, 5, 5, 6]
    pairs = [(i, j) for i in picks for j in picks if i != j]
    expected = (
        mean_of((a[i], a[j]) for i, j in pairs)
        + mean_of((b[i], b[j]) for i, j in pairs)
        - 2 * mean_of((a[i], b[j]) for i, j in pairs)
    )
    weights = torch.bincount(torch.tensor(picks), minlength=7)
    assert kid(a, b, True, torch.stack([weights, torch.ones(7)]))[0].item() == pytest.approx(expected, rel=1e-9)


def test_kid_is_near_zero_for_one_distribution_and_copies_do_not_make_it_negative():
    a = vectors(0, 400)
    assert abs(kid(a, vectors(1, 400)).item()) < 0.05 < kid(a, vectors(2, 400, shift=1.0)).item()
    assert kid(a, a, True).item() == pytest.approx(0, abs=1e-9)  # the same set: nothing between, whatever its size


def test_frechet_distance_and_the_names_of_the_figures(monkeypatch):
    a, b = vectors(0, 60), vectors(1, 60, shift=0.3)
    entries = set_entries("net, pooled", a, b)
    assert set(entries) == {"frechet_distance (net, pooled)", "kid (net, pooled)", "kid_paired (net, pooled)"}
    x, y = a.double().numpy(), b.double().numpy()
    # 1e-9: float64 sums of a few thousand terms around 1 to 100
    assert entries["kid (net, pooled)"]["value"] == pytest.approx(plain_kid(x, y, False), rel=1e-9)
    assert entries["kid_paired (net, pooled)"]["value"] == pytest.approx(plain_kid(x, y, True), rel=1e-9)
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    result = entries["frechet_distance (net, pooled)"]
    assert result["value"] == pytest.approx(expected, rel=1e-6) and result["biased"] and result["n"] == 60
    assert entries["kid_paired (net, pooled)"]["value"] == pytest.approx(plain_kid(x, y, True), rel=1e-9)
    assert "biased" not in entries["kid (net, pooled)"] and result["low"] < result["value"] < result["high"]
    assert set(set_entries("Inception", a, b)) == {"fid", "kid (Inception)", "kid_paired (Inception)"}
    assert not set_entries("net", a[:7], b[:7])  # too few to say anything
    assert metrics.ENOUGH == 2048  # FID's number of channels
    monkeypatch.setattr(metrics, "ENOUGH", 8)  # enough, but not where vectors are longer
    few = [set_entries("net", v, v)["frechet_distance (net)"]["biased"] for v in (a[:8], vectors(0, 8, 9))]
    assert few == [False, True]


@pytest.mark.parametrize("name", ["frechet_distance (net)", "kid (net)", "kid_paired (net)"])
def test_the_intervals_of_distances_are_of_95_per_cent(name):
    """1.96 standard deviations to either side, over resamples of the pairs; these are our own 400, with other numbers.
    The deviation of a hundred is known to 7 %."""
    a, b, n = vectors(0, 60), vectors(1, 60, shift=0.3), 60
    picks = torch.randint(n, (400, n), generator=torch.Generator().manual_seed(1))
    if name.startswith("kid"):
        resampled = kid(a, b, "paired" in name, torch.stack([torch.bincount(p, minlength=n) for p in picks]))
    else:
        resampled = torch.tensor([frechet_distance(a[p], b[p]) for p in picks])
    entry = set_entries("net", a, b)[name]
    assert (entry["high"] - entry["low"]) / 2 / resampled.std().item() == pytest.approx(1.96, rel=0.25)


def test_the_distances_are_torch_fidelitys():  # FID and KID as published, on any features
    from torch_fidelity import metric_fid as fid
    from torch_fidelity import metric_kid as own

    a, b = vectors(0, 60).double(), vectors(1, 60, shift=0.3).double()
    entries = set_entries("Inception", a, b)
    expected = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(a), fid.fid_features_to_statistics(b), False)
    assert entries["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    expected = own.kid_features_to_metric(
        a, b, kid_subsets=1, kid_subset_size=60, verbose=False
    )  # one subset: all vectors
    assert entries["kid (Inception)"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert kid(a, b).item() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)


def test_kid_of_many_vectors_is_the_published_mean_over_subsets(monkeypatch):
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = vectors(0, 60).double(), vectors(1, 60, shift=0.3).double()
    assert (metrics.SUBSETS, metrics.SUBSET) == (100, 1000)  # Binkowski et al. 2018
    monkeypatch.setattr(metrics, "SUBSETS", 3)
    monkeypatch.setattr(metrics, "SUBSET", 20)
    expected = kid_features_to_metric(a, b, kid_subsets=3, kid_subset_size=20, verbose=False)
    assert set_entries("Inception", a, b)["kid (Inception)"]["value"] == expected["kernel_inception_distance_mean"]


def test_inceptions_file_is_named_when_it_cannot_be_used(tmp_path):
    with pytest.raises(
        FeatInvError,
        match="no such file. python3 run.py download inception .* https://github.com/toshas/torch-fidelity",
    ):
        Inception(tmp_path / "none.pth")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(FeatInvError, match="does not hold"):
        Inception(tmp_path / "other.pth")
    torch.save({"a": tmp_path}, tmp_path / "foreign.pth")  # an object of Python's: such a file could run code
    with pytest.raises(FeatInvError, match="objects besides tensors"):
        Inception(tmp_path / "foreign.pth")


def test_inception_sees_the_bytes_that_a_png_file_of_the_picture_has(tmp_path):  # as torch-fidelity reads folders
    inception, picture = object.__new__(Inception), torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    inception._network, inception._device = lambda seen: (seen,), "cpu"
    Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    dataset = ImagesPathDataset([str(tmp_path / "a.png")], TransformPILtoRGBTensor())
    assert torch.equal(inception(picture)[0], dataset[0].float())


def test_without_torch_fidelity_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    context = EvalContext(open_source("drawn", 9))
    for needs in (
        lambda: Inception(tmp_path / "none.pth"),
        lambda: set_entries("net", vectors(0, 9), vectors(1, 9)),
        lambda: context.spaces(ModelSpec("tiny_cnn_last")),  # before any picture is drawn
    ):
        with pytest.raises(FeatInvError, match="pip install torch-fidelity"):
            needs()


def test_sets_are_brought_to_one_size_without_aliasing_or_overshoot():
    stripes, edge = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 8, 8)
    stripes[..., ::3], edge[..., 4:] = 1, 1
    assert (scaled(stripes, 8) - 1 / 3).abs().max() < 0.1  # single pixels would give 0 or 1
    assert scaled(edge, 32).min() == 0 and scaled(edge, 32).max() == 1 and scaled(edge, 8) is edge


def test_samples_of_one_picture_share_no_noise_with_other_pictures():
    context = SimpleNamespace(seed_of=lambda n: n + 5, open=lambda _: SimpleNamespace(noise=lambda seeds: seeds))
    tested, originals = SimpleNamespace(context=context, spec=None), SimpleNamespace(numbers=[0, 7])
    assert ModelUnderTest.start(tested, originals) == [5, 12]
    assert ModelUnderTest.start(tested, originals, 2) == [2_000_005, 2_000_012]


def measures_of(subset=None, groups=None):
    backbone = SimpleNamespace(groups=groups or {"class": slice(None)}, has_classes=True, last_map="a map")
    evaluator = Evaluator(backbone, {"cosine": ("last", False)}, subset)
    seen = []
    for seed in (0, 1):
        values = torch.rand(4, 5, 2, 3, generator=torch.Generator().manual_seed(seed))
        seen.append(Features({"cosine": FeatureMap(values, SOURCE)}, vectors(seed + 10, 4, 12)))
    return evaluator, *seen


def plain_match(a, b, k):
    return [float(np.argmax(x) in np.argsort(-y)[:k]) for x, y in zip(a.numpy(), b.numpy())]


def test_cosine_and_match_of_a_judge():
    evaluator, expected, result = measures_of()
    evaluator.centres = {"cosine": evaluator.means(expected)["cosine"].mean(0)}
    columns = evaluator.compare(expected, result)
    a, b = (s.maps["cosine"].values.numpy() for s in (expected, result))
    for name, centre in (("cosine", 0), ("cosine_centred", a.mean((0, 2, 3))[:, None, None])):
        x, y = a - centre, b - centre
        plain = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
        assert np.allclose(columns[name], plain.mean((1, 2)), atol=1e-6)  # float32
    for k in (1, 5):
        assert columns[f"top{k}_match"].tolist() == plain_match(expected.logits, result.logits, k)


def test_a_match_among_five_counts_the_fifth_and_not_the_sixth():
    evaluator, expected, result = measures_of()
    target, ranks = torch.zeros(4, 12), torch.tensor([1, 2, 5, 6])
    target[:, 3] = 1
    pred = torch.arange(12.0).expand(4, -1).clone()
    pred[:, 3] = 11.5 - ranks + (ranks < 9).float()  # above 12 - rank others
    columns = evaluator.compare(Features(expected.maps, target), Features(result.maps, pred))
    assert columns["top1_match"].tolist() == [1, 0, 0, 0] and columns["top5_match"].tolist() == [1, 1, 1, 0]


def test_an_evaluator_compares_the_layers_and_means_that_it_is_asked_for():
    backbone, pictures = open_backbone("tiny-cnn"), torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    asked = {"cosine": ("last", False), "mean": ("last", True), "stage": ("layer2", False)}
    maps = Evaluator(backbone, asked).extract(pictures).maps
    whole = backbone.preprocess(pictures, "stretch")
    for name, (layer, pooled) in asked.items():
        expected = backbone.extract(whole, layer, pooled)
        assert maps[name].source == expected.source and torch.allclose(maps[name].values, expected.values, atol=1e-5)


def test_a_subset_of_the_classes_and_several_groups():
    evaluator, expected, result = measures_of(subset=[1, 4, 7])
    assert evaluator.compare(expected, result)["top1_match"].tolist() == plain_match(
        expected.logits[:, [1, 4, 7]], result.logits[:, [1, 4, 7]], 1
    )
    evaluator, expected, result = measures_of(groups={"shape": slice(0, 6), "colour": slice(6, 12)})
    columns = evaluator.compare(expected, result, torch.tensor([True, False, True, True]))
    assert columns["top1_match"].tolist() == plain_match(expected.logits[:, :6], result.logits[:, :6], 1)
    colour = columns["colour_match_single"]
    assert colour.isnan().tolist() == [False, True, False, False]
    kept = [v for v, s in zip(plain_match(expected.logits[:, 6:], result.logits[:, 6:], 1), (1, 0, 1, 1)) if s]
    assert mean_entry(colour)["n"] == 3 and mean_entry(colour)["value"] == pytest.approx(sum(kept) / 3)
