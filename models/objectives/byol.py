"""BYOL (Grill et al. 2020).

    q1, q2 = f_q(x1), f_q(x2)              # backbone + projector + predictor
    k1, k2 = f_k(x1), f_k(x2)              # backbone + projector by momentum, no gradient
    loss = ‖q1 − k2‖² + ‖q2 − k1‖²         # of unit vectors (equation 2 there), symmetrised
    step; f_k ← m f_k + (1 − m) f_q

Shape suffixes: B images, N views, P pairs, D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.backbones import BackboneConfig
from models.heads import mlp
from models.objectives.base import Chosen, Features, Length, Metrics, check_positive, products
from models.objectives.momentum import MomentumObjective
from models.selection import SelectionConfig, pair_index


@dataclass(frozen=True)
class BYOLConfig:
    """BYOL."""

    momentum: float = 0.996
    """Momentum of the target at the start; reaches 1 at the end by a cosine."""
    hidden: int = 4096
    """Width of the heads' hidden layers."""
    width: int = 256
    """Width of the embedding."""

    def __post_init__(self) -> None:
        check_positive(self, "hidden", "width")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"objective.momentum: {self.momentum} must lie between 0 and 1; the paper's is 0.996")


class BYOL(MomentumObjective):
    """BYOL."""

    def __init__(self, config: BYOLConfig, backbone: BackboneConfig, length: Length) -> None:
        def heads(features: int) -> tuple[nn.Module, nn.Module]:
            return mlp(features, config.hidden, config.width), mlp(config.width, config.hidden, config.width)

        super().__init__(backbone, length, heads, config.momentum)

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        q_NBD, k_NBD = self.queries_and_keys(features, selection)
        cosine_NNB = products(q_NBD, k_NBD)
        a, b = pair_index(len(q_NBD), q_NBD.device).T
        return (4 - 2 * cosine_NNB[a, b] - 2 * cosine_NNB[b, a]).T

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        q1, q2, k1, k2 = self.embeddings(chosen)
        cosine1, cosine2 = (q1 * k2).sum(1).mean(), (q2 * k1).sum(1).mean()
        return 4 - 2 * cosine1 - 2 * cosine2, {"cosine": (cosine1 + cosine2).detach() / 2}
