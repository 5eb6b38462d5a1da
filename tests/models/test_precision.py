"""Number format of scoring: where it applies, and what `auto` stands for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models import precision
from models.negatives import NONE
from models.precision import arithmetic, resolved
from models.selection import SelectionConfig

from .toys import CPU, VIT, moby, views

STILL = replace(VIT, drop_path=0.0)


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_bf16_where_the_device_multiplies_in_it(units, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16_units", lambda device: units)
    assert resolved("auto", CPU) == ("bf16" if units else "same")
    assert resolved("bf16", CPU) == "bf16" and resolved("same", CPU) == "same"
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with arithmetic("auto", CPU):
        assert layer(x).dtype == (torch.bfloat16 if units else torch.float32)
    assert layer(x).dtype == torch.float32


def test_scores_in_bf16_choose_mostly_the_same():
    objective, crops = moby(NONE, STILL), (views(batch=60),)
    exact = objective.pair_losses(crops, SelectionConfig())
    found = objective.pair_losses(crops, SelectionConfig(precision="bf16"))
    assert found.losses_BP.dtype == torch.float32
    assert not torch.equal(exact.losses_BP, found.losses_BP) and found.features_BND is None
    assert (exact.losses_BP.argmax(1) == found.losses_BP.argmax(1)).float().mean() >= 0.9
