"""Long work can be stopped: it asks often, and what the asking raises ends it, even within a call of a library."""

from threading import Event

import pytest
import scipy.sparse.linalg
import sklearn.cluster
import sklearn.decomposition
import torch
from PIL import Image

from featinv_nodes.core import waiting
from featinv_nodes.core.concepts import METHODS, Concepts, discover, discovery, sparse, statistics
from featinv_nodes.core.concepts.collect import Folder, Pictures, collect
from featinv_nodes.core.concepts.sparse import SparseEncoder
from featinv_nodes.core.concepts.statistics import concept_statistics
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.viz import edit, measure_slopes
from featinv_nodes.core.waiting import attended
from featinv_nodes.worlds import open_backbone

CHANNELS = 24
SOURCE = FeatureSource("net.tag", "last", False, CHANNELS, (3, 4), (96, 128), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


class Stop(BaseException):
    """What a host raises."""


class Asked:
    """A progress function, or a check, that raises from its `last` call on; counts its calls."""

    def __init__(self, last: int = 10**9) -> None:
        self.calls, self.last = 0, last

    def __call__(self, *_: int) -> None:
        self.calls += 1
        if self.calls >= self.last:
            raise Stop


def vectors(count=150):
    g = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(count, d, generator=g) @ torch.randn(d, CHANNELS, generator=g) for d in (2, 3)]).abs()


def stops_at_once(work, monkeypatch):
    """work(progress) ends with the call that raises, whichever it is: nothing goes on behind it. -> how often it asks,
    without what it asks while it waits for a library, which is as often as that takes."""
    monkeypatch.setattr(waiting, "EVERY", 60)  # seconds: not once
    asked = Asked()
    work(asked)
    for last in {1, asked.calls // 2, asked.calls} - {0}:
        stopped = Asked(last)
        with pytest.raises(Stop):
            work(stopped)
        assert stopped.calls == last
    return asked.calls


@pytest.mark.parametrize("method", METHODS)
def test_discovery_asks_often(method, monkeypatch):
    """For each step of training, each vector of the elastic net, each run of k-means, each call of a library."""
    monkeypatch.setattr(sparse, "STEPS", 6)
    x = vectors(30)
    least = {"sae": 6, "mcd-elastic-net": len(x), "kmeans": 4}.get(method, 2)
    assert stops_at_once(lambda progress: discover(x, SOURCE, method, 3, progress=progress), monkeypatch) >= least


LONG = {
    "nmf": (sklearn.decomposition.NMF, "fit", {"method": "nmf"}),
    "kmeans": (sklearn.cluster.KMeans, "fit", {"method": "kmeans"}),
    "pca": (torch.linalg, "eigh", {"method": "pca"}),
    "the principal directions": (torch.linalg, "eigh", {}),
    "the eigenvectors": (scipy.sparse.linalg, "eigsh", {}),
    "the clusters": (sklearn.cluster.KMeans, "fit_predict", {}),
    "the neighbours": (torch.Tensor, "topk", {}),
    "dependent directions": (discovery, "dependent", {"method": "nmf"}),
    "completeness": (discovery, "completeness", {"concepts": 0, "weights": torch.ones(CHANNELS, 1)}),
}


@pytest.mark.parametrize("where, name, options", LONG.values(), ids=LONG)
def test_a_call_that_takes_long_is_left(where, name, options, monkeypatch):
    """It hangs here until the test is over: who waits for it is asked meanwhile."""
    entered, over = Event(), Event()

    def hang(*_, **__):
        entered.set()
        over.wait(20)  # seconds, if nobody asks
        raise RuntimeError("over")

    def progress(*_):
        if entered.is_set():
            raise Stop

    x = vectors()
    monkeypatch.setattr(where, name, hang)
    with pytest.raises(Stop):
        discover(x, SOURCE, **{"concepts": 3, "progress": progress, **options})
    over.set()


def test_what_is_attended_is_as_if_called():
    """Its result, its error, and whether gradients are kept."""
    checked = Asked()
    with torch.inference_mode():
        assert attended(lambda: torch.ones(1).is_inference(), checked)
    assert not attended(lambda: torch.ones(1).is_inference(), checked) and checked.calls >= 2
    with pytest.raises(ZeroDivisionError):
        attended(lambda: 1 / 0, checked)


@pytest.fixture(scope="module")
def backbone():
    return open_backbone("tiny-cnn")


def test_collecting_asks_for_each_picture(backbone, tmp_path, monkeypatch):
    """Though it reads them sixteen at a time."""
    images = torch.rand(18, 3, 8, 8)
    for number in range(18):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    for pictures in (Pictures(images, backbone), Folder(tmp_path, backbone)):
        assert (
            stops_at_once(lambda progress, p=pictures: collect(p, backbone.extract, 100, 0, progress), monkeypatch) > 18
        )


def test_statistics_ask_for_each_concept(backbone, monkeypatch):
    maps = backbone.extract(torch.rand(3, 3, *backbone.input_size))
    concepts = Concepts(list(torch.eye(128)[:40, None]), [str(i) for i in range(40)], maps.source)
    with monkeypatch.context() as patch:
        assert stops_at_once(lambda check: concept_statistics(backbone, concepts, maps, check), patch) > 40
    for where, name in ((Concepts, "lengths"), (statistics, "completeness")):
        entered, over = Event(), Event()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *_, e=entered, o=over: (e.set(), o.wait(20)))
            with pytest.raises(Stop):
                concept_statistics(backbone, concepts, maps, lambda e=entered: Asked(1)() if e.is_set() else None)
        over.set()


def test_slopes_ask_for_each_concept(monkeypatch):
    """A sparse dictionary has thousands."""
    encoder = SparseEncoder(torch.eye(CHANNELS), torch.zeros(CHANNELS), 4)
    concepts = Concepts(list(torch.eye(CHANNELS)[:, None]), [str(i) for i in range(CHANNELS)], SOURCE, encoder=encoder)
    features = FeatureMap(torch.rand(1, CHANNELS, 3, 4), SOURCE)
    change = edit(features, concepts, [["0"], ["1"]])
    calls = stops_at_once(
        lambda check: measure_slopes(change, torch.rand(6, 3, 4, 4), change.paired(2), check), monkeypatch
    )
    assert calls >= 2 * 3 * CHANNELS


def test_a_device_is_waited_for_once_in_a_while_forth_and_back(monkeypatch):
    """A graphics card cannot be cancelled in what it was told to compute; waiting for it at each layer would cost."""
    now, waits, item, asked = [0.0], [], torch.Tensor.item, []
    monkeypatch.setattr(waiting, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "item", lambda values: waits.append(1) or item(values))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 5), torch.nn.Linear(5, 6))
    with waiting.cancellable(lambda: asked.append(len(waits)), model):  # at each layer: how often it was waited for
        model(torch.randn(2, 3)).sum().backward()
        now[0] = waiting.AHEAD
        result = model(torch.randn(2, 3))
        now[0] *= 2
        result.sum().backward()
    assert asked == [0, 0, 0] * 2 + [1, 1, 1] + [2, 2, 2]
