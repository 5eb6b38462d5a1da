"""The objectives by name."""

from models.backbones import BackboneConfig
from models.objectives.base import Length, Objective
from models.objectives.moby import MoBY, MoBYConfig

ObjectiveConfig = MoBYConfig

OBJECTIVES: dict[str, tuple[type, type[Objective]]] = {
    "moby": (MoBYConfig, MoBY),
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
