"""Whether a run learns, judged while it trains by its loss beside chance and by the spread of its embeddings.

A loss that falls proves nothing: it falls while queues fill, and where all embeddings become one. A loss below chance
by embeddings that are spread shows that the run learns.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Name = Literal["learning", "not-learning-yet", "not-learning", "forgetting", "collapsed", "diverging"]

BELOW_CHANCE = 0.03  # a loss that is below chance by this share of it tells keys from negatives
# Uniformity (Wang & Isola 2020, t = 2) is 0 where all embeddings are one, and falls to about −3.9 on the whole sphere.
SPREAD = -0.3
ONE_POINT = -0.02
DIVERGED = 1.25  # times chance, and times the first loss
FALLEN = 0.05  # by so much a loss without chance level has to fall below its start
FORGOTTEN = 0.02  # by so much the held-out kNN accuracy has to lie below that of the starting weights
LONGEST_PATIENCE = 2000  # steps

ADVICE: dict[Name, str] = {
    "learning": "",
    "not-learning-yet": "wait",
    "not-learning": "weaken the views (crops, blur, colour), begin synthetic negatives later, or change optimizer.lr",
    "forgetting": "lower the learning rate, lengthen its warm-up, or train longer: the starting weights are better",
    "collapsed": "choose the hardest or random pairs, raise the target's momentum, or lower the learning rate",
    "diverging": "lower the learning rate, lengthen its warm-up, or clip gradients",
}


@dataclass
class Signs:
    """What a verdict is made from; a resumed run goes on with it. NaN = not known yet."""

    loss: float = math.nan
    """Mean of the newest line, against real negatives alone."""
    first_loss: float = math.nan
    chance: float = math.nan
    """Loss where embeddings tell nothing apart; NaN where the objective's loss cannot tell."""
    uniformity: float = math.nan
    """Of the newest embeddings."""
    best_uniformity: float = math.nan
    rankme: float = math.nan
    first_rankme: float = math.nan
    knn: float = math.nan
    """Newest held-out kNN accuracy of a run that began with weights of --init."""
    first_knn: float = math.nan
    """That of those weights."""
    lost: bool = False
    """Whether a loss of the newest line was not finite."""

    def take_loss(self, loss: float, chance: float | None) -> None:
        """Takes in the mean loss of a line of metrics."""
        self.lost = not math.isfinite(loss)
        self.loss = loss
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.chance = math.nan if chance is None else chance

    def take_health(self, uniformity: float | None, rankme: float | None) -> None:
        """Takes in the spread of a step's embeddings and features."""
        if uniformity is not None:
            self.uniformity = uniformity
            self.best_uniformity = (
                uniformity if math.isnan(self.best_uniformity) else min(self.best_uniformity, uniformity)
            )
        if rankme is not None:
            self.rankme = rankme
            self.first_rankme = rankme if math.isnan(self.first_rankme) else self.first_rankme

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


def judge(signs: Signs, step: int, steps: int) -> Verdict:
    """The verdict after step number `step` of `steps`.

    learning: the loss is below chance by 3 % of it, or where it has no chance level, below its start; and embeddings
    are spread (uniformity below −0.3). collapsed: embeddings are one point, after they were spread or when patience
    is over. forgetting: learning, but when patience is over, held-out kNN accuracy is 2 points below that of the
    weights that the run began with. diverging: the loss is not finite, or far above both chance and its start.
    not-learning: none of these when patience is over, which is half of the run, 2,000 steps at most.
    """
    figures = {name: value for name, value in asdict(signs).items() if name != "lost" and math.isfinite(value)}
    over = step >= min(steps / 2, LONGEST_PATIENCE)
    loss = f"loss {signs.loss:.2f}" + (f", chance {signs.chance:.2f}" if math.isfinite(signs.chance) else "")
    spread = f"uniformity {signs.uniformity:.2f}" if math.isfinite(signs.uniformity) else "spread of embeddings unknown"
    rank = f", RankMe {signs.rankme:.1f} ({signs.first_rankme:.1f} at first)" if math.isfinite(signs.rankme) else ""
    knn = f", kNN {signs.knn:.1%} ({signs.first_knn:.1%} by the starting weights)" if math.isfinite(signs.knn) else ""
    reason = f"{loss}, {spread}{rank}{knn}"

    def verdict(name: Name) -> Verdict:
        return Verdict(name, reason, figures)

    if signs.lost or signs.loss > DIVERGED * max(signs.chance, signs.first_loss):
        return verdict("diverging")
    was_spread = signs.best_uniformity < SPREAD
    if signs.uniformity > ONE_POINT and (was_spread or over):
        return verdict("collapsed")
    if math.isfinite(signs.chance):
        below = signs.loss < (1 - BELOW_CHANCE) * signs.chance
    else:
        below = signs.loss < signs.first_loss - FALLEN
    if below and signs.uniformity < SPREAD:
        return verdict("forgetting" if over and signs.knn < signs.first_knn - FORGOTTEN else "learning")
    return verdict("not-learning" if over else "not-learning-yet")
