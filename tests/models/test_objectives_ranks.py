"""Many ranks choose, lose, learn and analyse what one rank does on the whole batch, whatever the objective."""

from pathlib import Path

import pytest
import torch

from models.objectives import OBJECTIVES

from .launching import launch
from .objective_ranks import NAMES, step

SCRIPT = Path(__file__).parent / "objective_ranks.py"


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_selections_losses_and_gradients_are_those_of_one_rank(world, tmp_path):
    """Were SimCLR's gather to keep local gradients only, their average would be too small by the world size."""
    assert {name.partition("/")[0] for name in NAMES} == OBJECTIVES.keys()
    ranks = launch(SCRIPT, tmp_path, world)
    for name in NAMES:
        alone, found = step(name, 0, 1), [rank[name] for rank in ranks]
        losses = torch.cat([rank["losses"] for rank in found])
        torch.testing.assert_close(losses, alone["losses"], rtol=1e-4, atol=1e-4, msg=name)
        assert torch.equal(torch.cat([rank["choice"] for rank in found]), alone["choice"]), name
        for rank in found:
            torch.testing.assert_close(rank["loss"], alone["loss"], rtol=1e-4, atol=1e-4, msg=name)
            for group in ("gradients", "buffers"):
                assert rank[group].keys() == alone[group].keys()
                for part, value in alone[group].items():
                    difference = (rank[group][part] - value).float().norm()
                    rounding = 5e-3 if part.endswith("weight_XF") else 2e-4  # solves a linear system of few rows
                    assert difference <= rounding * value.float().norm() + 2e-4, f"{name} {group} {part}: {difference}"
        for number, task in enumerate(alone["analyses"]):
            for part, value in task.items():
                together = torch.cat([rank["analyses"][number][part] for rank in found])
                torch.testing.assert_close(together, value, rtol=1e-3, atol=1e-4, msg=f"{name} {part}")
        if name in ("moco_v3", "simclr"):  # each image has others of its class on other ranks
            assert (alone["analyses"][0]["false_negatives"] > 0).all()
        assert torch.stack([g.norm() for g in alone["gradients"].values()]).norm() > 1e-2, name  # no rounding
