"""Synthetic hard negatives in closed form (SynCo; SynBY, section 3.2; MoCHi, section 3).

Each synthetic negative is s = v/‖v‖ with v = c_q·q + c_n·n (+ noise or a sign vector), where q is the query and n
one of the N queue rows most similar to it; s is detached, so the gradient of its logit q·s is s itself. Because v is
a combination with constant coefficients, q·v is the same combination of similarities that exist already, and autograd
through those gives exactly that gradient: vectors are never built, but for the two kinds that need inner products of
their own, and those in blocks.

Shape suffixes: B queries, K negatives, N hardest, L of one kind, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

# Elements of gathered rows that are held at once where their inner products are needed: on a CPU few enough to stay in
# its caches, enough to make little of what a call and its threads' waking cost (measured with six kinds, B = 512, L =
# 128, D = 256, forward and backward, on one core and on two: 108 and 63 ms in blocks of 2¹⁸, 93 and 59 in those of 2¹⁹,
# 115 and 52 in those of 2²¹, 213 and 140 in those of 2²³).
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}
SMALLEST = 1e-12
KINDS: tuple[str, ...] = ("interpolation", "extrapolation", "mixing", "noise", "perturbation", "adversarial")


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
    share: float | None = None
    """L/(K+L): share of the synthetic ones among all negatives (above 0, below 1); the six counts are then proportions
    only. None = the counts as they are."""
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
    """Epochs at the end that do without."""
    of_epochs: float | None = 300.0
    """Length of the run that the three epochs above are meant for (epochs): a shorter run shrinks them in proportion,
    30 of 300 to 3 of 30; None = they are absolute."""

    def __post_init__(self) -> None:
        for kind in KINDS:
            if getattr(self, kind) < 0:
                raise ValueError(f"objective.negatives.{kind}: {getattr(self, kind)} must be 0 or above")
        if self.hardest < 1:
            raise ValueError(f"objective.negatives.hardest: {self.hardest} must be at least 1")
        for field in ("sigma", "delta", "eta", "start_epoch", "last_epochs_without"):
            if getattr(self, field) < 0:
                raise ValueError(f"objective.negatives.{field}: {getattr(self, field)} must be 0 or above")
        if self.share is not None and not (0 < self.share < 1 and self.total):
            raise ValueError(
                f"objective.negatives.share: {self.share} must lie between 0 and 1, with counts above 0 as its "
                f"proportions; for no synthetic negatives leave it out and set the counts to 0"
            )
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"objective.negatives.alpha_max: {self.alpha_max} must lie between 0 and 1")
        if self.beta_max < 1:
            raise ValueError(f"objective.negatives.beta_max: {self.beta_max} must be at least 1")
        if self.gradient not in ("dot", "cosine"):
            raise ValueError(f"objective.negatives.gradient: {self.gradient!r} is unknown; take dot or cosine")
        if self.stop_epoch is not None and self.stop_epoch <= self.start_epoch:
            raise ValueError(
                f"objective.negatives.stop_epoch: {self.stop_epoch} must be above start_epoch {self.start_epoch}"
            )
        if self.of_epochs is not None and self.of_epochs <= 0:
            raise ValueError(f"objective.negatives.of_epochs: {self.of_epochs} must be above 0; None = no reference")

    @property
    def counts(self) -> dict[str, int]:
        """Count by kind, in the order of the logits."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def total(self) -> int:
        """Synthetic negatives per query."""
        return sum(self.counts.values())

    def beside(self, others: int) -> "NegativesConfig":
        """A copy with whole counts that make up `share` of all negatives beside `others` real ones."""
        if self.share is None:
            return self
        total = self.share / (1 - self.share) * others
        bounds = [round(total * part / self.total) for part in accumulate(self.counts.values())]
        counts = {kind: last - first for kind, first, last in zip(KINDS, [0, *bounds], bounds, strict=False)}
        return replace(self, share=None, **counts)

    def at(self, epoch: float, epochs: float) -> "NegativesConfig | None":
        """Itself where `active`, else None."""
        return self if self.active(epoch, epochs) else None

    def active(self, epoch: float, epochs: float) -> bool:
        """Whether synthetic negatives are used at `epoch` (fractional, since the start) of a run of `epochs`."""
        if self.total == 0:
            return False
        shrink = 1.0 if self.of_epochs is None else min(1.0, epochs / self.of_epochs)
        stop = epochs - self.last_epochs_without * shrink
        if self.stop_epoch is not None:
            stop = min(stop, self.stop_epoch * shrink)
        return self.start_epoch * shrink <= epoch < stop


