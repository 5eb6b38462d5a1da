"""Hard-view selection: which pair of an image's N views trains (HVP, section 3).

Shape suffixes: B images, N views, P = N(N−1)/2 pairs in lexicographic order, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.precision import PRECISIONS, Precision

Rule = Literal["hardest", "easiest", "random", "lowest-iou"]
CHOICES = {
    "encoder": ("online", "target"),
    "precision": PRECISIONS,
    "batchnorm": ("view", "joint", "running"),
}


@dataclass(frozen=True)
class SelectionConfig:
    """How the pair that trains is chosen among N views."""

    views: int = 4
    """Views per image that pairs are chosen from (at least 2; 2 = no choice)."""
    rule: Rule = "hardest"
    """hardest: largest loss; easiest: smallest (collapses); random: plain training; lowest-iou: least overlap."""
    encoder: Literal["online", "target"] = "online"
    """Which encoder computes the features that are scored. online: the online encoder for queries and the target for
    keys, as in the loss. target: the target alone, one forward fewer; its features serve the loss again. The online
    encoder's features are then predicted from the target's (models/correction.py); see also random_share."""
    every: int = 1
    """Select on every k-th step; on the others a random pair trains."""
    random_share: float | None = None
    """Probability (0 to 1) that an image trains on a random pair in a step that is scored; None = 0.25 with
    `encoder = target`, else 0. The target lags: without random pairs it keeps choosing pairs that the online
    encoder has learned meanwhile, and its correction sees no others. The log marks these images as `at_random`."""
    precision: Precision = "same"
    """Number format of the scoring forwards. same: as in training. bf16: much slower than fp32 on a processor without
    bf16 units. auto: bf16 where the device has such units, else as in training."""
    resolution: int | None = None
    """Side of the views while scoring (pixels); None = as in training."""
    layer: int | None = None
    """Score the features of a ViT's first so many blocks (HVP's earlier-layer variant); None = all blocks."""
    static_colour: bool = False
    """One colour draw for all views of an image while scoring (HVP, section 6.1.3)."""
    batchnorm: Literal["view", "joint", "running"] = "view"
    """Statistics that BatchNorm uses while scoring. view: of all images' v-th views, as in training; joint: of all
    views of all images; running: the running ones. Running statistics never change here."""
    cross_policy: bool = False
    """Only pairs of views from different policies (one of T, one of T′) compete."""
    audit_every: int = 0
    """Steps between comparisons of a cheaper choice with the full one (agreement, regret); 0 = never."""

    def __post_init__(self) -> None:
        if self.views < 2:
            raise ValueError(f"selection.views: {self.views} leaves no pair to choose; give 2 or more")
        if self.rule not in RULES:
            raise ValueError(f"selection.rule: {self.rule!r} is unknown; known: {', '.join(RULES)}")
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"selection.{field}: {getattr(self, field)!r} is unknown; known: {', '.join(known)}")
        for field in ("every", "resolution", "layer"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"selection.{field}: {value} must be at least 1")
        if self.random_share is not None and not 0 <= self.random_share <= 1:
            raise ValueError(f"selection.random_share: {self.random_share} must lie between 0 and 1")
        if self.audit_every < 0:
            raise ValueError(f"selection.audit_every: {self.audit_every} must be 0 or above")

    @property
    def share_at_random(self) -> float:
        """`random_share` with its default filled in."""
        if self.random_share is not None:
            return self.random_share
        return 0.25 if self.encoder == "target" else 0.0

    def scores(self, step: int) -> bool:
        """Whether pairs are scored at this step; where not, a random pair trains."""
        return self.rule in ("hardest", "easiest") and self.views > 2 and step % self.every == 0

    def audits(self, step: int) -> bool:
        """Whether this step's choice is to be compared with the full one."""
        return self.audit_every > 0 and self.views > 2 and step % self.audit_every == 0

    @property
    def full(self) -> "SelectionConfig":
        """The same rule without any of the savings: what `audit` compares with."""
        return SelectionConfig(self.views, self.rule, batchnorm=self.batchnorm, cross_policy=self.cross_policy)


