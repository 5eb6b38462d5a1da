"""Number formats of scoring: what they compute, where they apply, and what a device without them is told."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models import precision
from models.backbones import BackboneConfig
from models.negatives import NONE
from models.precision import arithmetic, check_format, fp8_linear, int8_linear, resolved
from models.selection import SelectionConfig

from .toys import CPU, INT8, VIT, moby, views

STILL = replace(VIT, drop_path=0.0)


QUANTISED = [pytest.param("int8", marks=INT8), "fp8"]
LINEAR = {"int8": int8_linear, "fp8": fp8_linear}


@pytest.mark.parametrize("bias", [True, False])
def test_fp8_layers_are_close_to_exact_ones(bias):
    layer = nn.Linear(64, 48, bias=bias)
    x = torch.randn(5, 7, 64) * torch.logspace(-3, 3, 7)[:, None]  # rows of very different size
    with torch.no_grad():
        exact, found = layer(x), fp8_linear(layer, x)
    off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    assert 1e-4 < off.max() < 0.06


def int8_reference(layer: nn.Linear, x: Tensor) -> Tensor:
    """Whole numbers multiplied one by one: of x from 0 to 127 (254 with VNNI), between its ends or 0; of each row of
    the weights from −127 to 127."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / (254 if torch.cpu._is_vnni_supported() else 127)
    zero = round(-low / step)
    steps_E1 = layer.weight.abs().amax(1, keepdim=True) / 127
    whole, weight = torch.floor(x / step + zero + 0.5) - zero, torch.round(layer.weight / steps_E1)
    products = whole.double() @ weight.double().T * step * steps_E1.T
    return (products if layer.bias is None else products + layer.bias).float()


@INT8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_int8_layers_compute_with_whole_numbers(bias, shift):
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(5, 7, 64) + shift
    with torch.no_grad():
        exact, found, expected = layer(x), int8_linear(layer, x), int8_reference(layer, x)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.025


@INT8
@pytest.mark.parametrize("low", [-1.0, -0.17, 0.0, 0.5, 1.0])
def test_sums_of_the_largest_int8_values_are_exact(low):
    """Instructions that add products in 16 bits would cut them off. All positive, as after a ReLU, or from `low`."""
    layer, x = nn.Linear(192, 8, bias=False), torch.full((6, 192), 1.0)
    layer.weight.data.fill_(1.0)[::2] *= -1
    x[0] = low
    with torch.no_grad():
        torch.testing.assert_close(int8_linear(layer, x), layer(x), rtol=1e-2, atol=1.0)


@INT8
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_int8(value):
    layer, x = nn.Linear(16, 8), torch.randn(2, 3, 16)
    x[1, 2, 3] = value
    assert int8_linear(layer, x).isnan().all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_row_of_zeros_gives_the_bias(kind):
    layer = nn.Linear(16, 8)
    torch.testing.assert_close(LINEAR[kind](layer, torch.zeros(3, 16)), layer.bias.expand(3, -1))


@pytest.mark.parametrize(("kind", "choices"), [pytest.param("int8", 0.9, marks=INT8), ("fp8", 0.8)])
def test_scores_in_low_precision_choose_mostly_the_same(kind, choices, monkeypatch):
    monkeypatch.setattr(precision, "has_units", lambda device, kind: True)
    objective, crops = moby(NONE, STILL), (views(batch=60),)
    exact = objective.pair_losses(crops, SelectionConfig())
    found = objective.pair_losses(crops, SelectionConfig(precision=kind))
    assert not torch.equal(exact.losses_BP, found.losses_BP) and found.features_BND is None
    assert (exact.losses_BP.argmax(1) == found.losses_BP.argmax(1)).float().mean() >= choices


@pytest.mark.parametrize("kind", QUANTISED)
def test_only_the_backbones_given_are_quantised(kind):
    inside, outside = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with torch.no_grad():
        exact = inside(x), outside(x)
        with arithmetic(kind, CPU, inside):
            found = inside(x)
            assert not torch.equal(found, exact[0]) and torch.equal(outside(x), exact[1])
            with arithmetic(kind, CPU, inside):
                assert torch.equal(inside(x), found)
            assert torch.equal(inside(x), found)
        assert torch.equal(inside(x), exact[0])


@pytest.mark.parametrize("kind", ["bf16", *QUANTISED])
def test_a_target_with_a_format_of_its_own_always_computes_in_it(kind):
    objective, (x_BCHW, *_) = moby(NONE, replace(STILL, target_precision=kind)), views().unbind(1)
    target = objective.target
    with torch.no_grad():
        exact, found = target.backbone(x_BCHW), target.features(x_BCHW)
        with arithmetic(kind, CPU, target.backbone):
            torch.testing.assert_close(found, target.backbone(x_BCHW).float())
        parts = target.finish(target.begin(x_BCHW, 1), 1)
    assert found.dtype == torch.float32 and 1e-4 < (found - exact).norm() / exact.norm() < 0.2
    torch.testing.assert_close(parts, found)
    assert "forward" not in vars(target.backbone.blocks[0].attn.qkv)


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
    with pytest.raises(ValueError, match=r"backbone.target_precision: this cpu device does not multiply in int8"):
        moby(NONE, replace(STILL, target_precision="int8")).check(SelectionConfig())
    check_format("selection.precision", "bf16", CPU, nn.Linear(2, 2))  # slow without units, but right


@INT8
def test_a_backbone_without_linear_layers_is_not_for_int8():
    resnet = BackboneConfig("resnet10t", 32, target_precision="int8")
    with pytest.raises(ValueError, match=r"backbone.target_precision: int8 is for linear layers, and this"):
        moby(NONE, resnet).check(SelectionConfig())
    moby(NONE, replace(resnet, target_precision="bf16")).check(SelectionConfig())


def test_a_resnet_s_features_in_bf16_are_given_in_fp32():
    target = moby(NONE, BackboneConfig("resnet10t", 32, target_precision="bf16")).target
    assert target.features(torch.randn(2, 3, 32, 32)).dtype == torch.float32
