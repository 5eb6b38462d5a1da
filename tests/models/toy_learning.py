"""A toy data set whose classes drown in what views do not share, and a short training run on it.

An image is its class's pattern, a weaker pattern of its own, and in each quarter a sum of fixed distracting patterns
with random weights, which every view draws anew. Whoever learns to be invariant to these sees the classes.

B images, N views, C classes, 3HW pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    """Training and test images without distractions, others of the same classes (a clone), labels, and the distracting
    patterns."""

    images: Tensor
    clones: Tensor
    labels: Tensor
    patterns: Tensor

    def views(self, rows_B: Tensor, count: int, side: int = SIDE, cloned_B: Tensor | None = None) -> Tensor:
        """[B, N, 3, side, side]: the images, or where marked their clones, among fresh distractions; smaller sides show
        a corner."""
        weights = torch.randn(len(rows_B), count, DISTRACTIONS, 2, 2) * STRENGTH
        weights = weights.repeat_interleave(SIDE // 2, 3).repeat_interleave(SIDE // 2, 4)
        images = self.images[rows_B]
        if cloned_B is not None:
            images = torch.where(cloned_B[:, None, None, None], self.clones[rows_B], images)
        found = images[:, None] + torch.einsum("bnkhw,kchw->bnchw", weights, self.patterns)
        return found[..., :side, :side]


def toy(count: int = 512) -> Toy:
    generator = torch.Generator().manual_seed(3)

    def pattern(*shape: int) -> Tensor:
        return torch.randn(*shape, 3, SIDE, SIDE, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    classes, own, distractions = pattern(CLASSES)[labels], pattern(count), pattern(DISTRACTIONS)
    return Toy(classes + 0.7 * own, classes + 0.7 * pattern(count), labels, distractions)


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


def image_std(objective: Objective, data: Toy) -> float:
    """Standard deviation of what images have for features in the mean over 8 views, as a share of the most: 1 where
    features tell images apart whatever the views, 1/√8 where they tell views alone, 0 where all are alike."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        views = data.views(torch.arange(256), 8)
    backbone = objective.online.backbone.eval()
    with torch.no_grad():
        features = F.normalize(backbone(views.flatten(0, 1)), dim=1).unflatten(0, views.shape[:2])
    backbone.train()
    return float(features.mean(1).std(0).mean()) * features.shape[2] ** 0.5


def train(
    config: ObjectiveConfig,
    steps: int,
    rule: Rule = "hardest",
    lr: float = 2e-3,
    backbone: BackboneConfig = BACKBONE,
    *,
    views: int = 4,
    sgd: bool = False,
    clones: float = 0.0,
) -> tuple[float, float, dict[str, float]]:
    """kNN accuracy before and after, and the last metrics with `image_std`. 256 views a step, by AdamW or by SGD;
    a share of the images are `clones`, the kNN's never."""
    torch.manual_seed(0)
    data, batch = toy(), 256 // views
    objective = build_objective(config, backbone, Length(steps, steps / 10)).train()
    learned = [p for p in objective.parameters() if p.requires_grad]
    descent = torch.optim.SGD(learned, lr, momentum=0.9, weight_decay=1e-4) if sgd else torch.optim.AdamW(learned, lr)
    selection = SelectionConfig(views=views, rule=rule)
    before, metrics = knn(objective, data), {}
    for _ in range(steps):
        rows = torch.randint(len(data.labels) // 2, (batch,))
        cloned = torch.rand(batch) < clones if clones else None
        crops = (data.views(rows, views, cloned_B=cloned),)
        if isinstance(objective, DINO) and objective.config.local_views:
            crops = (*crops, data.views(rows, 2 * objective.config.local_views, SIDE // 2))
        scores = objective.pair_losses(crops, selection)
        looked_at = torch.rand_like(scores.losses_BP) if rule == "random" else scores.losses_BP
        chosen = objective.take(crops, select(looked_at, rule), scores)
        loss, metrics = objective.loss(chosen)
        descent.zero_grad()
        loss.backward()
        objective.before_step()
        descent.step()
        objective.after_step()
    last = {name: float(value) for name, value in metrics.items()}
    return before, knn(objective, data), last | {"image_std": image_std(objective, data)}
