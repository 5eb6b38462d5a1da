"""Guessing the online encoder's queries from what the target made of the views.

Shape suffixes: B images, F width of the features, X = F + 1 with a constant, D width of the embedding.
"""

import torch
from torch import Tensor, nn

from models.distributed import sum_over_ranks

FORGET = 0.9  # weight of a step beside the one after it: a target that lags by 100 steps moves on within ten
RIDGE = 1e-3  # of the mean square of a feature


class Correction(nn.Module):
    """What a guess misses, as a linear function of the features it was made from: ridge regression on the newest steps.

        y ≈ guess(x) + Wᵀ[x; 1],   W = (A + ε tr(A)/X · I)⁻¹ C
        A = Σ λᵃ [x; 1][x; 1]ᵀ,   C = Σ λᵃ [x; 1] (y − guess(x))ᵀ   over images that trained a steps ago, λ = 0.9

    Sums are over all ranks, so that every rank corrects alike. Until the first step nothing is corrected.
    """

    gram_XX: Tensor
    cross_XD: Tensor
    weight_XD: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("gram_XX", torch.zeros(features + 1, features + 1))
        self.register_buffer("cross_XD", torch.zeros(features + 1, width))
        self.register_buffer("weight_XD", torch.zeros(features + 1, width))
        self._pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, guess_BD: Tensor, features_BF: Tensor) -> Tensor:
        """The guess, corrected; leading axes as given, fp32."""
        with torch.autocast(guess_BD.device.type, enabled=False):
            return guess_BD.float() + with_one(features_BF) @ self.weight_XD

    @torch.no_grad()
    def learn(self, features_BF: Tensor, missing_BD: Tensor) -> None:
        """Remembers what guesses from these features missed, for `update`."""
        with torch.autocast(features_BF.device.type, enabled=False):
            x_XB = with_one(features_BF).T
            self._pending.append((x_XB @ x_XB.T, x_XB @ missing_BD.float()))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in what was learned since the last call, of all ranks; to be called after each optimizer step."""
        if not self._pending:
            return
        gram_XX, cross_XD = (torch.stack(parts).sum(0) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        self.gram_XX.mul_(FORGET).add_(sum_over_ranks(gram_XX))
        self.cross_XD.mul_(FORGET).add_(sum_over_ranks(cross_XD))
        ridge = RIDGE * self.gram_XX.diagonal().mean() * torch.eye(len(self.gram_XX), device=gram_XX.device)
        factor, _ = torch.linalg.cholesky_ex(self.gram_XX + ridge)  # unlike cholesky, without waiting for the device
        self.weight_XD.copy_(torch.cholesky_solve(self.cross_XD, factor))

    def skip(self) -> None:
        """Forgets what was learned since the last update."""
        self._pending.clear()


def with_one(features_BF: Tensor) -> Tensor:
    """[…, X]: fp32 features and a constant beside them."""
    return torch.cat([features_BF.float(), torch.ones_like(features_BF[..., :1], dtype=torch.float32)], -1)
