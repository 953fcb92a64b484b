"""Scope: is an edited feature map like those that an inversion model was trained on (paper Sec. 4.5)?

Four statistics of a map, each turned into a share of held-out maps by stored quantiles:

direction   how far the unit vector of a location is from the nearest of a bank of directions: 1 - max_k u . c_k, the
            centres c_k from k-means on held-out unit vectors; a map's is the mean over its locations.
magnitude   ln |x|; a map's is the mean. Read on both sides.
distance    from the mean vector, of Mahalanobis: |W (x - mu)|^2 / C with the shrunk covariance of Ledoit and Wolf
            (2004); a map's is the mean. Read on both sides: a mixture of two maps lies nearer to mu than real ones do.
neighbours  how badly the eight neighbours predict a location: z = V (u - m) in the first principal directions of the
            unit vectors, r = z - R n with n the mean of the neighbours' z, |S r|^2 / d; a map's is the mean of its
            worst tenth. Seams and shuffled locations show here alone. A pooled map has none.

What every one of them misses: a wrong image made of right vectors in right surroundings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import log
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .errors import FeatInvError
from .feature_map import FeatureMap, FeatureSource

if TYPE_CHECKING:
    import numpy as np

#: statistic -> what is said of a map in which it is unusually high, and, where both sides are read, unusually low
STATISTICS = {
    "direction": ("direction",),
    "magnitude": ("magnitude too large", "magnitude too small"),
    "distance": ("too far from the mean", "too near the mean"),
    "neighbours": ("neighbours",),
}
VERDICTS = ("inside", "at the edge", "outside")
EDGE, OUTSIDE = 95.0, 99.0  # per cent of held-out maps that are less unusual
LEVELS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
PER_MAP, DIRECTIONS, FEWEST = 32, 32, 100  # locations taken from a map, principal directions, maps that quantiles need


@dataclass(frozen=True)
class ScopeReport:
    """What a Scope says of B maps.

    surprise: statistic -> [B], -log10 of the share of held-out maps that are as unusual; extrapolated where there are
    none. combined: [B], per cent of held-out maps of a lower score. low: statistic -> [B] bool, unusual for being low.
    locations: statistic -> [B, H, W], per cent of held-out locations that are less unusual; where: [B, H, W], of a
    lower score.
    """

    surprise: Mapping[str, Tensor]
    combined: Tensor
    low: Mapping[str, Tensor]
    locations: Mapping[str, Tensor]
    where: Tensor

    @property
    def share(self) -> dict[str, Tensor]:
        """statistic -> [B], per cent of held-out maps that are less unusual."""
        return {name: less_unusual(x) for name, x in self.surprise.items()}

    @property
    def score(self) -> Tensor:
        """[B] the surprise of the most unusual statistic; it orders maps beyond 100 % as well."""
        return most(self.surprise)

    @property
    def verdict(self) -> list[str]:
        """One of VERDICTS per map: at the edge from 95 % of held-out maps on, outside from 99 % on."""
        return [verdict_of(x) for x in self.combined.tolist()]

    @property
    def off(self) -> list[list[str]]:
        """For each map, what is unusual, in the words of STATISTICS; empty for a map inside."""
        names = []
        for i, verdict in enumerate(self.verdict):
            least = min(less_unusual(self.score[i]).item(), EDGE)  # the most unusual statistic is always named
            named = [name for name, share in self.share.items() if share[i] >= least and verdict != VERDICTS[0]]
            names.append([STATISTICS[name][bool(self.low[name][i])] for name in named])
        return names

    def captions(self) -> list[str]:
        """For each map, the verdict and what is unusual: "outside: direction, neighbours"."""
        return [f"{verdict}: {', '.join(off)}" if off else verdict for verdict, off in zip(self.verdict, self.off)]

    def lines(self) -> list[str]:
        """For each map, the caption and its figures."""
        shares = self.share
        figures = [
            ", ".join(f"{name} {per_cent(share[i].item())}" for name, share in shares.items())
            for i in range(len(self.combined))
        ]
        return [
            f"{caption} ({text} of held-out maps are less unusual)" for caption, text in zip(self.captions(), figures)
        ]

    def describe(self) -> str:
        """One line for messages; of several maps, how many are inside and the furthest one."""
        lines = self.lines()
        if len(lines) == 1:
            return lines[0]
        furthest, inside = int(self.score.argmax()), self.verdict.count(VERDICTS[0])
        return f"{inside} of {len(lines)} maps inside; furthest is number {furthest + 1}: {lines[furthest]}"


@dataclass(frozen=True)
class Scope:
    """Statistics of held-out feature maps of one source.

    scale: the vectors' root mean square length, by which magnitudes are divided. bank: [K, C] fp16 unit vectors.
    mean: [C] fp32 and whiten: [C, C] fp16, of the scaled vectors. centre: [C], axes: [d, C], predict: [d, d] and
    residual: [d, d], fp16, the neighbours' statistic; empty for a pooled source. quantiles: name -> [len(LEVELS)] of
    each statistic and the score, for maps ("direction") and for locations ("direction at"), and of "cycle", the cosine
    of held-out reconstructions, where it was measured. maps: how many held-out maps, half of them behind the quantiles.
    """

    source: FeatureSource
    scale: float
    maps: int
    bank: Tensor
    mean: Tensor
    whiten: Tensor
    centre: Tensor
    axes: Tensor
    predict: Tensor
    residual: Tensor
    quantiles: Mapping[str, Tensor]

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of STATISTICS that maps of this source have."""
        return tuple(name for name in STATISTICS if name != "neighbours" or not self.source.pooled)

    @torch.inference_mode()
    def raw(self, features: FeatureMap) -> dict[str, Tensor]:
        """statistic -> [B, H, W], uncalibrated, float32 on the CPU."""
        parts = [self._raw(values) for values in features.values.float().cpu().split(64)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.statistics}

    def _raw(self, values: Tensor) -> dict[str, Tensor]:
        x = values.movedim(1, -1)  # [B, H, W, C]
        u = F.normalize(x, dim=-1)
        statistics = {
            "direction": 1 - (u @ self.bank.float().T).amax(-1),
            "magnitude": (x.norm(dim=-1) / self.scale).clamp(min=1e-3).log(),
            "distance": ((x / self.scale - self.mean) @ self.whiten.float().T).square().mean(-1),
        }
        if "neighbours" in self.statistics:
            z = (u - self.centre.float()) @ self.axes.float().T
            r = z - neighbour_mean(z.movedim(-1, 1)).movedim(1, -1) @ self.predict.float().T
            statistics["neighbours"] = (r @ self.residual.float().T).square().mean(-1)
        return statistics

    def evaluate(self, features: FeatureMap) -> ScopeReport:
        """Where each map stands among held-out ones. Raises FeatInvError for another source."""
        features.source.require(self.source, "the feature map", "the scope statistics")
        raw = self.raw(features)
        odds = {name: self._log_odds(whole(name, values), name) for name, values in raw.items()}
        surprise = {name: surprise_of(x, name) for name, x in odds.items()}
        at = {name: surprise_of(self._log_odds(values, f"{name} at"), name) for name, values in raw.items()}
        combined, where = (
            100 * self._log_odds(most(x), name).sigmoid() for x, name in ((surprise, "score"), (at, "score at"))
        )
        low = {name: two_sided(name) & (x < 0) for name, x in odds.items()}
        return ScopeReport(surprise, combined, low, {name: less_unusual(x) for name, x in at.items()}, where)

    def evaluate_cycle(self, cosine: Tensor) -> tuple[Tensor, list[str]]:
        """The third number, after rendering: (per cent of held-out reconstructions with a higher cycle cosine
        [B], verdicts). cosine: [B] between the reconstructions' maps and the maps that they were drawn from, as
        the weights file recommends. Raises FeatInvError where the held-out reconstructions were not measured."""
        if "cycle" not in self.quantiles:
            raise FeatInvError(
                "these scope statistics hold no cycle cosines; fit them with training/fit_scope.py --drawn 256"
            )
        share = 100 * (-self._log_odds(cosine.float().cpu(), "cycle")).sigmoid()
        return share, [verdict_of(x) for x in share.tolist()]

    def _log_odds(self, values: Tensor, name: str) -> Tensor:
        """ln(F / (1 - F)), F the share of held-out values below: linear between the quantiles and beyond them."""
        knots = self.quantiles[name].double()
        odds = torch.tensor([log(level / (1 - level)) for level in LEVELS], dtype=torch.float64)
        x = values.double().contiguous()
        left = (torch.searchsorted(knots, x) - 1).clamp(0, len(LEVELS) - 2)
        gap = (knots[1:] - knots[:-1]).clamp(min=1e-9 * (1e-9 + knots.abs().max()))
        return odds[left] + (x - knots[left]) / gap[left] * (odds[1:] - odds[:-1])[left]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a file keeps."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def about(self) -> dict:
        """The rest, as JSON keeps it; the source is the weights file's own."""
        return {
            "levels": LEVELS,
            "scale": self.scale,
            "maps": self.maps,
            "quantiles": {name: q.tolist() for name, q in self.quantiles.items()},
        }

    @classmethod
    def read(cls, source: FeatureSource, about: dict, tensors: dict[str, Tensor]) -> Scope:
        """The inverse of tensors and about, whose fields metadata.ScopeStatistics has checked. Further tensors are
        ignored. Raises FeatInvError for missing or misshapen parts."""
        shapes = _shapes(source, tensors)
        maps = [name for name in STATISTICS if name != "neighbours" or not source.pooled] + ["score"]
        named = [*maps, *(f"{name} at" for name in maps), *({"cycle"} & about["quantiles"].keys())]
        lengths = {name: len(about["quantiles"].get(name, ())) for name in named}
        wrong = [f"a tensor {k!r}" for k, shape in shapes.items() if k not in tensors or tensors[k].shape != shape]
        wrong += [f"quantiles of {name!r}" for name, length in lengths.items() if length != len(LEVELS)]
        if wrong or tuple(about["levels"]) != LEVELS:
            raise FeatInvError(
                f"scope statistics without {', '.join(wrong[:3]) or 'the levels'} that fit {source.describe()}; fit"
                " them again with training/fit_scope.py"
            )
        quantiles = {name: torch.tensor(about["quantiles"][name]) for name in named}
        parts = {name: tensors[name] for name in shapes}
        return cls(source=source, scale=about["scale"], maps=about["maps"], quantiles=quantiles, **parts)


