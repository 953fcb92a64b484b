"""Affinities of feature vectors: which are joined, and how strongly."""

import torch
from torch.nn import functional as F

from featinv_nodes.core.concepts import clustering
from featinv_nodes.core.concepts.clustering import neighbour_affinity
from featinv_nodes.core.concepts.discovery import cluster_basis, dependent, subspaces
from featinv_nodes.core.waiting import unchecked


def test_each_vector_is_joined_with_the_nearest_others_by_their_angle(monkeypatch):
    """Never with itself, whichever part of the rows it is in; opposite vectors lie in one subspace."""
    monkeypatch.setattr(clustering, "CHUNK", 7)
    monkeypatch.setattr(clustering, "NEIGHBOURS", 3)
    points = F.normalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)))
    cosine = (points @ points.T).abs().fill_diagonal_(0).double()
    largest, where = cosine.topk(3)
    expected = torch.zeros(20, 20, dtype=torch.float64).scatter(1, where, torch.exp(-2 * torch.arccos(largest)))
    assert torch.allclose(torch.from_numpy(neighbour_affinity(points, unchecked).toarray()), expected, atol=1e-6)


def test_clusters_follow_the_seed():
    """Of vectors without any structure, so that another beginning ends elsewhere."""
    points = F.normalize(torch.randn(200, 40, generator=torch.Generator().manual_seed(0)))
    affinity = neighbour_affinity(points, unchecked)
    one, again, other = (subspaces(points, affinity, 12, seed, False)[0] for seed in (1, 1, 2))
    assert all(map(torch.equal, one, again)) and not all(map(torch.equal, one, other))


def test_a_basis_has_the_directions_above_a_twentieth_of_the_largest_eigenvalue():
    axes = torch.eye(6)
    members = torch.cat(
        [sign * share**0.5 * axes[i : i + 1] for i, share in enumerate((1, 0.06, 0.04)) for sign in (1, -1)]
    )
    assert torch.equal(cluster_basis(members, centred=False), axes[:2])


def test_a_direction_counts_from_a_sine_of_a_fifth_to_those_before_it():
    axes = torch.eye(6)
    rows = F.normalize(torch.stack([axes[0], axes[0] + 0.19 * axes[1], axes[0] + 0.22 * axes[2]]))
    assert dependent(rows) == [1]  # 0.19 and 0.22 are the tangents
