"""SwAV (Caron et al. 2020, algorithm 1), two views.

    z1, z2 = f(x1), f(x2)                              # backbone + projector, unit length
    s1, s2 = z1 C, z2 C                                # C: unit prototypes
    c1, c2 = sinkhorn(s1), sinkhorn(s2)                # no gradient, over the batch of all ranks
    loss = −(c1 · log softmax(s2 / τ) + c2 · log softmax(s1 / τ)) / 2

Shape suffixes: B images, N views, P pairs, K prototypes, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.distributed import sum_over_ranks
from models.heads import mlp, unit
from models.objectives.base import (
    Chosen,
    Encoder,
    Features,
    Length,
    Metrics,
    Objective,
    check_positive,
    fp32,
    per_view,
    products,
)
from models.selection import SelectionConfig, pair_index


@dataclass(frozen=True)
class SwAVConfig:
    """SwAV."""

    prototypes: int = 3000
    """K: clusters that views are assigned to."""
    temperature: float = 0.1
    """τ of the predicted assignment."""
    epsilon: float = 0.05
    """Entropy of the assignments that Sinkhorn gives: smaller is sharper."""
    iterations: int = 3
    """Sinkhorn's iterations."""
    freeze_epochs: float = 1.0
    """Epochs in which the prototypes do not learn."""
    hidden: int = 2048
    """Width of the projector's hidden layer."""
    width: int = 128
    """Width of the embedding."""
    head_norm: bool = True
    """BatchNorm in the projector's hidden layer; MoCo v3's comparison on ViTs does without (appendix there)."""
    joint_norm: bool = True
    """BatchNorm's statistics are of both views together, as in the authors' code; false = of each view by itself. Pairs
    are scored by statistics that `selection.batchnorm` names."""

    def __post_init__(self) -> None:
        check_positive(self, "prototypes", "temperature", "epsilon", "iterations", "hidden", "width")
        if self.freeze_epochs < 0:
            raise ValueError(f"objective.freeze_epochs: {self.freeze_epochs} must be 0 or above; raise it")


class SwAV(Objective):
    """SwAV."""

    def __init__(self, config: SwAVConfig, backbone: BackboneConfig, length: Length) -> None:
        super().__init__(length)
        self.config, self.joint_norm = config, config.joint_norm
        model = build_backbone(backbone, backbone.drop_path)
        self.online = Encoder(
            model, mlp(feature_width(model), config.hidden, config.width, hidden_norm=config.head_norm)
        )
        self.prototypes_KD = nn.Parameter(unit(torch.randn(config.prototypes, config.width)))

    def chance(self, images: int, *, real: bool = False) -> float:
        return math.log(self.config.prototypes)

    def scores(self, z_BD: Tensor) -> Tensor:
        """[…, K]: cosines of embeddings and prototypes, fp32; scaling the prototypes in the forward pass keeps them
        unit without a step of its own."""
        prototypes = unit(self.prototypes_KD)
        with fp32(z_BD.device):
            return unit(z_BD) @ prototypes.T

    def frozen(self) -> list[nn.Parameter]:
        return [self.prototypes_KD] if self.epoch < self.config.freeze_epochs else []

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        s_NBK = self.scores(per_view(self.online.head, features.online_BND, selection))
        codes_NBK = torch.stack([self.codes(s_BK) for s_BK in s_NBK])
        log_p_NBK = (s_NBK / self.config.temperature).log_softmax(-1)
        cross_NNB = -products(codes_NBK, log_p_NBK)
        a, b = pair_index(len(s_NBK), s_NBK.device).T
        return (cross_NNB[a, b] + cross_NNB[b, a]).T / 2

    def codes(self, s_BK: Tensor) -> Tensor:
        """[B, K]: assignments of the batch of all ranks that use all prototypes equally."""
        return sinkhorn(s_BK.detach(), self.config.epsilon, self.config.iterations)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        features1, features2 = self.pair_features(chosen)
        z1, z2 = self.pair_heads(features1, features2)
        s1, s2 = self.scores(z1), self.scores(z2)
        c1, c2 = self.codes(s1), self.codes(s2)
        self.seen_features_BD = features1.detach()
        self.keep_positives((z1, z2), (z2, z1))
        temperature = self.config.temperature
        loss1 = -(c1 * (s2 / temperature).log_softmax(1)).sum(1).mean()
        loss2 = -(c2 * (s1 / temperature).log_softmax(1)).sum(1).mean()
        used = (sum_over_ranks(c1.sum(0)) > 1e-3).float().mean()
        return (loss1 + loss2) / 2, {"prototypes_used": used}


@torch.no_grad()
def sinkhorn(s_BK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """[B, K]: rows sum to 1, and over the images of all ranks every column gets the same mass (appendix A.1 there)."""
    # Cosines are at most 1: the shift keeps exp in range and changes no result.
    q_BK = torch.exp((s_BK.float() - 1) / epsilon)
    for _ in range(iterations):
        q_BK = q_BK / (sum_over_ranks(q_BK.sum(0, keepdim=True)) * s_BK.shape[1]).clamp_min(1e-30)
        q_BK = q_BK / q_BK.sum(1, keepdim=True).clamp_min(1e-30)
    return q_BK
