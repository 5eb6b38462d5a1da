"""Small objectives and rows for the tests."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones import BackboneConfig
from models.negatives import NegativesConfig
from models.objectives import Length, build_objective
from models.objectives.moby import MoBY, MoBYConfig

CPU = torch.device("cpu")
VIT = BackboneConfig("vit_tiny_patch16_224", 16, patch_size=8, width=32, depth=2, heads=2, drop_path=0.2)
SIX = NegativesConfig(8, 3, 4, 5, 2, 6, 1, start_epoch=0, last_epochs_without=0)


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def moby(negatives: NegativesConfig = SIX, backbone: BackboneConfig = VIT, queue: int = 32, **fields: object) -> MoBY:
    config = replace(MoBYConfig(negatives, queue=queue, hidden=16, width=12), **fields)
    objective = build_objective(config, backbone, Length(10, 5)).train()
    assert isinstance(objective, MoBY)
    return objective


def views(batch: int = 5, count: int = 4, side: int = 16) -> Tensor:
    return torch.randn(batch, count, 3, side, side)
