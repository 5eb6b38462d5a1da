"""MoCo v3 (Chen, Xie, He 2021, algorithm 1).

    q1, q2 = f_q(x1), f_q(x2)              # backbone + projector (3 layers) + predictor (2 layers)
    k1, k2 = f_k(x1), f_k(x2)              # backbone + projector by momentum, no gradient
    loss = ctr(q1, k2) + ctr(q2, k1)       # negatives: the keys of all images of all ranks; × 2τ
    step; f_k ← m f_k + (1 − m) f_q

Shape suffixes: B images, P pairs, D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.backbones import BackboneConfig
from models.contrast import Contrast, chance, contrastive_loss
from models.distributed import gather
from models.heads import mlp
from models.in_batch import batch_contrast, batch_pair_losses, check_others
from models.negatives import NONE, NegativesConfig
from models.objectives.base import Chosen, Features, Length, Metrics, check_positive
from models.objectives.momentum import MomentumObjective
from models.selection import SelectionConfig


@dataclass(frozen=True)
class MoCoV3Config:
    """MoCo v3; with counts of synthetic negatives above 0, those are made from the batch's keys."""

    temperature: float = 0.2
    """τ of the contrastive loss."""
    momentum: float = 0.99
    """Momentum of the target at the start; reaches 1 at the end by a cosine."""
    hidden: int = 4096
    """Width of the heads' hidden layers."""
    width: int = 256
    """Width of the embedding."""
    negatives: NegativesConfig = NONE
    """Synthetic hard negatives; all counts 0 = none, as published."""
    oracle: bool = False
    """Leave out negatives with the query's label, and make no synthetic ones of them (MoCHi, section 3.2: an upper
    bound for analyses; needs labels). Pairs are chosen without knowing labels."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "hidden", "width")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"objective.momentum: {self.momentum} must lie between 0 and 1; the paper's is 0.99")


class MoCoV3(MomentumObjective):
    """MoCo v3."""

    def __init__(self, config: MoCoV3Config, backbone: BackboneConfig, length: Length) -> None:
        def heads(features: int) -> tuple[nn.Module, nn.Module]:
            projector = mlp(features, config.hidden, config.width, layers=3, last_norm=True)
            return projector, mlp(config.width, config.hidden, config.width, layers=2, last_norm=True)

        super().__init__(backbone, length, heads, config.momentum)
        self.config = config

    def check_batch(self, images: int) -> None:
        super().check_batch(images)
        check_others(self.config.negatives, images, 1)

    def chance(self, images: int, *, real: bool = False) -> float:
        config = self.config
        synthetic = None if real else config.negatives.at(self.epoch, self.length.epochs)
        return 4 * config.temperature * chance(images, synthetic, left_out=1)

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        q_NBD, k_NBD = self.queries_and_keys(features, selection)
        return 2 * self.config.temperature * batch_pair_losses(q_NBD, k_NBD, self.config.temperature)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        q1, q2, k1, k2 = self.embeddings(chosen)
        tasks = [self._task(q1, k2, labels_B), self._task(q2, k1, labels_B)]
        self.contrasts = [task.detached() for task in tasks] if self.watching else []
        return contrastive_loss(tasks, 2 * self.config.temperature)

    def _task(self, q_BD: Tensor, k_BD: Tensor, labels_B: Tensor | None) -> Contrast:
        config, sets = self.config, [gather(k_BD)]
        synthetic = config.negatives.at(self.epoch, self.length.epochs)
        labelled = self.watching or config.oracle
        return batch_contrast(
            q_BD, k_BD, sets, config.temperature, synthetic, labels_B, labelled=labelled, oracle=config.oracle
        )