def _shapes(source: FeatureSource, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a Scope of this source needs. How many directions there are, the file says."""

    def first(name: str) -> int:
        return max(1, tensors[name].shape[:1].numel()) if name in tensors else 1

    c, z = source.channels, first("axes")
    neighbours = {"centre": (c,), "axes": (z, c), "predict": (z, z), "residual": (z, z)}
    if source.pooled:
        neighbours = dict.fromkeys(neighbours, (0,))
    return {"bank": (first("bank"), c), "mean": (c,), "whiten": (c, c), **neighbours}


def two_sided(statistic: str) -> bool:
    """Whether unusually low values count as well."""
    return len(STATISTICS[statistic]) == 2


def verdict_of(share: float) -> str:
    """One of VERDICTS for a per cent of held-out maps that are less unusual."""
    return VERDICTS[(share >= EDGE) + (share >= OUTSIDE)]


def per_cent(share: float) -> str:
    """A share in 0..100 as text, which does not claim more than the quantiles know."""
    return "> 99.9 %" if share > 99.9 else f"{share:.0f} %"


def neighbour_mean(z: Tensor) -> Tensor:
    """[B, D, H, W] the mean over the up to eight neighbours of each location."""
    around = torch.ones(1, 1, 3, 3)
    around[0, 0, 1, 1] = 0
    total = F.conv2d(z.flatten(0, 1)[:, None], around, padding=1).view(z.shape)
    return total / F.conv2d(torch.ones(1, 1, *z.shape[2:]), around, padding=1)


def whole(name: str, values: Tensor) -> Tensor:
    """[B] a map's statistic from those of its locations [B, H, W]."""
    flat = values.flatten(1)
    return flat.topk(-(-flat.shape[1] // 10), dim=1).values.mean(1) if name == "neighbours" else flat.mean(1)


def surprise_of(odds: Tensor, name: str) -> Tensor:
    """-log10 of the share of held-out values as unusual: those above, or twice the smaller side."""
    above, below = -F.logsigmoid(-odds) / log(10), -F.logsigmoid(odds) / log(10)
    return (torch.maximum(above, below) - log(2, 10)).float() if two_sided(name) else above.float()


def most(surprise: Mapping[str, Tensor]) -> Tensor:
    """The surprise of the most unusual statistic."""
    return torch.stack(list(surprise.values())).amax(0)


def less_unusual(surprise: Tensor) -> Tensor:
    """Per cent of held-out values that are less unusual than one of this surprise, -log10 of the share that is not."""
    return 100 * (1 - 10 ** -surprise.clamp(min=0))


def quantiles_of(values: Tensor) -> Tensor:
    """[len(LEVELS)] fp32."""
    ordered = values.flatten().double().sort().values  # torch.quantile takes no more than 2^24 values
    place = torch.tensor(LEVELS, dtype=torch.float64) * (len(ordered) - 1)
    return ordered[place.floor().long()].lerp(ordered[place.ceil().long()], place.frac()).float()


def fit_scope(maps: FeatureMap | Iterable[FeatureMap], seed: int = 0, centres: int = 512) -> Scope:
    """Learns what held-out maps are like: every second map makes the bank and the covariances, the others, which these
    have not seen, the quantiles.

    maps: of one source, at least 200, from pictures that training did not see; an iterable is read once. centres: size
    of the bank. Memory: half of the maps, and 64 vectors of each of the others. The same maps and seed give the same
    result on the same machine. Raises FeatInvError for too few maps, constant features and maps of several sources.
    """
    picks = torch.Generator().manual_seed(seed)
    count, x, around = 0, [], []
    kept: list[FeatureMap] = []
    for batch in [maps] if isinstance(maps, FeatureMap) else maps:
        source = kept[0].source if kept else batch.source
        batch.source.require(source, "a feature map", "the first one")
        values = batch.values.float().cpu()
        odd = (torch.arange(len(values)) + count) % 2 == 1
        count += len(values)
        kept.append(batch.with_values(values[odd]))
        vectors, means = sampled(values[~odd], picks)
        x.append(vectors)
        around.append(means)
    if count < 2 * FEWEST:
        raise FeatInvError(f"{count} feature maps; scope statistics need at least {2 * FEWEST}, better 2,000 and more")
    parts = describe_vectors(torch.cat(x), torch.cat(around), seed, centres, source.pooled)
    return calibrated(Scope(source=source, maps=count, quantiles={}, **parts), kept)


def sampled(values: Tensor, picks: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to PER_MAP random vectors of each map [B, C, H, W] and the mean of their neighbours' unit vectors, [n, C]
    each."""
    indices = torch.rand(len(values), values[0, 0].numel(), generator=picks).argsort(1)[:, :PER_MAP]
    means = neighbour_mean(F.normalize(values, dim=1)) if indices.shape[1] > 1 else values

    def vectors_of(v: Tensor) -> Tensor:
        return rearrange(v.flatten(2).gather(2, indices[:, None].expand(-1, v.shape[1], -1)), "b c n -> (b n) c")

    return vectors_of(values), vectors_of(means)


def describe_vectors(x: Tensor, around: Tensor, seed: int, centres: int, pooled: bool) -> dict:
    """The fitted fields of a Scope from vectors x [n, C] and the means of their neighbours' unit vectors."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.covariance import ledoit_wolf

    scale = x.norm(dim=1).square().mean().sqrt().item()
    if scale == 0 or x.var(0).sum() == 0:
        raise FeatInvError(
            "constant features: all vectors are equal, so there is nothing to fit; check the images and the layer"
        )
    u, scaled = F.normalize(x, dim=1), (x / scale).double()
    means = (
        MiniBatchKMeans(min(centres, len(u) // 4), random_state=seed, n_init=1, batch_size=4096)
        .fit(u.numpy())
        .cluster_centers_
    )
    mean = scaled.mean(0)
    parts = {"scale": scale, "bank": F.normalize(torch.from_numpy(means), dim=1).half(), "mean": mean.float()}
    parts["whiten"] = whitening(ledoit_wolf((scaled - mean).numpy(), assume_centered=True)[0])
    centre = u.mean(0)
    if pooled:
        empty = torch.empty(0).half()
        return parts | {"centre": empty, "axes": empty, "predict": empty, "residual": empty}
    covariance = torch.cov(u.T.double())
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -DIRECTIONS:].T.float().contiguous()
    z, n = ((v - centre) @ axes.T for v in (u, around))
    z, n = z.double(), n.double()
    gram = n.T @ n  # of a ridge regression of z on n, with a thousandth of the mean variance
    ridge = 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram))
    predict = torch.linalg.solve(gram + ridge, n.T @ z).T
    residual = whitening(ledoit_wolf((z - n @ predict.T).numpy(), assume_centered=True)[0])
    return parts | {"centre": centre.half(), "axes": axes.half(), "predict": predict.half(), "residual": residual}


def whitening(covariance: np.ndarray) -> Tensor:
    """The symmetric root of a covariance's inverse, fp16. covariance: [D, D], of vectors of about unit length."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    return (vectors * values.clamp(min=1e-8).rsqrt() @ vectors.T).half()  # the floor keeps fp16's range


def calibrated(scope: Scope, maps: Iterable[FeatureMap]) -> Scope:
    """The same scope with quantiles from maps that it was not fitted to."""
    raws = [scope.raw(batch) for batch in maps if len(batch)]
    raw = {name: torch.cat([part[name] for part in raws]) for name in scope.statistics}
    quantiles: dict[str, Tensor] = {}
    for at, values_of in (("", {name: whole(name, values) for name, values in raw.items()}), (" at", raw)):
        quantiles |= {name + at: quantiles_of(values) for name, values in values_of.items()}
        known = replace(scope, quantiles=quantiles)
        score = most(
            {name: surprise_of(known._log_odds(values, name + at), name) for name, values in values_of.items()}
        )
        quantiles[f"score{at}"] = quantiles_of(score)
    return replace(scope, quantiles=quantiles)
