"""The objectives by name."""

from typing import Literal

from models.backbones import BackboneConfig
from models.objectives.base import Length, Objective
from models.objectives.byol import BYOL, BYOLConfig
from models.objectives.dino import DINO, DINOConfig
from models.objectives.ibot import IBOT, IBOTConfig
from models.objectives.moby import MoBY, MoBYConfig
from models.objectives.moco_v3 import MoCoV3, MoCoV3Config
from models.objectives.simclr import SimCLR, SimCLRConfig
from models.objectives.simsiam import SimSiam, SimSiamConfig
from models.objectives.swav import SwAV, SwAVConfig

ObjectiveConfig = (
    MoBYConfig | MoCoV3Config | SimCLRConfig | SimSiamConfig | BYOLConfig | SwAVConfig | DINOConfig | IBOTConfig
)

OBJECTIVES: dict[str, tuple[type, type[Objective]]] = {
    "moby": (MoBYConfig, MoBY),
    "moco_v3": (MoCoV3Config, MoCoV3),
    "simclr": (SimCLRConfig, SimCLR),
    "simsiam": (SimSiamConfig, SimSiam),
    "byol": (BYOLConfig, BYOL),
    "swav": (SwAVConfig, SwAV),
    "dino": (DINOConfig, DINO),
    "ibot": (IBOTConfig, IBOT),
}


def build_objective(config: ObjectiveConfig, backbone: BackboneConfig, length: Length) -> Objective:
    """The objective that a config belongs to, with freshly drawn weights from torch's global generator.

    Raises:
        ValueError: a value that cannot be; the message has field, value and remedy.
    """
    for kind, objective in OBJECTIVES.values():
        if type(config) is kind:
            return objective(config, backbone, length)  # type: ignore[call-arg]
    known = ", ".join(f"{kind.__name__} ({name})" for name, (kind, _) in OBJECTIVES.items())
    raise ValueError(f"objective: {type(config).__name__} is no objective's config; known: {known}")


def kept_encoder(config: ObjectiveConfig) -> Literal["online", "target"]:
    """Which encoder's backbone the objective that a config belongs to keeps for evaluation."""
    return next(objective for kind, objective in OBJECTIVES.values() if type(config) is kind).keeps
