"""What a training step's roofline counts."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jobs.benches.training import forward_units
from jobs.run.config import PretrainConfig
from jobs.run.world import World
from models.selection import SelectionConfig
from tests.models.objective_cases import built, crops_for


@pytest.mark.parametrize(
    ("selection", "units"),
    [
        (SelectionConfig(views=2, rule="random"), 2 * 3 + 2),
        (SelectionConfig(), 2 * 3 + 4 + 4),  # the target's features of the pair are used again
        (SelectionConfig(encoder="target"), 2 * 3 + 4),
        (SelectionConfig(resolution=8), 2 * 3 + 2 + 4 + 4),  # scored on other views than the loss has
    ],
    ids=["plain", "hard", "target", "smaller"],
)
def test_forwards_are_counted_as_a_step_does_them(selection: SelectionConfig, units: int) -> None:
    objective, forwards = built("moby"), []
    for encoder, cost in ((objective.online, 3), (objective.target, 1)):
        assert encoder is not None

        def count(part: Any, given: Any, features: torch.Tensor, cost: int = cost) -> None:
            forwards.append(len(features) / 5 * (cost if features.requires_grad else 1))

        encoder.backbone.register_forward_hook(count)
    crops = crops_for("moby")
    scores = objective.pair_losses(crops, selection) if selection.scores(0) else None
    objective.loss(objective.take(crops, torch.zeros(5, dtype=torch.int64), scores))
    config = PretrainConfig(selection=selection)
    t = SimpleNamespace(config=config, objective=objective, world=World(0, 1, torch.device("cpu")), step=0)
    assert forward_units(cast(Any, t)) == sum(forwards) == units
