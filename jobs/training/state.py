"""A run in memory: what belongs to it, and what a checkpoint holds of it."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from jobs.log.writer import AugmentationLog
from jobs.run.config import PretrainConfig, to_plain
from jobs.run.data import Data
from jobs.run.folder import RunFolder
from jobs.run.optim import Schedule
from jobs.run.world import World
from jobs.training.health import FiniteGuard
from jobs.training.monitor import Monitor
from jobs.training.saving import CheckpointWriter
from jobs.training.timing import StepTimer
from models.objectives import Length, Objective
from pipelines.stream import ViewStream


class Stateful(Protocol):
    """Whatever has a state that checkpoints hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class Training:
    """A run in memory. `step` counts finished steps; the stream stands at step × batch."""

    config: PretrainConfig
    folder: RunFolder
    world: World
    data: Data
    length: Length
    objective: Objective
    learner: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    stream: ViewStream
    log: AugmentationLog
    monitor: Monitor
    timer: StepTimer
    guard: FiniteGuard
    saver: CheckpointWriter | None
    """On the leading rank."""
    kept: dict[str, Stateful]
    """What a checkpoint holds beside step and configuration, and a resumed run takes back."""
    step: int = 0

    @property
    def learned(self) -> list[nn.Parameter]:
        """Parameters that the optimizer changes."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def save(t: Training) -> None:
    """Commits the log on every rank; then a checkpoint is taken on the leading one, and written as training goes on.

    Raises:
        OSError: a disk that is full; the checkpoints before stay usable.
    """
    with t.timer.phase("log", host=True):
        t.log.commit()
    t.world.barrier()
    if t.saver is not None:
        content = {"config": to_plain(t.config), **{name: part.state_dict() for name, part in t.kept.items()}}
        with t.timer.phase("checkpoint", host=True):
            t.saver.save(t.step, content, t.monitor.newest_knn)
