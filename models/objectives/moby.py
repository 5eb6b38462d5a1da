"""MoBY (Xie et al. 2021), and with synthetic negatives SynBY, MoCHi's mixing and Syn²Co.

Online encoder f_q = backbone + projector + predictor, target f_k = backbone + projector by momentum; two queues, one
per view of the pair.

    q1, q2 = f_q(x1), f_q(x2)
    k1, k2 = f_k(x1), f_k(x2)                        # no gradient
    loss = ctr(q1, k2, queue2) + ctr(q2, k1, queue1) # InfoNCE, τ = 0.2
    step; f_k ← m f_k + (1 − m) f_q; queue1 ← k1; queue2 ← k2

Shape suffixes: B images, N views, P pairs, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.backbones import BackboneConfig
from models.contrast import Contrast, chance, contrastive_loss, queue_pair_losses, same_class
from models.distributed import gather
from models.heads import mlp
from models.negatives import NegativesConfig
from models.objectives.base import Chosen, Features, Length, Metrics, check_positive
from models.objectives.momentum import MomentumObjective
from models.queue import Queue
from models.selection import SelectionConfig


@dataclass(frozen=True)
class MoBYConfig:
    """MoBY; with counts of synthetic negatives above 0, SynBY."""

    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    """Synthetic hard negatives; all counts 0 = MoBY."""
    temperature: float = 0.2
    """τ of the contrastive loss."""
    queue: int = 4096
    """Negatives in each of the two queues."""
    momentum: float = 0.99
    """Momentum of the target at the start; reaches 1 at the end by a cosine."""
    hidden: int = 4096
    """Width of the heads' hidden layers."""
    width: int = 256
    """Width of the embedding."""
    oracle: bool = False
    """Leave out negatives with the query's label, and make no synthetic ones of them (MoCHi, section 3.2: an upper
    bound for analyses; needs labels). Pairs are chosen without knowing labels."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "queue", "hidden", "width")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"objective.momentum: {self.momentum} must lie between 0 and 1; the paper's is 0.99")
        if self.negatives.total and self.negatives.hardest > self.queue:
            raise ValueError(
                f"objective.negatives.hardest: {self.negatives.hardest} is more than the queue's {self.queue} rows; "
                f"lower it or raise objective.queue"
            )


class MoBY(MomentumObjective):
    """MoBY and SynBY."""

    def __init__(self, config: MoBYConfig, backbone: BackboneConfig, length: Length) -> None:
        def heads(features: int) -> tuple[nn.Module, nn.Module]:
            return mlp(features, config.hidden, config.width), mlp(config.width, config.hidden, config.width)

        super().__init__(backbone, length, heads, config.momentum)
        self.config = config
        self.queue1, self.queue2 = Queue(config.queue, config.width), Queue(config.queue, config.width)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def chance(self, images: int, *, real: bool = False) -> float:
        synthetic = None if real else self.config.negatives.at(self.epoch, self.length.epochs)
        return 2 * chance(self.config.queue, synthetic)

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        """Plain InfoNCE of all pairs: synthetic negatives, which are redrawn for every loss, do not take part."""
        queues = self.queue1.rows_KD, self.queue2.rows_KD
        return queue_pair_losses(*self.queries_and_keys(features, selection), *queues, self.config.temperature)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        q1, q2, k1, k2 = self.embeddings(chosen)
        tasks = [self._task(q1, k2, self.queue2, labels_B), self._task(q2, k1, self.queue1, labels_B)]
        self.contrasts = [task.detached() for task in tasks] if self.watching else []
        self.keep_keys(k1, k2, labels_B)
        return contrastive_loss(tasks)

    def keep_keys(self, k1_BD: Tensor, k2_BD: Tensor, labels_B: Tensor | None = None) -> None:
        """Remembers the two views' keys (and classes, below 0 unknown) for the queues."""
        unknown_B = torch.full((len(k1_BD),), -1, device=k1_BD.device)
        self._pending.append((k1_BD, k2_BD, unknown_B if labels_B is None else labels_B))

    def _task(self, q_BD: Tensor, k_BD: Tensor, queue: Queue, labels_B: Tensor | None) -> Contrast:
        config = self.config
        synthetic = config.negatives.at(self.epoch, self.length.epochs)
        barred_BK = same_class(labels_B, queue.labels_K) if config.oracle else None
        return Contrast(q_BD, k_BD, queue.rows_KD, config.temperature, synthetic, labels_B, queue.labels_K, barred_BK)

    def after_step(self) -> None:
        """Puts the step's keys of all ranks into the queues, and moves the target."""
        keys1, keys2, labels = (gather(torch.cat(parts)) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        self.queue1.push(keys1, labels)
        self.queue2.push(keys2, labels)
        super().after_step()

    def skip_step(self) -> None:
        self._pending.clear()
        super().skip_step()
