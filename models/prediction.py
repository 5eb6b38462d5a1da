"""Predicts from two views' parameters how hard their pair is, without a forward pass.

Shape suffixes: B images, P pairs, X columns that describe a pair.
"""

import torch
from torch import Tensor, nn

from models.distributed import sum_over_ranks

FORGET = 0.97  # weight of a step beside the one after it
RIDGE = 1e-3  # of each column's sum of squares, so that a column's unit does not matter


class Prediction(nn.Module):
    """A pair's loss beside the mean of its image's pairs, as a linear function of its columns, both without their means
    over the image: ridge regression on the newest scored steps.

        ŷ = xᵀw,   w = (A + ε diag(A))⁻¹ c,   A = Σ λᵃ x xᵀ,   c = Σ λᵃ x y
        over pairs that were scored a steps ago, λ = 0.97

    Sums are over all ranks, so that every rank has the same w. Until the first scored step w = 0. No paper's method.
    """

    gram_XX: Tensor
    cross_X: Tensor
    weight_X: Tensor

    def __init__(self, columns: int) -> None:
        """`columns`: X."""
        super().__init__()
        self.register_buffer("gram_XX", torch.zeros(columns, columns, dtype=torch.float64))
        self.register_buffer("cross_X", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("weight_X", torch.zeros(columns, dtype=torch.float64))
        self._pending: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def forward(self, columns_BPX: Tensor) -> Tensor:
        """float32 [B, P]: predicted losses, up to a constant for each image."""
        return (columns_BPX.double() @ self.weight_X).float()

    @torch.no_grad()
    def learn(self, columns_BPX: Tensor, losses_BP: Tensor, barred_P: Tensor | None = None) -> None:
        """Remembers the scored pairs for `update`, but for those that do not compete (bool `barred_P`)."""
        x_BPX, y_BP = columns_BPX.double(), losses_BP.double()
        if barred_P is not None:
            x_BPX, y_BP = x_BPX[:, ~barred_P], y_BP[:, ~barred_P]
        x_nX = (x_BPX - x_BPX.mean(1, keepdim=True)).flatten(0, 1)
        y_n = (y_BP - y_BP.mean(1, keepdim=True)).flatten()
        self._pending.append((x_nX.T @ x_nX, x_nX.T @ y_n))

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each optimizer step, scored or not: ages the sums by a step, adds what `learn` remembered
        on all ranks and solves for w."""
        self.gram_XX.mul_(FORGET)
        self.cross_X.mul_(FORGET)
        if not self._pending:
            return
        gram_XX, cross_X = (torch.stack(parts).sum(0) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        self.gram_XX.add_(sum_over_ranks(gram_XX))
        self.cross_X.add_(sum_over_ranks(cross_X))
        scale_X = self.gram_XX.diagonal()
        ridge_X = torch.where(scale_X > 0, RIDGE * scale_X, 1.0)  # a column that never varies gets no weight
        factor, _ = torch.linalg.cholesky_ex(self.gram_XX + ridge_X.diag())  # without waiting for the device
        self.weight_X.copy_(torch.cholesky_solve(self.cross_X[:, None], factor)[:, 0])

    def skip(self) -> None:
        """Drops what `learn` remembered since the last update."""
        self._pending.clear()
