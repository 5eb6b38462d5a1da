"""A toy data set whose classes drown in what views do not share, and a short training run on it.

An image is its class's pattern, a weaker pattern of its own, and in each quarter a sum of fixed distracting patterns
with random weights, which every view draws anew. Whoever learns to be invariant to these sees the classes.

B images, N views, C classes, 3HW pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.backbones import BackboneConfig
from models.objectives import Length, Objective, ObjectiveConfig, build_objective
from models.objectives.dino import DINO
from models.probes import weighted_knn
from models.selection import Rule, SelectionConfig, select

SIDE, CLASSES, DISTRACTIONS, STRENGTH = 16, 8, 6, 1.0
BACKBONE = BackboneConfig("vit_tiny_patch16_224", SIDE, 8, 32, 1, 2)


@dataclass
class Toy:
    """Training and test images without distractions, labels, and the distracting patterns."""

    images: Tensor
    labels: Tensor
    patterns: Tensor

    def views(self, rows_B: Tensor, count: int, side: int = SIDE) -> Tensor:
        """[B, N, 3, side, side]: the images among fresh distractions; smaller sides show a corner."""
        weights = torch.randn(len(rows_B), count, DISTRACTIONS, 2, 2) * STRENGTH
        weights = weights.repeat_interleave(SIDE // 2, 3).repeat_interleave(SIDE // 2, 4)
        found = self.images[rows_B, None] + torch.einsum("bnkhw,kchw->bnchw", weights, self.patterns)
        return found[..., :side, :side]


def toy(count: int = 512) -> Toy:
    generator = torch.Generator().manual_seed(3)

    def pattern(*shape: int) -> Tensor:
        return torch.randn(*shape, 3, SIDE, SIDE, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Toy(pattern(CLASSES)[labels] + 0.7 * pattern(count), labels, pattern(DISTRACTIONS))


def knn(objective: Objective, data: Toy) -> float:
    """Accuracy on the second half of the images by the first half's features."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        seen = data.views(torch.arange(len(data.labels)), 1)[:, 0]
    backbone = objective.online.backbone.eval()
    with torch.no_grad():
        features = backbone(seen)
    backbone.train()
    half = len(seen) // 2
    votes = weighted_knn(features[:half], data.labels[:half], features[half:], CLASSES, (10,))[10]
    return float((votes.argmax(1) == data.labels[half:]).float().mean())


def train(
    config: ObjectiveConfig, steps: int, rule: Rule = "hardest", lr: float = 2e-3, backbone: BackboneConfig = BACKBONE
) -> tuple[float, float, dict[str, float]]:
    """kNN accuracy before and after, and the last metrics."""
    torch.manual_seed(0)
    data, batch = toy(), 64
    objective = build_objective(config, backbone, Length(steps, steps / 10)).train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr)
    selection = SelectionConfig(views=4, rule=rule)
    before, metrics = knn(objective, data), {}
    for _ in range(steps):
        rows = torch.randint(len(data.labels) // 2, (batch,))
        crops = (data.views(rows, 4),)
        if isinstance(objective, DINO) and objective.config.local_views:
            crops = (*crops, data.views(rows, 2 * objective.config.local_views, SIDE // 2))
        scores = objective.pair_losses(crops, selection)
        looked_at = torch.rand_like(scores.losses_BP) if rule == "random" else scores.losses_BP
        chosen = objective.take(crops, select(looked_at, rule), scores)
        loss, metrics = objective.loss(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
    return before, knn(objective, data), {name: float(value) for name, value in metrics.items()}
