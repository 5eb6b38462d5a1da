"""MoBY and SynBY: the loss, reused features, queues, momentum and schedules, against the naive composition."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jobs.benches.obvious import naive_loss
from models.backbones import first_blocks
from models.heads import mlp
from models.negatives import NONE, NegativesConfig
from models.objectives import OBJECTIVES, Length, build_objective
from models.objectives.moby import MoBY, MoBYConfig
from models.objectives.momentum import momentum_at
from models.selection import SelectionConfig, select, take_pair

from .toys import SIX, VIT, moby, views

STILL = replace(VIT, drop_path=0.0)


def train(objective, steps, *, selection=None, batch=5, labels=None):
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.05)
    for step in range(steps):
        torch.manual_seed(step)
        crops, choice, scores = (views(batch),), torch.zeros(batch, dtype=torch.int64), None
        if selection is not None:
            scores = objective.pair_losses(crops, selection)
            choice = select(scores.losses_BP, selection.rule)
        loss, _ = objective.loss(objective.take(crops, choice, scores), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()


@pytest.mark.parametrize("negatives", [NONE, SIX], ids=["moby", "synby"])
def test_loss_and_gradients_equal_the_naive_composition(negatives):
    one = moby(negatives, STILL)
    other = copy.deepcopy(one)
    pair = views(count=2)
    torch.manual_seed(5)
    loss, metrics = one.loss(one.take((pair,), torch.zeros(5, dtype=torch.int64), None))
    torch.manual_seed(5)
    wanted, *_ = naive_loss(other, pair)
    torch.testing.assert_close(loss, wanted)
    assert ("proxy_synthetic" in metrics) == (negatives is SIX)
    loss.backward(), wanted.backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert name.startswith("target") and p.grad is None


@pytest.mark.parametrize("encoder", ["online", "target"])
def test_reused_features_give_the_loss_that_forwarding_again_gives(encoder):
    objective, crops = moby(NONE, STILL), (views(),)
    scores = objective.pair_losses(crops, SelectionConfig(encoder=encoder))
    assert scores.features_BND is not None and scores.features_BND.dtype == torch.float32
    choice = select(scores.losses_BP, "hardest")
    again = objective.loss(replace(objective.take(crops, choice, scores), features_B2D=None))[0]
    torch.testing.assert_close(objective.loss(objective.take(crops, choice, scores))[0], again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "selection"),
    [
        (STILL, SelectionConfig(precision="bf16")),  # the loss would compute in fp32
        (STILL, SelectionConfig(layer=1)),
        (STILL, SelectionConfig(static_colour=True)),
        (replace(STILL, target_drop_path=0.1), SelectionConfig()),
        (replace(STILL, batchnorm_mlp=True), SelectionConfig()),
    ],
    ids=["precision", "layer", "colour", "drop path", "batchnorm"],
)
def test_features_are_not_reused_where_they_would_differ(backbone, selection):
    assert moby(NONE, backbone).pair_losses((views(),), selection).features_BND is None


@pytest.mark.parametrize("layer", [None, 1])
def test_the_online_features_are_predicted_from_what_the_target_scored(layer):
    objective, crops = moby(NONE, STILL), (views(),)
    selection = SelectionConfig(encoder="target", layer=layer)
    train(objective, 3, selection=selection)
    objective.correction.weight_XF.normal_()
    scores = objective.pair_losses(crops, selection)
    with torch.no_grad(), first_blocks(objective.target.backbone, layer):
        features = objective.target.eval().features(crops[0].flatten(0, 1)).unflatten(0, (5, 4))
    objective.train()
    torch.testing.assert_close(scores.scored_BND, features)
    assert (scores.features_BND is None) == (layer == 1)  # the loss wants the features of all blocks
    choice = select(scores.losses_BP, "hardest")
    torch.testing.assert_close(objective.take(crops, choice, scores).scored_B2D, take_pair(features, choice))
    before = objective.correction.gram_XX.clone()
    objective.loss(objective.take(crops, choice, scores))
    objective.after_step()
    assert not torch.equal(objective.correction.gram_XX, before)


def test_under_bf16_training_bf16_scores_are_the_same_arithmetic():
    objective = moby(NONE, STILL)
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.pair_losses((views(),), SelectionConfig(precision="bf16")).features_BND is not None


def test_target_features_pass_through_the_online_heads():
    objective, crops = moby(NONE, STILL), views()
    train(objective, 3)  # moves the online encoder away from the target
    by_target = objective.pair_losses((crops,), SelectionConfig(encoder="target")).losses_BP
    assert not torch.allclose(by_target, objective.pair_losses((crops,), SelectionConfig()).losses_BP)
    objective.online.backbone = objective.target.backbone
    torch.testing.assert_close(by_target, objective.pair_losses((crops,), SelectionConfig()).losses_BP)


def test_heads_are_moby_s():
    """Two layers of 4096 and 256, BatchNorm and ReLU in the hidden layer only; the target has no predictor."""
    config = MoBYConfig()
    assert (config.hidden, config.width, config.temperature, config.queue, config.momentum) == (
        4096,
        256,
        0.2,
        4096,
        0.99,
    )
    kinds = [type(m).__name__ for m in mlp(32, 64, 16)]
    assert kinds == ["Linear", "BatchNorm", "ReLU", "Linear"]
    objective = moby()
    assert objective.online.predictor is not None and objective.target.predictor is None


def test_queues_hold_the_keys_of_their_own_view():
    objective = moby(NONE, STILL, queue=7)
    crops = views(count=2)
    _, k1, k2 = naive_loss(copy.deepcopy(objective), crops)
    objective.loss(objective.take((crops,), torch.zeros(5, dtype=torch.int64), None), torch.arange(5))
    objective.after_step()
    torch.testing.assert_close(objective.queue1.rows_KD[:5], k1)
    torch.testing.assert_close(objective.queue2.rows_KD[:5], k2)
    assert objective.queue1.labels_K.tolist() == [0, 1, 2, 3, 4, -1, -1]
    torch.testing.assert_close(objective.queue2.rows_KD.norm(dim=1), torch.ones(7))


def test_momentum_goes_from_start_to_one_by_a_cosine_of_the_global_step():
    assert momentum_at(0, 100, 0.99) == pytest.approx(0.99) and momentum_at(100, 100, 0.99) == 1
    assert momentum_at(50, 100, 0.99) == pytest.approx(0.995)
    objective = moby(NONE)
    train(objective, 3)
    before = [p.clone() for p in objective.target.parameters()]
    train(objective, 1)
    wanted = 1 - 0.01 * (math.cos(math.pi * 3 / 10) + 1) / 2
    names = dict(objective.online.named_parameters())
    for (name, p), old in zip(objective.target.named_parameters(), before, strict=True):
        torch.testing.assert_close(p, wanted * old + (1 - wanted) * names[name])


def test_a_resumed_run_goes_on_in_every_schedule():
    """Step, queues and synthetic negatives are the run's, not the process's."""
    one, other = moby(), moby()
    train(one, 4, selection=SelectionConfig())
    saved = copy.deepcopy(one.state_dict())
    other.load_state_dict(saved)
    assert other.step == 4 and other.epoch == pytest.approx(0.8)
    for objective in (one, other):
        train(objective, 2, selection=SelectionConfig())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(one.queue1.rows_KD, other.queue1.rows_KD) and one.queue1.position == other.queue1.position


def test_a_skipped_step_leaves_queue_and_target_alone():
    objective = moby()
    before = copy.deepcopy(objective.state_dict())
    objective.loss(objective.take((views(),), torch.zeros(5, dtype=torch.int64), None))
    objective.skip_step()
    assert objective.step == 1
    train(objective, 0)
    after = objective.state_dict()
    kept = [
        n for n in before if n.startswith("queue") or (n.startswith("target") and "running" not in n and "num" not in n)
    ]
    assert all(torch.equal(before[n], after[n]) for n in kept if isinstance(before[n], torch.Tensor))
    train(objective, 1)
    assert objective.queue1.position == 5  # the skipped step's keys never came in


def test_gradient_accumulation_fills_the_queue_with_every_part():
    objective = moby(NONE, queue=32)
    for _ in range(3):
        loss, _ = objective.loss(objective.take((views(4),), torch.zeros(4, dtype=torch.int64), None))
        loss.backward()
    objective.after_step()
    assert objective.queue1.position == 12 and objective.step == 1


def test_synthetic_negatives_follow_the_epoch():
    negatives = replace(SIX, start_epoch=1, last_epochs_without=0.4, of_epochs=None)
    objective = moby(negatives)  # 10 steps, 5 an epoch
    used = []
    for _ in range(10):
        _, metrics = objective.loss(objective.take((views(),), torch.zeros(5, dtype=torch.int64), None))
        used.append("proxy_synthetic" in metrics)
        objective.after_step()
    assert used == [False] * 5 + [True] * 3 + [False] * 2


def test_the_oracle_bars_negatives_of_the_query_s_class():
    objective = moby(NONE, STILL, oracle=True, queue=10)
    labels = torch.tensor([0, 1, 2, 3, 4])
    train(objective, 2, labels=labels)
    objective.watching = True
    crops = objective.take((views(),), torch.zeros(5, dtype=torch.int64), None)
    loss, _ = objective.loss(crops, labels)
    task = objective.contrasts[0]
    assert torch.equal(task.barred_BK, labels[:, None] == objective.queue2.labels_K)
    total = torch.zeros(())
    for task in objective.contrasts:
        for row in range(5):
            kept = task.negatives_KD[~task.barred_BK[row]]
            logits = torch.cat([task.q_BD[row] @ task.k_BD[row, :, None], kept @ task.q_BD[row]]) / 0.2
            total += F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.int64)) / 5
    torch.testing.assert_close(loss.detach(), total)
    unknown, _ = objective.loss(crops, torch.full((5,), -1))
    assert not objective.contrasts[0].barred_BK.any() and unknown > loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "objective.temperature: 0 must be above 0"),
        ({"temperature": -0.2}, "objective.temperature: -0.2 must be above 0"),
        ({"queue": 0}, "objective.queue: 0 must be above 0"),
        ({"momentum": 1.2}, "objective.momentum: 1.2 must lie between 0 and 1"),
        ({"queue": 128}, "objective.negatives.hardest: 256 is more than the queue's 128 rows; lower it or raise"),
    ],
)
def test_bad_values_say_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        MoBYConfig(**changes)


def test_the_registry_builds_by_config_and_names_the_known():
    assert OBJECTIVES["moby"] == (MoBYConfig, MoBY)
    with pytest.raises(
        ValueError, match=r"objective: NegativesConfig is no objective's config; known: .*MoBYConfig \(moby\)"
    ):
        build_objective(NegativesConfig(), VIT, Length(1, 1))


def test_hard_pairs_lose_more_than_random_ones():
    objective, crops = moby(NONE, STILL), (views(32),)
    scores = objective.pair_losses(crops, SelectionConfig())
    by_rule = {rule: select(scores.losses_BP, rule) for rule in ("hardest", "easiest")}
    losses = {rule: objective.loss(objective.take(crops, c, scores))[0] for rule, c in by_rule.items()}
    assert losses["hardest"] > losses["easiest"]
    taken = objective.take(crops, by_rule["hardest"], scores)
    assert torch.equal(taken.crops[0], take_pair(crops[0], by_rule["hardest"]))
    assert torch.equal(taken.features_B2D, take_pair(scores.features_BND, by_rule["hardest"]))


def test_parameters_of_the_target_are_never_learned():
    objective = moby()
    assert isinstance(objective.target, nn.Module)
    assert not any(p.requires_grad for p in objective.target.parameters())
    assert all(
        torch.equal(p, q)
        for p, q in zip(objective.online.backbone.parameters(), objective.target.backbone.parameters(), strict=True)
    )
