"""Sparse autoencoders: a dictionary of directions of which few are active in each vector (TopK, Gao et al. 2024).

Small enough to stand here: the libraries for it bring OpenCV, matplotlib and scikit-image along, or are made for
language models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..waiting import Progress

BATCH, STEPS, RATE = 512, 1000, 1e-2
#: steps without activity that make an atom a silent one; weight of the loss through these (1/32 in the paper leaves
#: more silent)
SILENT, REVIVAL = 20, 1 / 4


@dataclass(frozen=True)
class SparseEncoder:
    """x -> z = the k largest of relu(x W^T + b), the others 0. weight: W [n, C]. bias: b [n]. active: k."""

    weight: Tensor
    bias: Tensor
    active: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, C] -> z [N, n]."""
        return largest(F.linear(x, self.weight, self.bias).relu(), self.active)

    def to(self, device: torch.device | str) -> SparseEncoder:
        """In float32 on a device."""
        return SparseEncoder(self.weight.to(device, torch.float32), self.bias.to(device, torch.float32), self.active)

    def select(self, atoms: Tensor) -> SparseEncoder:
        """Some of the atoms, in this order."""
        return SparseEncoder(self.weight[atoms], self.bias[atoms], min(self.active, len(atoms)))


def largest(values: Tensor, count: int) -> Tensor:
    """[N, n] with all but the `count` largest of each row set to 0."""
    if count >= values.shape[1]:
        return values
    top, where = values.topk(count)
    return torch.zeros_like(values).scatter(1, where, top)


def fit_dictionary(
    centred: Tensor, atoms: int, active: int, seed: int, progress: Progress
) -> tuple[Tensor, SparseEncoder]:
    """Decoder rows [n, C] of unit length and the encoder that minimise |x - z U|^2 over vectors [N, C] of mean zero.

    Adam over 1000 batches of 512. The encoder starts as the transposed decoder, the decoder as vectors of the data.
    Atoms that have been silent for long are trained to explain what is left (the auxiliary loss of Gao et al.).
    progress: called with steps done, of how many. Memory: a copy of the vectors, 24 n C and some 512 n numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        length = centred.norm(dim=1).square().mean().sqrt()
        x = centred.clone() / length
        decoder = F.normalize(x[torch.randperm(len(x), generator=generator)[:atoms]]).requires_grad_()
        weight, bias = decoder.detach().clone().requires_grad_(), torch.zeros(atoms, requires_grad=True)
        optimizer = torch.optim.Adam([decoder, weight, bias], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        silent = torch.zeros(atoms)
        for step in range(STEPS):
            batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
            loss, seen = _loss(batch, decoder, weight, bias, active, silent > SILENT)
            silent = (silent + 1) * ~seen
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                decoder.copy_(F.normalize(decoder))
            progress(step + 1, STEPS)
        # relu and the choice of the largest commute with a factor, so the length of the vectors goes into the bias
        return decoder.detach(), SparseEncoder(weight.detach(), bias.detach() * length, active)


def _loss(
    x: Tensor, decoder: Tensor, weight: Tensor, bias: Tensor, active: int, silent: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of a batch [b, C] left unexplained, with the auxiliary loss; and which atoms were active [n]."""
    every = F.linear(x, weight, bias)
    code = largest(every.relu(), active)
    left = x - code @ decoder
    loss = left.square().sum() / x.square().sum()
    if silent.any():
        revived = largest(every[:, silent].relu(), x.shape[1] // 2) @ decoder[silent]
        loss = loss + REVIVAL * (left.detach() - revived).square().sum() / left.detach().square().sum().clamp(min=1e-8)
    return loss, (code > 0).any(0).detach()
