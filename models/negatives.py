"""Synthetic hard negatives in closed form (SynCo; SynBY, section 3.2; MoCHi, section 3).

Each synthetic negative is s = v/‖v‖ with v = c_q·q + c_n·n (+ noise or a sign vector), where q is the query and n
one of the N queue rows most similar to it; s is detached, so the gradient of its logit q·s is s itself. Because v is
a combination with constant coefficients, q·v is the same combination of similarities that exist already, and autograd
through those gives exactly that gradient: vectors are never built, but for the two kinds that need inner products of
their own, and those in blocks.

Shape suffixes: B queries, K negatives, N hardest, L of one kind, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Rows of B × L × D that are held at once where inner products of gathered rows are needed.
BLOCK_ELEMENTS = 4_000_000
KINDS = ("interpolation", "extrapolation", "mixing", "noise", "perturbation", "adversarial")
PAPER_EPOCHS = 300.0


@dataclass(frozen=True)
class NegativesConfig:
    """Counts, strengths and schedule of the six kinds of synthetic negatives."""

    hardest: int = 256
    """N: negatives most similar to the query that synthetic ones are made from."""
    interpolation: int = 128
    """Count of αq + (1−α)n, α ~ U(0, alpha_max)."""
    extrapolation: int = 128
    """Count of q + β(n−q), β ~ U(1, beta_max)."""
    mixing: int = 128
    """Count of γn_i + (1−γ)n_j, γ ~ U(0, 1)."""
    noise: int = 128
    """Count of n + N(0, sigma²I)."""
    perturbation: int = 128
    """Count of n + delta·∇_n sim(q, n)."""
    adversarial: int = 128
    """Count of n + eta·sign(∇_n sim(q, n))."""
    alpha_max: float = 0.5
    """Largest share of the query in an interpolation."""
    beta_max: float = 1.5
    """Largest extrapolation factor."""
    sigma: float = 0.1
    """Standard deviation of the noise per coordinate (0.1 for ViTs, 0.01 in SynCo for ResNets)."""
    delta: float = 0.01
    """Step of the perturbation."""
    eta: float = 0.01
    """Step of the adversarial kind."""
    gradient: Literal["dot", "cosine"] = "dot"
    """Which similarity the last two kinds follow: ∇_n q·n = q, or ∇_n cos(q, n) = q − (q·n)n for unit vectors."""
    start_epoch: float = 30.0
    """Epoch from which synthetic negatives are used."""
    stop_epoch: float | None = None
    """Epoch from which they are used no more; None = no such epoch."""
    last_epochs_without: float = 100.0
    """Epochs at the end that do without; with start_epoch, at most 2/3 of the run are given up."""

    def __post_init__(self) -> None:
        for kind in KINDS:
            if getattr(self, kind) < 0:
                raise ValueError(f"negatives.{kind}: {getattr(self, kind)} must be 0 or above")
        if self.hardest < 1:
            raise ValueError(f"negatives.hardest: {self.hardest} must be at least 1")
        for field in ("sigma", "delta", "eta", "start_epoch", "last_epochs_without"):
            if getattr(self, field) < 0:
                raise ValueError(f"negatives.{field}: {getattr(self, field)} must be 0 or above")
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"negatives.alpha_max: {self.alpha_max} must lie between 0 and 1")
        if self.beta_max < 1:
            raise ValueError(f"negatives.beta_max: {self.beta_max} must be at least 1")

    @property
    def counts(self) -> dict[str, int]:
        """Count by kind, in the order of the logits."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def total(self) -> int:
        """Synthetic negatives per query."""
        return sum(self.counts.values())

    def active(self, epoch: float, epochs: float) -> bool:
        """Whether synthetic negatives are used at `epoch` (fractional) of a run of `epochs`.

        A run shorter than the paper's 300 epochs keeps the proportions: start and end shrink with epochs / 300.
        """
        if self.total == 0:
            return False
        shrink = min(1.0, epochs / PAPER_EPOCHS)
        stop = epochs - self.last_epochs_without * shrink
        if self.stop_epoch is not None:
            stop = min(stop, self.stop_epoch * shrink)
        return self.start_epoch * shrink <= epoch < stop


