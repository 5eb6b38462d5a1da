"""Number formats of scoring: what they compute, where they apply, and what a device without them is told."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models import precision
from models.negatives import NONE
from models.precision import arithmetic, check_units, fp8_linear, int8_linear, resolved
from models.selection import SelectionConfig

from .toys import VIT, moby, views

CPU = torch.device("cpu")
STILL = replace(VIT, drop_path=0.0)


@pytest.mark.parametrize(("forward", "error"), [(int8_linear, 0.015), (fp8_linear, 0.06)])
@pytest.mark.parametrize("bias", [True, False])
def test_quantised_layers_are_close_to_exact_ones(forward, error, bias):
    layer = nn.Linear(64, 48, bias=bias)
    x = torch.randn(5, 7, 64) * torch.logspace(-3, 3, 7)[:, None]  # rows of very different size
    with torch.no_grad():
        exact, found = layer(x), forward(layer, x)
    off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    assert 1e-4 < off.max() < error


def test_a_row_of_zeros_gives_the_bias():
    layer = nn.Linear(16, 8)
    for forward in (int8_linear, fp8_linear):
        torch.testing.assert_close(forward(layer, torch.zeros(3, 16)), layer.bias.expand(3, -1))


@pytest.mark.parametrize(("kind", "choices"), [("int8", 0.9), ("fp8", 0.8)])
def test_scores_in_low_precision_choose_mostly_the_same(kind, choices, monkeypatch):
    monkeypatch.setattr(precision, "has_units", lambda device, kind: True)
    objective, crops = moby(NONE, STILL), (views(batch=60),)
    exact = objective.pair_losses(crops, SelectionConfig())
    found = objective.pair_losses(crops, SelectionConfig(precision=kind))
    assert not torch.equal(exact.losses_BP, found.losses_BP) and found.features_BND is None
    assert (exact.losses_BP.argmax(1) == found.losses_BP.argmax(1)).float().mean() >= choices


def test_only_the_backbones_given_are_quantised():
    inside, outside = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with torch.no_grad():
        exact = inside(x), outside(x)
        with arithmetic("int8", CPU, inside):
            assert not torch.equal(inside(x), exact[0]) and torch.equal(outside(x), exact[1])
        assert torch.equal(inside(x), exact[0])


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_bf16_where_the_device_multiplies_in_it(units, monkeypatch):
    monkeypatch.setattr(precision, "has_units", lambda device, kind: units)
    assert resolved("auto", CPU) == ("bf16" if units else "same")
    assert resolved("bf16", CPU) == "bf16" and resolved("same", CPU) == "same"
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with arithmetic("auto", CPU, layer):
        assert layer(x).dtype == (torch.bfloat16 if units else torch.float32)
    scores = moby(NONE, replace(STILL, target_precision="auto")).pair_losses(
        (views(),), SelectionConfig(precision="auto")
    )
    assert scores.features_BND is not None  # both in the same arithmetic, so the loss uses them again


def test_a_device_without_units_is_told_what_to_take(monkeypatch):
    monkeypatch.setattr(precision, "has_units", lambda device, kind: False)
    with pytest.raises(ValueError, match=r"selection.precision: this cpu device does not multiply in fp8; take auto"):
        moby(NONE, STILL).check(SelectionConfig(precision="fp8"))
    check_units("bf16", CPU)  # slow without units, but right
