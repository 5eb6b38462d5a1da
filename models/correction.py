"""Guessing what both backbones make of a view from what was scored of it.

Shape suffixes: B images, F width of the features, S of what was scored, X = S + 1 with a constant; Y = 2F: the online
encoder's features and the target's, side by side.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.distributed import sum_over_ranks

FORGET = 0.9  # weight of a step beside the one after it: a target that lags by 100 steps moves on within ten
RIDGE = 1e-3  # of the mean square of a feature


class Correction(nn.Module):
    """What is missing from scored x to the features y of both backbones, as a linear function of x: ridge regression on
    the newest steps. With x′ for the first F numbers of x,

        y ≈ [x′; x′] + Wᵀ[x; 1],   W = (A + ε tr(A)/X · I)⁻¹ C
        A = Σ λᵃ [x; 1][x; 1]ᵀ,   C = Σ λᵃ [x; 1] (y − [x′; x′])ᵀ   over images that trained a steps ago, λ = 0.9

    Where x is the target's features, its half of C and W is 0. Sums are over all ranks, so that every rank corrects
    alike. Until the first step nothing is corrected.
    """

    gram_XX: Tensor
    cross_XY: Tensor
    weight_XY: Tensor

    def __init__(self, features: int, scored: int) -> None:
        """`features`: F; `scored`: S, F or more."""
        super().__init__()
        self._width, known = features, scored + 1
        self.register_buffer("gram_XX", torch.zeros(known, known))
        self.register_buffer("cross_XY", torch.zeros(known, 2 * features))
        self.register_buffer("weight_XY", torch.zeros(known, 2 * features))
        self._pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, scored_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The online encoder's features and the target's, as guessed; leading axes as given, fp32."""
        with torch.autocast(scored_BS.device.type, enabled=False):
            x_BX = with_constant(scored_BS)
            online_BF, target_BF = (x_BX[..., : self._width] + half for half in (x_BX @ self.weight_XY).chunk(2, -1))
        return online_BF, target_BF

    @torch.no_grad()
    def learn(self, scored_BS: Tensor, online_BF: Tensor, target_BF: Tensor, counts_B: Tensor | None = None) -> None:
        """Remembers what was scored of images and what the backbones made of them, for `update`; where bools are given,
        of those images only."""
        with torch.autocast(scored_BS.device.type, enabled=False):
            x_BX = with_constant(scored_BS)
            missing_BY = torch.cat([y_BF.float() - x_BX[:, : self._width] for y_BF in (online_BF, target_BF)], 1)
            counted_XB = x_BX.T if counts_B is None else x_BX.T * counts_B
            self._pending.append((counted_XB @ x_BX, counted_XB @ missing_BY))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in what was learned since the last call, of all ranks; to be called after each optimizer step."""
        if not self._pending:
            return
        gram_XX, cross_XY = (torch.stack(parts).sum(0) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        self.gram_XX.mul_(FORGET).add_(sum_over_ranks(gram_XX))
        self.cross_XY.mul_(FORGET).add_(sum_over_ranks(cross_XY))
        ridge = RIDGE * self.gram_XX.diagonal().mean() * torch.eye(len(self.gram_XX), device=gram_XX.device)
        factor, _ = torch.linalg.cholesky_ex(self.gram_XX + ridge)  # unlike cholesky, without waiting for the device
        self.weight_XY.copy_(torch.cholesky_solve(self.cross_XY, factor))

    def skip(self) -> None:
        """Forgets what was learned since the last update."""
        self._pending.clear()


def with_constant(scored_BS: Tensor) -> Tensor:
    """[…, X]: in fp32, with a constant at the end."""
    return pad(scored_BS.float(), (0, 1), value=1)