NONE = NegativesConfig(1, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Draws:
    """Everything random, shared by all ways to compute the logits. Indices point into the K negatives."""

    index_BL: Tensor
    """int64 [B, ΣL]: the negative that each synthetic one is made from, kind by kind in the order of KINDS."""
    partner_BL: Tensor
    """int64 [B, L]: the second row of mixing."""
    alpha_BL: Tensor
    beta_BL: Tensor
    gamma_BL: Tensor
    noise_LD: Tensor
    """Noise vectors, one per synthetic negative of a query, shared by the queries of the batch: every single negative
    has the distribution of the formula, and no [B, L, D] of noise exists."""


def check_hardest(config: NegativesConfig, negatives: int) -> None:
    """Raises:
    ValueError: synthetic negatives are made from more hardest ones than there are negatives.
    """
    if config.total and config.hardest > negatives:
        raise ValueError(
            f"objective.negatives.hardest: {config.hardest} is more than the {negatives} negatives there are; "
            f"lower it, or give more negatives"
        )


def draw(config: NegativesConfig, similarity_BK: Tensor, width: int, barred_BK: Tensor | None = None) -> Draws:
    """Picks among each query's N hardest and draws coefficients, from torch's global generator.

    Negatives that `barred_BK` marks are not picked: a query with fewer than N others picks from those, and one without
    any gets synthetic negatives of barred ones, which the caller has to leave out.

    Raises:
        ValueError: N is larger than the number of negatives.
    """
    batch, negatives = similarity_BK.shape
    check_hardest(config, negatives)
    device, left_B1 = similarity_BK.device, config.hardest
    similarity_BK = similarity_BK.detach()
    if barred_BK is not None:
        similarity_BK = similarity_BK.masked_fill(barred_BK, -torch.inf)
        left_B1 = (~barred_BK).sum(1, keepdim=True).clamp(1, config.hardest)
    # In order where some are barred: these then come last, behind those that may be picked.
    hardest_BN = similarity_BK.topk(config.hardest, dim=1, sorted=barred_BK is not None).indices

    def pick(count: int) -> Tensor:
        return hardest_BN.gather(1, (torch.rand(batch, count, device=device) * left_B1).long())

    def between(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, count, device=device)

    return Draws(
        pick(config.total),
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

    `q_BD` and `negatives_KD` are unit rows, `similarity_BK` their product with its graph. With v = c_q q + c_n n + r,
    q·s = (c_q q·q + c_n q·n + q·r) / ‖v‖, where the lengths and the q, n in v are constants.
    """
    q, n = q_BD.detach(), negatives_KD.detach()
    qq_B1 = (q_BD * q).sum(1, keepdim=True)  # 1, carrying the gradient q
    sizes = [*config.counts.values(), config.mixing]
    # One gather of all that is needed: its backward fills one [B, K] instead of seven.
    live_BL = similarity_BK.gather(1, torch.cat([draws.index_BL, draws.partner_BL], 1))
    live = dict(zip((*KINDS, "partner"), live_BL.split(sizes, 1), strict=True))
    index = dict(zip(KINDS, draws.index_BL.split(sizes[:-1], 1), strict=True))

    def along(kind: str, c_q: Tensor | float, c_n: Tensor | float) -> Tensor:
        square = c_q * c_q + c_n * c_n + 2 * c_q * c_n * live[kind].detach()
        return (c_q * qq_B1 + c_n * live[kind]) * inverse_root(square)

    def mixing() -> Tensor:
        g, h = draws.gamma_BL, 1 - draws.gamma_BL
        square = g * g + h * h + 2 * g * h * row_products(n, index["mixing"], draws.partner_BL)
        return (g * live["mixing"] + h * live["partner"]) * inverse_root(square)

    def noise() -> Tensor:
        r_LD = draws.noise_LD.to(n.dtype)
        n_r_BL = (n @ r_LD.T)[index["noise"], torch.arange(config.noise, device=n.device)]
        return (live["noise"] + q_BD @ r_LD.T) * inverse_root(1 + 2 * n_r_BL + r_LD.square().sum(1))

    def perturbation() -> Tensor:
        c_n = 1.0 if config.gradient == "dot" else 1 - config.delta * live["perturbation"].detach()
        return along("perturbation", config.delta, c_n)

    def adversarial() -> Tensor:
        similar_BL, index_BL = live["adversarial"], index["adversarial"]
        if config.gradient == "dot":
            return _adversarial_dot(config.eta, q_BD, n, similar_BL, index_BL)
        return _AdversarialCosine.apply(q_BD, similar_BL, n, index_BL, config.eta)  # type: ignore[return-value]

    formulas: dict[str, Callable[[], Tensor]] = {
        "interpolation": lambda: along("interpolation", draws.alpha_BL, 1 - draws.alpha_BL),
        "extrapolation": lambda: along("extrapolation", 1 - draws.beta_BL, draws.beta_BL),
        "mixing": mixing,
        "noise": noise,
        "perturbation": perturbation,
        "adversarial": adversarial,
    }
    return torch.cat([formulas[kind]() for kind, count in config.counts.items() if count], 1)


def _adversarial_dot(eta: float, q_BD: Tensor, n_KD: Tensor, live_BL: Tensor, index_BL: Tensor) -> Tensor:
    """v = n + η·sign(q): one sign vector per query."""
    sign_BD = q_BD.detach().sign()
    products = [torch.bmm(sign_bD[:, None], n_bLD.mT)[:, 0] for sign_bD, n_bLD in gathered(n_KD, sign_BD, index_BL)]
    square = 1 + 2 * eta * torch.cat(products) + eta**2 * sign_BD.square().sum(1, keepdim=True)
    return (live_BL + eta * (q_BD * sign_BD).sum(1, keepdim=True)) * inverse_root(square)


class _AdversarialCosine(torch.autograd.Function):
    """q·s for v = n + η·sign(q − (q·n)n): a sign vector per negative, made block by block, and again for the gradient
    instead of being kept."""

    @staticmethod
    def forward(ctx: Any, q_BD: Tensor, live_BL: Tensor, n_KD: Tensor, index_BL: Tensor, eta: float) -> Tensor:
        products, lengths = [], []
        for q_bD, n_bLD, sign_bLD in _signs(q_BD, live_BL, n_KD, index_BL):
            v_bLD = torch.add(n_bLD, sign_bLD, alpha=eta, out=n_bLD)
            products.append(torch.bmm(q_bD[:, None], v_bLD.mT)[:, 0])
            lengths.append(torch.linalg.vector_norm(v_bLD, dim=-1))
        length_BL = torch.cat(lengths).clamp_min(SMALLEST)
        ctx.save_for_backward(q_BD, live_BL, n_KD, index_BL, length_BL)
        ctx.eta = eta
        return torch.cat(products) / length_BL

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_BD, live_BL, n_KD, index_BL, length_BL = ctx.saved_tensors
        weight_BL = gradients[0] / length_BL
        blocks = _signs(q_BD, live_BL, n_KD, index_BL)
        weights = weight_BL.split(_queries_at_once(n_KD, index_BL))
        sums = [
            torch.bmm(w_bL[:, None], sign_bLD)[:, 0] for w_bL, (_, _, sign_bLD) in zip(weights, blocks, strict=True)
        ]
        return ctx.eta * torch.cat(sums), weight_BL, None, None, None


def _signs(q_BD: Tensor, live_BL: Tensor, n_KD: Tensor, index_BL: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Runs of b queries with their negatives n and sign(q − (q·n)n), [b, L, D], in memory that the next run reuses."""
    size = _queries_at_once(n_KD, index_BL)
    signs_bLD = n_KD.new_empty(min(size, len(q_BD)), index_BL.shape[1], n_KD.shape[1])
    for live_bL, (q_bD, n_bLD) in zip(live_BL.split(size), gathered(n_KD, q_BD, index_BL), strict=True):
        sign_bLD = signs_bLD[: len(q_bD)]
        torch.addcmul(q_bD[:, None], live_bL[..., None], n_bLD, value=-1, out=sign_bLD).sign_()
        yield q_bD, n_bLD, sign_bLD


def gathered(rows_KD: Tensor, of_BD: Tensor, index_BL: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of b rows of `of_BD` with the rows [b, L, D] that they point at, in memory that the next run reuses."""
    size, width = _queries_at_once(rows_KD, index_BL), rows_KD.shape[1]
    memory_bLD = rows_KD.new_empty(min(size, len(of_BD)), index_BL.shape[1], width)
    for of_bD, index_bL in zip(of_BD.split(size), index_BL.split(size), strict=True):
        gathered_bLD = memory_bLD[: len(of_bD)]
        torch.index_select(rows_KD, 0, index_bL.flatten(), out=gathered_bLD.view(-1, width))
        yield of_bD, gathered_bLD


def _queries_at_once(n_KD: Tensor, index_BL: Tensor) -> int:
    return max(1, _block_elements(n_KD) // (index_BL.shape[1] * n_KD.shape[1]))


def inverse_root(square: Tensor) -> Tensor:
    """1/√x for squared lengths that rounding may have taken to 0 or below."""
    return square.clamp_min(SMALLEST).rsqrt()


def row_products(rows_KD: Tensor, first_BL: Tensor, second_BL: Tensor) -> Tensor:
    """[B, L]: inner products of gathered pairs of rows, a block of pairs at a time in memory that is used again."""
    width = rows_KD.shape[1]
    size = max(1, _block_elements(rows_KD) // width)
    left_lD, right_lD = rows_KD.new_empty(2, min(size, first_BL.numel()), width)
    parts = []
    for a_l, b_l in zip(first_BL.flatten().split(size), second_BL.flatten().split(size), strict=True):
        one = torch.index_select(rows_KD, 0, a_l, out=left_lD[: len(a_l)])
        other = torch.index_select(rows_KD, 0, b_l, out=right_lD[: len(b_l)])
        parts.append(one.mul_(other).sum(1))
    return torch.cat(parts).view_as(first_BL)


def _block_elements(like: Tensor) -> int:
    return BLOCK_ELEMENTS["cpu" if like.device.type == "cpu" else "cuda"]
