"""Muon in float32 against PyTorch's, and against the singular values themselves."""

import torch
from torch import nn

from lit_reduce.pocket.muon import Muon, orthogonal


def test_it_steps_as_pytorchs_does_but_for_rounding() -> None:
    ours = [nn.Parameter(torch.randn(20, 50)), nn.Parameter(torch.randn(50, 20)), nn.Parameter(torch.randn(20, 50))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        moved = (a - start).norm()
        assert moved > 0.01
        assert (a - b).norm() < 0.02 * moved  # theirs rounds to eight bits


def test_singular_values_come_near_one_and_directions_stay() -> None:
    matrices = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    for found, given in zip(orthogonal(matrices), matrices, strict=True):
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        turned = left.T @ found @ right.T
        assert ((turned.diagonal() > 0.6) & (turned.diagonal() < 1.3)).all()
        assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3


def test_parameters_without_a_gradient_stay() -> None:
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.randn(4, 4)
    Muon([still, moved], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moved, torch.ones(4, 4))
