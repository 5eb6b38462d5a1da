"""Predicts the online encoder's features from the target's.

Shape suffixes: B images, F width of the features, X = F + 1 with a constant.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.distributed import sum_over_ranks

FORGET = 0.9  # weight of a step beside the one after it: a target that lags by 100 steps moves on within ten
RIDGE = 1e-3  # of the mean square of a feature


class Correction(nn.Module):
    """The difference between the online encoder's features y and the target's x, as a linear function of x: ridge
    regression on the newest steps.

        y ≈ x + Wᵀ[x; 1],   W = (A + ε tr(A)/X · I)⁻¹ C
        A = Σ λᵃ [x; 1][x; 1]ᵀ,   C = Σ λᵃ [x; 1] (y − x)ᵀ   over images that trained a steps ago, λ = 0.9

    With `selection.layer`, x is the target's features after its first blocks. Sums are over all ranks, so that every
    rank has the same W. Until the first step W = 0.
    """

    gram_XX: Tensor
    cross_XF: Tensor
    weight_XF: Tensor

    def __init__(self, features: int) -> None:
        """`features`: F."""
        super().__init__()
        self.register_buffer("gram_XX", torch.zeros(features + 1, features + 1))
        self.register_buffer("cross_XF", torch.zeros(features + 1, features))
        self.register_buffer("weight_XF", torch.zeros(features + 1, features))
        self._pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, target_BF: Tensor) -> Tensor:
        """[…, F] of the target → the online encoder's, predicted; fp32."""
        with torch.autocast(target_BF.device.type, enabled=False):
            return target_BF.float() + with_constant(target_BF) @ self.weight_XF

    @torch.no_grad()
    def observe(self, target_BF: Tensor, online_BF: Tensor, counts_B: Tensor | None = None) -> None:
        """Remembers both encoders' features of the same images for `update`; with `counts_B` (bool), only of the images
        that it marks."""
        with torch.autocast(target_BF.device.type, enabled=False):
            x_BX = with_constant(target_BF)
            counted_XB = x_BX.T if counts_B is None else x_BX.T * counts_B
            self._pending.append((counted_XB @ x_BX, counted_XB @ (online_BF.float() - target_BF.float())))

    @torch.no_grad()
    def update(self) -> None:
        """Adds what `observe` remembered on all ranks and solves for W; to be called after each optimizer step."""
        if not self._pending:
            return
        gram_XX, cross_XF = (torch.stack(parts).sum(0) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        self.gram_XX.mul_(FORGET).add_(sum_over_ranks(gram_XX))
        self.cross_XF.mul_(FORGET).add_(sum_over_ranks(cross_XF))
        ridge = RIDGE * self.gram_XX.diagonal().mean() * torch.eye(len(self.gram_XX), device=gram_XX.device)
        factor, _ = torch.linalg.cholesky_ex(self.gram_XX + ridge)  # unlike cholesky, without waiting for the device
        self.weight_XF.copy_(torch.cholesky_solve(self.cross_XF, factor))

    def skip(self) -> None:
        """Drops what `observe` remembered since the last update."""
        self._pending.clear()


def with_constant(target_BF: Tensor) -> Tensor:
    """[…, X]: in fp32, with a constant at the end."""
    return pad(target_BF.float(), (0, 1), value=1)