NONE = NegativesConfig(1, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Draws:
    """Everything random, shared by all ways to compute the logits. Indices point into the K negatives."""

    index: dict[str, Tensor]
    """kind → int64 [B, L]."""
    partner_BL: Tensor
    """int64 [B, L]: the second row of mixing."""
    alpha_BL: Tensor
    beta_BL: Tensor
    gamma_BL: Tensor
    noise_LD: Tensor
    """Noise vectors, one per synthetic negative of a query, shared by the queries of the batch: every single negative
    has the distribution of the formula, and no [B, L, D] of noise exists."""


def draw(config: NegativesConfig, similarity_BK: Tensor, width: int) -> Draws:
    """Picks among each query's N hardest and draws coefficients, from torch's global generator.

    Raises:
        ValueError: N is larger than the number of negatives.
    """
    batch, negatives = similarity_BK.shape
    if config.hardest > negatives:
        raise ValueError(f"negatives.hardest: {config.hardest} is more than the {negatives} negatives there are")
    device = similarity_BK.device
    hardest_BN = similarity_BK.detach().topk(config.hardest, dim=1, sorted=False).indices

    def pick(count: int) -> Tensor:
        return hardest_BN.gather(1, torch.randint(config.hardest, (batch, count), device=device))

    def between(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, count, device=device)

    return Draws(
        {kind: pick(count) for kind, count in config.counts.items()},
        pick(config.mixing),
        between(0, config.alpha_max, config.interpolation),
        between(1, config.beta_max, config.extrapolation),
        between(0, 1, config.mixing),
        config.sigma * torch.randn(config.noise, width, device=device),
    )


def synthetic_similarities(
    config: NegativesConfig, q_BD: Tensor, negatives_KD: Tensor, similarity_BK: Tensor, draws: Draws
) -> Tensor:
    """[B, ΣL]: q·s of all synthetic negatives, in the order of KINDS, with the gradient that detached s give.

    `q_BD` and `negatives_KD` are unit rows, `similarity_BK` their product with its graph; fp32.
    """
    q, n = q_BD.detach(), negatives_KD.detach()
    fixed_BK = similarity_BK.detach()
    qq_B1 = (q_BD * q).sum(1, keepdim=True)  # 1, carrying the gradient q

    def live(kind: str) -> Tensor:
        return similarity_BK.gather(1, draws.index[kind])

    def along(kind: str, c_q: Tensor | float, c_n: Tensor | float) -> Tensor:
        """q·(c_q q + c_n n) / ‖c_q q + c_n n‖."""
        fixed = fixed_BK.gather(1, draws.index[kind])
        length = (c_q * c_q + c_n * c_n + 2 * c_q * c_n * fixed).sqrt()
        return (c_q * qq_B1 + c_n * live(kind)) / length

    parts = []
    if config.interpolation:
        parts.append(along("interpolation", draws.alpha_BL, 1 - draws.alpha_BL))
    if config.extrapolation:
        parts.append(along("extrapolation", 1 - draws.beta_BL, draws.beta_BL))
    if config.mixing:
        g, h = draws.gamma_BL, 1 - draws.gamma_BL
        dot_BL = row_products(n, draws.index["mixing"], draws.partner_BL)
        mixed = g * live("mixing") + h * similarity_BK.gather(1, draws.partner_BL)
        parts.append(mixed / (g * g + h * h + 2 * g * h * dot_BL).sqrt())
    if config.noise:
        noise = draws.noise_LD
        each_L = torch.arange(config.noise, device=n.device)
        n_noise_BL = (n @ noise.T)[draws.index["noise"], each_L]
        length = (1 + 2 * n_noise_BL + noise.square().sum(1)).sqrt()
        parts.append((live("noise") + q_BD @ noise.T) / length)
    if config.perturbation:
        c_n = 1.0 if config.gradient == "dot" else 1 - config.delta * fixed_BK.gather(1, draws.index["perturbation"])
        parts.append(along("perturbation", config.delta, c_n))
    if config.adversarial:
        adversarial = _adversarial_dot if config.gradient == "dot" else _adversarial_cosine
        parts.append(adversarial(config.eta, q_BD, n, fixed_BK, live("adversarial"), draws.index["adversarial"]))
    return torch.cat(parts, 1)


def _adversarial_dot(
    eta: float, q_BD: Tensor, n_KD: Tensor, fixed_BK: Tensor, live_BL: Tensor, index_BL: Tensor
) -> Tensor:
    """v = n + η·sign(q): one sign vector per query, so all inner products are one more matrix product."""
    sign_BD = q_BD.detach().sign()
    n_sign_BL = (sign_BD @ n_KD.T).gather(1, index_BL)
    length = (1 + 2 * eta * n_sign_BL + eta**2 * sign_BD.square().sum(1, keepdim=True)).sqrt()
    return (live_BL + eta * (q_BD * sign_BD).sum(1, keepdim=True)) / length


def _adversarial_cosine(
    eta: float, q_BD: Tensor, n_KD: Tensor, fixed_BK: Tensor, live_BL: Tensor, index_BL: Tensor
) -> Tensor:
    """v = n + η·sign(q − (q·n)n): a sign vector per negative, so its products are summed block by block."""
    rows = []
    for block in blocks(index_BL.shape, q_BD.shape[1]):
        index = index_BL[block]
        n_bLD = n_KD[index]
        q_b1D = q_BD[block].detach()[:, None]
        sign_bLD = (q_b1D - fixed_BK[block].gather(1, index)[..., None] * n_bLD).sign()
        n_sign = (n_bLD * sign_bLD).sum(-1)
        length = (1 + 2 * eta * n_sign + eta**2 * sign_bLD.square().sum(-1)).sqrt()
        q_sign = torch.einsum("bd,bld->bl", q_BD[block], sign_bLD)
        rows.append((live_BL[block] + eta * q_sign) / length)
    return torch.cat(rows)


def row_products(rows_KD: Tensor, first_BL: Tensor, second_BL: Tensor) -> Tensor:
    """[B, L]: inner products of gathered pairs of rows, a block of queries at a time."""
    parts = [
        torch.linalg.vecdot(rows_KD[first_BL[block]], rows_KD[second_BL[block]])
        for block in blocks(first_BL.shape, rows_KD.shape[1])
    ]
    return torch.cat(parts)


def blocks(shape_BL: torch.Size, width: int) -> Iterator[slice]:
    """Slices of the B queries, so that B × L × D of each stays below BLOCK_ELEMENTS."""
    rows = max(1, BLOCK_ELEMENTS // max(1, shape_BL[1] * width))
    return (slice(start, start + rows) for start in range(0, shape_BL[0], rows))
