"""A kNN accuracy of the training stream, against features that training leaves behind.

Shape suffixes: B images of all ranks, M rows of the bank, D width, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.knn import HEADLINE, TEMPERATURE
from jobs.run.config import PretrainConfig
from jobs.run.data import Data
from models.backbones import feature_width
from models.objectives import Objective


class MemoryBank(nn.Module):
    """Features of training images, kept up to date by every step, and a kNN accuracy against them (MoCo v3, section 4).

    A sample's row is its id modulo M; with M at least the number of images every image has its own row, as published.
    An image's own row never votes for it.
    """

    features_MD: Tensor
    labels_M: Tensor

    def __init__(self, rows: int, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("features_MD", torch.zeros(rows, width, dtype=torch.float16))
        self.register_buffer("labels_M", torch.full((rows,), -1, dtype=torch.int64))

    @torch.no_grad()
    def score(self, sample_B: Tensor, features_BD: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B] each: which labelled images their neighbours in the bank classify rightly, which have any there."""
        similarity_BM = (self._unit(features_BD) @ self.features_MD.T).float()
        similarity_BM.masked_fill_(self.labels_M < 0, -torch.inf)
        own_B1 = (sample_B % len(self.labels_M))[:, None]
        similarity_BM.scatter_(1, own_B1, -torch.inf)
        top = similarity_BM.topk(min(HEADLINE, similarity_BM.shape[1]), dim=1)
        votes_BC = torch.zeros(len(sample_B), self.classes, device=sample_B.device)
        voters = self.labels_M[top.indices].clamp_min(0)
        votes_BC.scatter_add_(1, voters, (top.values / TEMPERATURE).exp())
        counted_B = (labels_B >= 0) & torch.isfinite(top.values[:, 0])
        right_B = (votes_BC.argmax(1) == labels_B) & counted_B
        return right_B, counted_B

    @torch.no_grad()
    def update(self, sample_B: Tensor, features_BD: Tensor, labels_B: Tensor) -> None:
        """Takes the images in."""
        rows_B = sample_B % len(self.labels_M)
        self.features_MD[rows_B] = self._unit(features_BD)
        self.labels_M[rows_B] = labels_B

    def _unit(self, features_BD: Tensor) -> Tensor:
        return F.normalize(features_BD.float(), dim=1).to(self.features_MD.dtype)


def open_bank(config: PretrainConfig, data: Data, objective: Objective, device: torch.device) -> MemoryBank | None:
    """The memory bank of a run; None where the configuration asks for none or the images have no labels."""
    classes = max(len(manifest.classes) for manifest in data.manifests)
    if not config.monitor.bank or not classes:
        return None
    rows = min(config.monitor.bank, len(data.reader))
    return MemoryBank(rows, feature_width(objective.backbone), classes).to(device)
