"""Schedules against their formulas, and which parameters decay."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from jobs.run.optim import OptimizerConfig, Schedule, build_optimizer, cosine, parameter_groups, set_step, warmup_cosine
from jobs.run.presets import preset
from jobs.training.health import clip_and_norm
from models.objectives import Length, build_objective
from shards.errors import InputError


def test_warmup_is_linear_and_the_cosine_ends_at_its_final_value() -> None:
    values = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_cosine_against_its_formula() -> None:
    assert cosine(25, 100, 0.99, 1.0) == pytest.approx(1 - 0.01 * (math.cos(math.pi / 4) + 1) / 2)
    assert cosine(200, 100, 0.99, 1.0) == 1.0


def test_a_warm_up_lasts_as_long_as_configured_or_is_refused() -> None:
    paper = OptimizerConfig(lr=1.0, lr_batch=0, warmup_epochs=40)
    schedule = Schedule(paper, 512, steps=300 * 10, steps_per_epoch=10)
    assert [schedule.lr(step) for step in (0, 199, 399, 400)] == pytest.approx([1 / 400, 0.5, 1.0, 1.0])
    assert schedule.lr(401) < 1.0
    assert Schedule(paper, 512, steps=400, steps_per_epoch=10).warmup == 400
    with pytest.raises(InputError, match=r"optimizer.warmup_epochs: 40 epochs are 400 steps, and the run has 399"):
        Schedule(paper, 512, steps=399, steps_per_epoch=10)
    assert Schedule(replace(paper, warmup_share=0.1), 512, steps=60, steps_per_epoch=10).warmup == 6
    assert Schedule(replace(paper, warmup_share=0.0), 512, steps=60, steps_per_epoch=10).warmup == 0
    with pytest.raises(InputError, match=r"optimizer.warmup_share: 1.5 must lie between 0 and 1"):
        OptimizerConfig(warmup_share=1.5)


def test_presets_warm_up_as_their_papers_say_and_small_ones_in_proportion() -> None:
    for name, epochs in (("moco-v3-vit-s", 40), ("dino-vit-s", 10), ("moby-deit-s", 5)):
        config = preset(name)
        schedule = Schedule(config.optimizer, config.batch, round(config.epochs * 100), 100)
        assert schedule.warmup == 100 * epochs
    for steps in (7, 240, 280):
        assert Schedule(preset("synby-vit-tiny").optimizer, 128, steps, 14).warmup == round(steps / 10)


def test_rates_scale_with_the_batch_and_stay_off_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    config = OptimizerConfig(lr=1e-3, lr_batch=512, weight_decay=0.04, final_weight_decay=0.4, warmup_epochs=0)
    schedule = Schedule(config, batch=1024, steps=100, steps_per_epoch=10)
    optimizer = build_optimizer(config, model)
    set_step(optimizer, schedule, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]
    set_step(optimizer, schedule, 100)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.0])
    assert [p.ndim for p in optimizer.param_groups[0]["params"]] == [2]


def test_tokens_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    model.weight = nn.Parameter(torch.zeros(4, 4))
    decayed, spared = (group["params"] for group in parameter_groups(model, OptimizerConfig()))
    assert [id(p) for p in decayed] == [id(model.weight)] and [id(p) for p in spared] == [id(model.cls_token)]


@pytest.mark.parametrize(
    ("name", "all_decay"),
    [
        # MoCo v3's, MoCo's and SimSiam's code hand all parameters to one group.
        ("moco-v3-vit-s", True),
        ("simsiam-rn50", True),
        ("mochi-rn50", True),
        # Without a list of names, biases and vectors are spared, tokens and positions are not.
        ("moby-deit-s", False),
        ("moby-swin-t", False),
        ("ibot-vit-s", False),
    ],
)
def test_presets_decay_what_their_papers_code_does(name: str, all_decay: bool) -> None:
    config = preset(name)
    objective = build_objective(config.objective, config.backbone, Length(10, 1.0))
    groups = parameter_groups(objective, config.optimizer)
    names = {id(p): n for n, p in objective.named_parameters()}
    found = {decays: [] for decays in (True, False)}
    for group in groups:
        found[group["decays"]] += [names[id(p)] for p in group["params"]]
    learned = [n for n, p in objective.named_parameters() if p.requires_grad]
    assert sorted(found[True] + found[False]) == sorted(learned)
    if all_decay:
        assert not found[False]
    else:
        tokens = ("cls_token", "pos_embed", "mask_token_D", "relative_position_bias_table")
        assert {n for n in learned if n.endswith(tokens)} <= set(found[True])
        assert all(objective.get_parameter(n).ndim == 1 for n in found[False])
        assert all(objective.get_parameter(n).ndim > 1 or n == "mask_token_D" for n in found[True])


def test_a_constant_predictor_keeps_its_peak_while_all_else_decays() -> None:
    model = nn.Module()
    model.online = nn.Module()
    model.online.backbone, model.online.predictor = nn.Linear(3, 3), nn.Linear(3, 3)
    config = OptimizerConfig("sgd", lr=0.05, lr_batch=256, weight_decay=0.1, warmup_epochs=0, constant_predictor=True)
    optimizer = build_optimizer(config, model)
    set_step(optimizer, Schedule(config, 512, 100, 10), 50)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.online.predictor.weight)] == (0.1, 0.1) and rates[id(model.online.predictor.bias)] == (0.1, 0)
    assert rates[id(model.online.backbone.weight)] == pytest.approx((0.05, 0.1))
    assert rates[id(model.online.backbone.bias)] == pytest.approx((0.05, 0))


def test_gradients_are_clipped_together_or_each_by_its_own_norm() -> None:
    def gradients(clip: float, by_tensor: bool) -> tuple[list[float], float]:
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
        for parameter, value in zip(parameters, ([3.0, 4.0], [0.3, 0.4], [6.0, 8.0]), strict=False):
            parameter.grad = torch.tensor(value)  # the last one has none
        norm = clip_and_norm(parameters, clip, by_tensor=by_tensor)
        return [p.grad.norm().item() for p in parameters if p.grad is not None], norm.item()

    whole = (25 + 0.25 + 100) ** 0.5
    for by_tensor, wanted in ((True, [3.0, 0.5, 3.0]), (False, [5 * 3 / whole, 0.5 * 3 / whole, 10 * 3 / whole])):
        found, norm = gradients(3.0, by_tensor)
        assert found == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(whole)
        assert gradients(0.0, by_tensor)[0] == pytest.approx([5.0, 0.5, 10.0])
    assert preset("dino-vit-s").optimizer.clip_by == preset("ibot-vit-s").optimizer.clip_by == "tensor"


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    config = OptimizerConfig(name=name, lr=0.01 if name != "lars" else 1.0, lr_batch=0, weight_decay=0.0)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, model)
    x = torch.randn(32, 8)
    losses = []
    for step in range(60):
        set_step(optimizer, Schedule(config, 1, 60, 10), step)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("weight_decay", -1.0), ("clip_norm", -0.1), ("decay", "norms"), ("clip_by", "x")]
)
def test_bad_values_name_their_field(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"optimizer.{field}"):
        OptimizerConfig(**{field: value})
