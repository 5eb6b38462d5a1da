"""SimCLR (Chen et al. 2020, algorithm 1).

    z1, z2 = f(x1), f(x2)                  # backbone + projector
    loss = NT-Xent(z1, z2)                 # negatives: both views of all other images of all ranks

Shape suffixes: B images, P pairs, D width.
"""

from dataclasses import dataclass

from torch import Tensor

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.contrast import Contrast, chance, contrastive_loss
from models.distributed import gather_with_gradient
from models.heads import mlp, unit
from models.in_batch import batch_contrast, check_others, nt_xent_pair_losses
from models.negatives import NONE, NegativesConfig
from models.objectives.base import Chosen, Encoder, Features, Length, Metrics, Objective, check_positive, per_view
from models.selection import SelectionConfig


@dataclass(frozen=True)
class SimCLRConfig:
    """SimCLR; with counts of synthetic negatives above 0, those are made from the batch's embeddings."""

    temperature: float = 0.2
    """τ of the contrastive loss."""
    hidden: int = 2048
    """Width of the projector's hidden layers."""
    width: int = 128
    """Width of the embedding."""
    layers: int = 2
    """Layers of the projector (3 in MoCo v3's comparison on ViTs)."""
    joint_norm: bool = True
    """BatchNorm's statistics are of both views together, as in the authors' code; false = of each view by itself. Pairs
    are scored by statistics that `selection.batchnorm` names."""
    negatives: NegativesConfig = NONE
    """Synthetic hard negatives, made from both views of the other images; all counts 0 = none, as published."""
    oracle: bool = False
    """Leave out negatives with the view's label, and make no synthetic ones of them (MoCHi, section 3.2: an upper
    bound for analyses; needs labels). Pairs are chosen without knowing labels."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "hidden", "width", "layers")


class SimCLR(Objective):
    """SimCLR."""

    def __init__(self, config: SimCLRConfig, backbone: BackboneConfig, length: Length) -> None:
        super().__init__(length)
        self.config, self.joint_norm = config, config.joint_norm
        model = build_backbone(backbone, backbone.drop_path)
        projector = mlp(feature_width(model), config.hidden, config.width, layers=config.layers, last_norm=True)
        self.online = Encoder(model, projector)

    def check_batch(self, images: int) -> None:
        super().check_batch(images)
        check_others(self.config.negatives, images, 2)

    def chance(self, images: int, *, real: bool = False) -> float:
        synthetic = None if real else self.config.negatives.at(self.epoch, self.length.epochs)
        return chance(2 * images, synthetic, left_out=2)

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        z_NBD = unit(per_view(self.online.head, features.online_BND, selection))
        return nt_xent_pair_losses(z_NBD, self.config.temperature)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        features1, features2 = self.pair_features(chosen)
        z1, z2 = (unit(z_BD) for z_BD in self.pair_heads(features1, features2))
        # Gradients flow to other ranks' rows too: their average over ranks is then that of one large batch.
        all1, all2 = gather_with_gradient(z1), gather_with_gradient(z2)
        tasks = [self._task(z1, z2, [all2, all1], labels_B), self._task(z2, z1, [all1, all2], labels_B)]
        self.contrasts = [task.detached() for task in tasks] if self.watching else []
        self.keep_positives((z1, z2), (z2, z1))
        self.seen_features_BD = features1.detach()
        loss, metrics = contrastive_loss(tasks, 1 / 2)
        return loss, metrics | {"cosine": (z1 * z2).sum(1).mean().detach()}

    def _task(self, z_BD: Tensor, other_BD: Tensor, sets: list[Tensor], labels_B: Tensor | None) -> Contrast:
        config = self.config
        synthetic = config.negatives.at(self.epoch, self.length.epochs)
        labelled = self.watching or config.oracle
        return batch_contrast(
            z_BD, other_BD, sets, config.temperature, synthetic, labels_B, labelled=labelled, oracle=config.oracle
        )