@cache
def pairs(views: int) -> tuple[tuple[int, int], ...]:
    """The P pairs of `views` views: (0, 1), (0, 2), …, (1, 2), …"""
    return tuple((a, b) for a in range(views) for b in range(a + 1, views))


@cache
def pair_index(views: int, device: torch.device) -> Tensor:
    """int64 [P, 2] on the device; made once, because a copy from the host would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(pairs(views), device=device)


def same_policy(views: int, device: torch.device) -> Tensor:
    """bool [P]: both views of the pair have even or both have odd numbers, so come from the same policy of two."""
    index_P2 = pair_index(views, device)
    return (index_P2[:, 0] - index_P2[:, 1]) % 2 == 0


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "hardest": lambda losses_BP: losses_BP.argmax(1),
    "easiest": lambda losses_BP: losses_BP.argmin(1),
    "random": lambda uniform_BP: uniform_BP.argmax(1),
    "lowest-iou": lambda iou_BP: iou_BP.argmin(1),
}


def select(scores_BP: Tensor, rule: Rule, barred_P: Tensor | None = None) -> Tensor:
    """int64 [B]: each image's chosen pair. A pure function, without host synchronisation.

    `scores_BP` is what the rule looks at: losses for hardest and easiest, overlaps for lowest-iou, uniform numbers for
    random. `barred_P` marks pairs that do not compete. Of equal scores the first pair wins.
    """
    if barred_P is not None:
        worst = torch.inf if rule in ("easiest", "lowest-iou") else -torch.inf
        scores_BP = scores_BP.masked_fill(barred_P, worst)
    return RULES[rule](scores_BP)


def take_pair(values_BN: Tensor, choice_B: Tensor) -> Tensor:
    """[B, N, …] → [B, 2, …]: the two views of each image's chosen pair, in one gather."""
    chosen_B2 = pair_index(values_BN.shape[1], values_BN.device)[choice_B]
    return values_BN[torch.arange(len(choice_B), device=values_BN.device)[:, None], chosen_B2]


def regret(losses_BP: Tensor, choice_B: Tensor, barred_P: Tensor | None = None) -> Tensor:
    """Share of the hardness gained over a random pair that a choice loses against the hardest: scalar, 0 = nothing."""
    if barred_P is not None:
        losses_BP = losses_BP.masked_fill(barred_P, torch.nan)
    hardest_B = losses_BP.nan_to_num(nan=-torch.inf).max(1).values
    chosen_B = losses_BP.gather(1, choice_B[:, None])[:, 0]
    return (hardest_B - chosen_B).mean() / (hardest_B - losses_BP.nanmean(1)).mean().clamp_min(1e-12)


def audit(losses_BP: Tensor, choice_B: Tensor, selection: SelectionConfig) -> dict[str, Tensor]:
    """A choice against the full one, given the full losses: scalars `selection/agreement` (share of images with the
    same choice) and `selection/regret` (of `easiest`, of the ease gained)."""
    rule = "easiest" if selection.rule == "easiest" else "hardest"
    barred_P = same_policy(selection.views, losses_BP.device) if selection.cross_policy else None
    full_B = select(losses_BP, rule, barred_P)
    gained_BP = losses_BP if rule == "hardest" else -losses_BP
    return {
        "selection/agreement": (full_B == choice_B).float().mean(),
        "selection/regret": regret(gained_BP, choice_B, barred_P),
    }


@contextmanager
def without_side_effects(module: nn.Module, running: bool = False) -> Iterator[None]:
    """Forwards inside leave no trace: no gradient, no drop path or dropout, no BatchNorm statistics updated.

    BatchNorm normalises by the statistics of what it is given, or with `running` by its running ones. Training modes
    are as before afterwards. Nothing here draws from a random number generator.
    """
    modes = {part: part.training for part in module.modules()}
    norms = {part: part.track_running_stats for part in modes if isinstance(part, _BatchNorm)}
    try:
        module.eval()
        if not running:
            for norm in norms:  # in training mode without tracking: batch statistics, which go nowhere
                norm.training, norm.track_running_stats = True, False
        with torch.no_grad():
            yield
    finally:
        for norm, tracks in norms.items():
            norm.track_running_stats = tracks
        for part, mode in modes.items():
            part.training = mode
