"""Outputs of linear layers that scoring computed and the loss uses again: the same loss, gradients and updates."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.backbones import BackboneConfig
from models.known import KnownOutputs, known_outputs
from models.negatives import NONE
from models.selection import SelectionConfig, pairs, select

from .objective_cases import CONFIGS, STILL, built
from .toys import VIT, moby, views

SWIN = BackboneConfig("swin_tiny_patch4_window7_224", 32)
PAIRED = [name for name in CONFIGS if name not in ("dino", "ibot")]


def gradients(objective, chosen):
    """The loss and all gradients, by name."""
    objective.zero_grad()
    torch.manual_seed(3)
    loss, _ = objective.loss(chosen)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def assert_same_learning(objective, crops, **tolerance):
    scores = objective.pair_losses(crops, SelectionConfig())
    assert scores.known is not None and scores.known.outputs
    choice = select(scores.losses_BP, "hardest")
    chosen = objective.take(crops, choice, scores)
    assert chosen.known is not None and objective.take(crops, choice, scores).known is None
    loss, told = gradients(copy.deepcopy(objective), chosen)
    wanted, computed = gradients(copy.deepcopy(objective), replace(chosen, known=None))
    torch.testing.assert_close(loss, wanted, **tolerance)
    assert told.keys() == computed.keys()
    for name, gradient in computed.items():
        torch.testing.assert_close(told[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", PAIRED)
def test_every_objective_of_pairs_learns_the_same(name):
    assert_same_learning(built(name, STILL), (views(batch=6),), rtol=1e-4, atol=1e-5)


def test_windows_of_a_swin_find_their_views():
    assert_same_learning(moby(NONE, SWIN), (views(batch=2, side=32),), rtol=1e-3, atol=1e-4)


def test_in_bf16_the_layers_give_bf16_and_the_gradients_are_fp32():
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_learning(moby(NONE, replace(VIT, drop_path=0.0)), (views(),), rtol=0.05, atol=0.02)


def test_no_linear_layer_of_the_backbone_multiplies_again(monkeypatch):
    objective, crops = moby(NONE, replace(VIT, drop_path=0.0)), (views(),)
    scores = objective.pair_losses(crops, SelectionConfig())
    chosen = objective.take(crops, select(scores.losses_BP, "hardest"), scores)
    layers = [part for part in objective.online.backbone.modules() if isinstance(part, nn.Linear)]
    assert len(layers) == 8 == len(chosen.known[0])
    multiplied = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: multiplied.append(w.data_ptr()) or linear(x, w, b)
    )
    objective.loss(chosen)
    assert multiplied and not {layer.weight.data_ptr() for layer in layers} & set(multiplied)


@pytest.mark.parametrize(
    ("backbone", "selection"),
    [
        (VIT, SelectionConfig()),  # drop path
        (replace(VIT, drop_path=0.0, batchnorm_mlp=True), SelectionConfig()),
        (replace(VIT, drop_path=0.0), SelectionConfig(reuse=False)),
        (replace(VIT, drop_path=0.0), SelectionConfig(encoder="target")),
        (replace(VIT, drop_path=0.0), SelectionConfig(precision="bf16")),
        (replace(VIT, drop_path=0.0), SelectionConfig(layer=1)),
        (replace(VIT, drop_path=0.0), SelectionConfig(static_colour=True)),
    ],
    ids=["drop path", "batchnorm", "asked", "target", "precision", "layer", "colour"],
)
def test_nothing_is_kept_where_training_would_compute_something_else(backbone, selection):
    assert moby(NONE, backbone).pair_losses((views(),), selection).known is None


def test_nothing_is_kept_of_compiled_or_recomputed_backbones():
    for change in (lambda backbone: backbone.compile(), lambda backbone: backbone.set_grad_checkpointing(True)):
        objective = moby(NONE, replace(VIT, drop_path=0.0))
        change(objective.online.backbone)
        assert not objective.reuses_outputs(SelectionConfig(), torch.device("cpu"))


def test_known_outputs_of_chosen_rows_and_layers_are_as_before_afterwards():
    layer, x = nn.Linear(3, 2), torch.randn(4 * 3, 5, 3)
    known = KnownOutputs(4, 3)
    with torch.no_grad(), known.record(layer):
        y = layer(x).unflatten(0, (4, 3))
    choice = torch.tensor([0, 1, 2, 1])
    first, second = known.take(choice)
    wanted = [[y[image, pairs(3)[choice[image]][side]] for image in range(4)] for side in range(2)]
    assert torch.equal(first[0], torch.stack(wanted[0])) and torch.equal(second[0], torch.stack(wanted[1]))
    with known_outputs(layer, first):
        assert torch.equal(layer(torch.zeros(4, 5, 3)), first[0])
    assert "forward" not in vars(layer) and not torch.equal(layer(torch.zeros(4, 5, 3)), first[0])
