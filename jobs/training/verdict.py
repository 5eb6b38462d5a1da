"""Whether a run learns, judged while it trains by its loss beside chance and by where its embeddings lie.

A loss that falls proves nothing: it falls while queues fill, where all embeddings become one, and where easy pairs are
chosen. What shows that a run learns is a loss of random pairs below chance, by embeddings that are spread and lie
nearer to those of the same image than to others', with a target that moves.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Name = Literal["learning", "not-learning-yet", "not-learning", "forgetting", "collapsed", "diverging"]

# docs/metrics.md has the runs that these limits were measured on.
FALLEN = 0.05  # by so much a loss without chance level has to fall below its start
CLEARLY = 2  # so many margins below chance, the loss alone tells views of an image from those of others
FORGOTTEN = 0.02  # by so much the held-out kNN accuracy has to lie below that of the starting weights
KEPT = 1 / 3  # share of the margins that keeps a run learning that was: single lines vary
# Uniformity (Wang & Isola 2020, t = 2) is 0 where all embeddings are one, and falls to about −3.9 on the whole sphere.
ONE_POINT = -0.02
STILL = ", the target has not moved since the start: lower objective.momentum"
DIVERGED = 1.25  # times chance, and times the first loss
SHORTEST_PATIENCE, LONGEST_PATIENCE = 50, 2000  # steps


@dataclass(frozen=True)
class Margins:
    """What a run has to reach to be learning."""

    below_chance: float = 0.03
    """Share of chance by which the loss is lower."""
    nearer: float = 0.1
    """1 − relative alignment: share by which the views of an image lie nearer than those of different images."""
    spread: float = -0.1
    """Uniformity that embeddings are below."""


# DINO's and iBOT's embeddings soon lie near one point, and their loss long near chance, also in runs that learn.
DISTILLATION = Margins(0.0, 0.04, -0.04)

ADVICE: dict[Name, str] = {
    "learning": "",
    "not-learning-yet": "train for longer",
    "not-learning": "weaken the views (crops, blur, colour), choose no easy pairs, begin synthetic negatives later, or "
    "change optimizer.lr",
    "forgetting": "lower the learning rate, lengthen its warm-up, or train longer: the starting weights are better",
    "collapsed": "choose the hardest or random pairs, raise the target's momentum, or lower the learning rate",
    "diverging": "lower the learning rate, lengthen its warm-up, or clip gradients",
}


@dataclass
class Signs:
    """What a verdict is made from; a resumed run goes on with it. NaN = not known yet."""

    loss: float = math.nan
    """Mean of the newest line, against real negatives alone; of random pairs where pairs were scored."""
    first_loss: float = math.nan
    chance: float = math.nan
    """Loss where embeddings tell nothing apart; NaN where the objective's loss cannot tell."""
    uniformity: float = math.nan
    """Of the newest embeddings."""
    relative_alignment: float = math.nan
    rankme: float = math.nan
    first_rankme: float = math.nan
    knn: float = math.nan
    """Newest held-out kNN accuracy of a run that began with weights of --init."""
    first_knn: float = math.nan
    """That of those weights."""
    target_norm: float = math.nan
    """Of the target's parameters; NaN where there is none."""
    first_target_norm: float = math.nan
    """Before the first step."""
    learned: bool = False
    """Whether it was learning at any line so far."""
    filled: bool = True
    """Whether the queue of negatives, where there is one, holds keys alone: against the random rows of its start any
    loss is low."""
    lost: bool = False
    """Whether a loss of the newest line was not finite."""

    def take_loss(self, loss: float, chance: float | None) -> None:
        """Takes in the mean loss of a line of metrics."""
        self.lost = not math.isfinite(loss)
        self.loss = loss
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.chance = math.nan if chance is None else chance

    def take_health(self, scalars: Mapping[str, float]) -> None:
        """Takes in what a step's `health/` says: the spread of embeddings and features, and the target's norm."""
        for name in ("uniformity", "relative_alignment", "rankme", "target_norm"):
            if (value := scalars.get(f"health/{name}")) is not None:
                setattr(self, name, value)
        self.first_rankme = self.rankme if math.isnan(self.first_rankme) else self.first_rankme

    def take_knn(self, top1: float) -> None:
        """Takes in a held-out kNN accuracy, the starting weights' first."""
        self.knn = top1
        self.first_knn = top1 if math.isnan(self.first_knn) else self.first_knn

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, field.default))


@dataclass(frozen=True)
class Verdict:
    """How a run stands, why, and what to try first."""

    name: Name
    reason: str
    figures: dict[str, float]

    @property
    def advice(self) -> str:
        return ADVICE[self.name]


def reason(signs: Signs) -> str:
    """The figures in words."""
    parts = [f"loss {signs.loss:.2f}" + (f", chance {signs.chance:.2f}" if math.isfinite(signs.chance) else "")]
    if not math.isfinite(signs.uniformity):
        return f"{parts[0]}, spread of embeddings unknown (monitor.health_every)"
    parts.append(f"uniformity {signs.uniformity:.2f}")
    if math.isfinite(signs.relative_alignment):
        parts.append(f"views of an image at {signs.relative_alignment:.0%} of the distance of different images")
    if math.isfinite(signs.rankme):
        parts.append(f"RankMe {signs.rankme:.1f} ({signs.first_rankme:.1f} at first)")
    if math.isfinite(signs.knn):
        parts.append(f"kNN {signs.knn:.1%} ({signs.first_knn:.1%} by the starting weights)")
    return ", ".join(parts)


def judge(signs: Signs, step: int, steps: int, margins: Margins = Margins()) -> Verdict:
    """The verdict after step number `step` of `steps`.

    learning: the loss is below chance, or where it has none, below its start; embeddings are spread, and those of
    an image nearer to each other than to others', which a loss far below chance shows by itself; and the target,
    where there is one, moves. collapsed: embeddings are one point, after the run learned or when patience is over.
    forgetting: learning, but when patience is over, held-out kNN accuracy is 2 points below that of the weights
    that the run began with. diverging: the loss is not finite, or far above both chance and its start.
    not-learning: none of these when patience is over, which is half of the run, 50 to 2,000 steps. While nothing is
    known about embeddings a run is diverging or not learning yet.
    """
    figures = {name: value for name, value in asdict(signs).items() if type(value) is float and math.isfinite(value)}
    over = step >= max(SHORTEST_PATIENCE, min(steps / 2, LONGEST_PATIENCE))
    still = signs.target_norm == signs.first_target_norm

    def verdict(name: Name) -> Verdict:
        return Verdict(name, reason(signs) + (STILL if still else ""), figures)

    if signs.lost or signs.loss > DIVERGED * max(signs.chance, signs.first_loss):
        return verdict("diverging")
    if math.isnan(signs.uniformity):
        return verdict("not-learning-yet")
    if signs.uniformity > ONE_POINT and (signs.learned or over):
        return verdict("collapsed")
    share = KEPT if signs.learned else 1.0
    nearer = signs.relative_alignment < 1 - share * margins.nearer
    if math.isfinite(signs.chance):
        below, margin = 1 - signs.loss / signs.chance, share * margins.below_chance
        told = below > margin and (nearer or below > CLEARLY * margin > 0)
    else:
        told = signs.loss < signs.first_loss - share * FALLEN and nearer
    if told and signs.filled and signs.uniformity < margins.spread and not still:
        return verdict("forgetting" if over and signs.knn < signs.first_knn - FORGOTTEN else "learning")
    return verdict("not-learning" if over else "not-learning-yet")
