"""SimSiam (Chen & He 2021, algorithm 1).

    z1, z2 = f(x1), f(x2)                  # backbone + projector (3 layers)
    p1, p2 = h(z1), h(z2)                  # predictor, a bottleneck
    loss = −cos(p1, stopgrad(z2)) / 2 − cos(p2, stopgrad(z1)) / 2

Shape suffixes: B images, N views, P pairs, D width.
"""

from dataclasses import dataclass

from torch import Tensor

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.heads import mlp, unit
from models.objectives.base import (
    Chosen,
    Encoder,
    Features,
    Length,
    Metrics,
    Objective,
    check_positive,
    per_view,
    products,
)
from models.selection import SelectionConfig, pair_index


@dataclass(frozen=True)
class SimSiamConfig:
    """SimSiam."""

    width: int = 2048
    """Width of the projector and of the embedding."""
    bottleneck: int = 512
    """Width of the predictor's hidden layer."""

    def __post_init__(self) -> None:
        check_positive(self, "width", "bottleneck")


class SimSiam(Objective):
    """SimSiam."""

    def __init__(self, config: SimSiamConfig, backbone: BackboneConfig, length: Length) -> None:
        super().__init__(length)
        model = build_backbone(backbone, backbone.drop_path)
        projector = mlp(feature_width(model), config.width, config.width, layers=3, last_norm=True)
        self.online = Encoder(model, projector, mlp(config.width, config.bottleneck, config.width))

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        z_NBD = per_view(self.online.projector, features.online_BND, selection)
        p_NBD = per_view(self.online.predict, z_NBD.transpose(0, 1), selection)
        cosine_NNB = products(unit(p_NBD), unit(z_NBD))
        a, b = pair_index(len(z_NBD), z_NBD.device).T
        return -(cosine_NNB[a, b] + cosine_NNB[b, a]).T / 2

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        features1, features2 = self.pair_features(chosen)
        z1, z2 = self.online.projector(features1), self.online.projector(features2)
        p1, p2 = self.online.predict(z1), self.online.predict(z2)
        self.seen_features_BD = features1.detach()
        self.keep_positives((p1, z2), (p2, z1))
        cosine = ((unit(p1) * unit(z2.detach())).sum(1) + (unit(p2) * unit(z1.detach())).sum(1)).mean() / 2
        # 1/√D where embeddings are spread, 0 where they have collapsed (SimSiam, figure 2)
        spread = unit(z1.detach()).std(0).mean()
        return -cosine, {"embedding_std": spread}
