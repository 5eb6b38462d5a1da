"""Choosing pairs: the rules, the gather, and that scoring leaves no trace."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from jobs.benches.obvious import loop_pair_losses
from models.backbones import BackboneConfig
from models.selection import (
    RULES,
    SelectionConfig,
    audit,
    pair_index,
    pairs,
    regret,
    same_policy,
    select,
    take_pair,
    without_side_effects,
)

from .toys import VIT, moby, views

RESNET = BackboneConfig("resnet10t", 32, drop_path=0.1)
BN_VIT = replace(VIT, batchnorm_mlp=True)
CPU = torch.device("cpu")


def test_rules_choose_what_they_say():
    scores = torch.tensor([[1.0, 3, 2], [5, 4, 4]])
    assert select(scores, "hardest").tolist() == [1, 0]
    assert select(scores, "easiest").tolist() == [0, 1]
    assert select(scores, "lowest-iou").tolist() == [0, 1]
    assert select(scores, "random").tolist() == [1, 0]


def test_random_numbers_choose_every_pair_alike():
    chosen = select(torch.rand(30_000, 6), "random")
    assert (chosen.bincount(minlength=6) / 30_000 - 1 / 6).abs().max() < 0.01


@pytest.mark.parametrize("rule", list(RULES))
def test_barred_pairs_never_win(rule):
    barred = same_policy(4, CPU)
    assert [pairs(4)[p] for p in range(6) if not barred[p]] == [(0, 1), (0, 3), (1, 2), (2, 3)]
    chosen = select(torch.randn(500, 6), rule, barred)
    assert not barred[chosen].any()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_pair_is_taken_in_one_gather(count):
    values = torch.randn(9, count, 2, 3)
    choice = torch.randint(len(pairs(count)), (9,))
    taken = take_pair(values, choice)
    for image in range(9):
        a, b = pairs(count)[choice[image]]
        assert torch.equal(taken[image], values[image, [a, b]])
    assert pair_index(count, CPU) is pair_index(count, CPU)  # no copy from the host in every step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 1}, "selection.views: 1 leaves no pair to choose; give 2 or more"),
        ({"rule": "worst"}, "selection.rule: 'worst' is unknown; known: hardest, easiest, random, lowest-iou"),
        ({"encoder": "both"}, "selection.encoder: 'both' is unknown; known: online, target"),
        ({"precision": "fp4"}, "selection.precision: 'fp4' is unknown; known: same, auto, bf16"),
        ({"batchnorm": "none"}, "selection.batchnorm: 'none' is unknown; known: view, joint, running"),
        ({"every": 0}, "selection.every: 0 must be at least 1"),
        ({"resolution": 0}, "selection.resolution: 0 must be at least 1"),
        ({"random_share": 1.5}, "selection.random_share: 1.5 must lie between 0 and 1"),
        ({"audit_every": -1}, "selection.audit_every: -1 must be 0 or above"),
    ],
)
def test_bad_values_say_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**changes)


def test_when_pairs_are_scored_and_audited():
    assert [SelectionConfig(every=3).scores(step) for step in range(4)] == [True, False, False, True]
    assert not SelectionConfig(rule="random").scores(0) and not SelectionConfig(views=2).scores(0)
    assert [SelectionConfig(audit_every=2).audits(step) for step in range(3)] == [True, False, True]
    assert not SelectionConfig().audits(0)
    cheap = SelectionConfig(
        views=6, encoder="target", precision="bf16", resolution=8, layer=1, every=2, random_share=0.5
    )
    assert cheap.full == SelectionConfig(views=6)


def test_a_lagging_judge_gets_random_pairs_beside_its_own_unless_told_otherwise():
    shares = [SelectionConfig(encoder=e).share_at_random for e in ("online", "target")]
    assert shares == [0, 0.25] and SelectionConfig(encoder="target", random_share=0).share_at_random == 0


def state_of(objective):
    tensors = {name: t.clone() for name, t in objective.state_dict().items() if isinstance(t, torch.Tensor)}
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in objective.modules()]
    gradients = [p.grad is None for p in objective.parameters()]
    return tensors, modes, gradients, torch.get_rng_state(), objective.step


@pytest.mark.parametrize("backbone", [BN_VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize(
    "selection",
    [
        SelectionConfig(),
        SelectionConfig(encoder="target"),
        SelectionConfig(precision="bf16", batchnorm="joint"),
        SelectionConfig(batchnorm="running"),
    ],
    ids=["online", "target", "bf16 joint", "running"],
)
def test_scoring_leaves_no_trace(backbone, selection):
    objective = moby(backbone=backbone)
    objective.online.projector.eval()  # a mode that is not everybody's has to come back too
    crops = views(side=backbone.image_size)
    before = state_of(objective)
    scores = objective.pair_losses((crops,), selection)
    after = state_of(objective)
    assert scores.losses_BP.shape == (5, 6) and not scores.losses_BP.requires_grad
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    assert before[1:3] == after[1:3] and torch.equal(before[3], after[3]) and before[4] == after[4]


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    with pytest.raises(RuntimeError, match="stop"), without_side_effects(model):
        assert not model[2].training and model[1].training and not model[1].track_running_stats
        raise RuntimeError("stop")
    assert model[2].training and model[1].track_running_stats and torch.is_grad_enabled()


def test_losses_equal_a_loop_that_forwards_view_by_view():
    for backbone in (VIT, BN_VIT, RESNET):
        objective, crops = moby(backbone=backbone), views(side=backbone.image_size)
        table = objective.pair_losses((crops,), SelectionConfig()).losses_BP
        torch.testing.assert_close(table, loop_pair_losses(objective, crops, SelectionConfig()), rtol=1e-4, atol=1e-4)


def test_drop_path_is_off_while_scoring():
    objective = moby(backbone=replace(VIT, drop_path=0.9))
    crops = views()
    first = objective.pair_losses((crops,), SelectionConfig()).losses_BP
    assert torch.equal(first, objective.pair_losses((crops,), SelectionConfig()).losses_BP)


def test_batchnorm_composition_is_what_it_says():
    objective, crops = moby(backbone=RESNET), views(side=32)
    tables = {b: objective.pair_losses((crops,), SelectionConfig(batchnorm=b)).losses_BP for b in ("view", "joint")}
    assert not torch.allclose(tables["view"], tables["joint"], atol=1e-4)
    running = SelectionConfig(batchnorm="running")
    alone = objective.pair_losses((crops[:1],), running).losses_BP
    torch.testing.assert_close(alone, objective.pair_losses((crops,), running).losses_BP[:1], rtol=1e-4, atol=1e-4)


def test_every_encoder_sees_all_views_once_and_no_copy_per_pair_is_made():
    objective, crops = moby(), views(count=6)
    seen = []
    for encoder in (objective.online, objective.target):
        encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective.pair_losses((crops,), SelectionConfig(views=6))
    assert [x.shape[0] for x in seen] == [30, 30]
    assert all(x.data_ptr() == crops.data_ptr() for x in seen)
    seen.clear()
    objective.pair_losses((crops,), SelectionConfig(views=6, encoder="target"))
    assert len(seen) == 1 and seen[0].data_ptr() == crops.data_ptr()  # no online forward


def test_earlier_layers_and_smaller_views():
    objective = moby()
    layer = objective.pair_losses((views(),), SelectionConfig(layer=1)).losses_BP
    assert layer.shape == (5, 6) and len(objective.online.backbone.blocks) == 2
    smaller = objective.pair_losses((views(side=8),), SelectionConfig(resolution=8))
    assert smaller.losses_BP.isfinite().all() and smaller.features_BND is None
    with pytest.raises(ValueError, match=r"selection.layer: 5 blocks asked for, but the backbone has 2"):
        objective.pair_losses((views(),), SelectionConfig(layer=5))
    with pytest.raises(ValueError, match=r"selection.layer: 1 blocks asked for, but the backbone is no ViT"):
        moby(backbone=RESNET).pair_losses((views(side=32),), SelectionConfig(layer=1))


def test_regret_and_agreement():
    losses = torch.tensor([[0.0, 1, 2], [4, 0, 2]])
    assert regret(losses, torch.tensor([2, 0])) == 0
    assert regret(losses, torch.tensor([1, 2])) == pytest.approx(((2 - 1) + (4 - 2)) / ((2 - 1) + (4 - 2)))
    found = audit(losses, torch.tensor([2, 1]), SelectionConfig(views=3))
    assert found["selection/agreement"] == 0.5 and found["selection/regret"] == pytest.approx(4 / 3)
    assert audit(losses, torch.tensor([0, 1]), SelectionConfig(views=3, rule="easiest"))["selection/regret"] == 0


def test_regret_leaves_barred_pairs_out():
    losses = torch.tensor([[1.0, 9, 2, 3, 9, 4]])  # the two nines are pairs of the same policy
    found = audit(losses, torch.tensor([2]), SelectionConfig(cross_policy=True))
    assert found["selection/agreement"] == 0
    assert found["selection/regret"] == pytest.approx((4 - 2) / (4 - 2.5))


def test_the_audit_of_the_full_choice_is_perfect_and_leaves_no_trace():
    objective, crops = moby(), views()
    choice = select(objective.pair_losses((crops,), SelectionConfig()).losses_BP, "hardest")
    before = copy.deepcopy(state_of(objective))
    found = objective.audit((crops,), choice, SelectionConfig(encoder="target"))
    assert found["selection/agreement"] == 1 and found["selection/regret"] == 0
    assert torch.equal(before[3], torch.get_rng_state())
