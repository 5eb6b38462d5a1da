"""The target's guesses of features: the regression is the formula's, and choices by the target follow it."""

from dataclasses import replace

import pytest
import torch

from models.backbones import BackboneConfig
from models.correction import FORGET, RIDGE, Correction
from models.negatives import NONE
from models.objectives import Length, build_objective
from models.objectives.byol import BYOLConfig
from models.objectives.dino import DINOConfig
from models.objectives.ibot import IBOTConfig
from models.objectives.moby import MoBYConfig
from models.objectives.moco_v3 import MoCoV3Config
from models.selection import SelectionConfig

STILL = BackboneConfig("vit_tiny_patch16_224", 8, 4, width=16, depth=1, heads=2)
OBJECTIVES = [MoBYConfig(NONE, queue=64, hidden=32, width=8), BYOLConfig(hidden=32, width=8)]
OBJECTIVES.append(MoCoV3Config(hidden=32, width=8))  # pyright: ignore[reportArgumentType]
CROPPED = {"outputs": 24, "hidden": 32, "bottleneck": 8, "local_views": 0, "freeze_epochs": 0}
OBJECTIVES += [DINOConfig(**CROPPED), IBOTConfig(**CROPPED)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(images: int, width: int, seed: int, scored: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What was scored, and what the online and the target backbone made of the same images."""
    return tuple(numbers(images, size, seed=seed + 50 * part) for part, size in enumerate((scored, width, width)))


def with_one(scored: torch.Tensor) -> torch.Tensor:
    """What the regression knows."""
    return torch.cat([scored, torch.ones(len(scored), 1)], 1)


def test_nothing_is_corrected_before_anything_was_learned():
    correction, scored = Correction(5, 5), numbers(7, 5)
    correction.update()
    assert all(torch.equal(guess, scored) for guess in correction(scored))


@pytest.mark.parametrize("width", [5, 10], ids=["features", "a summary of tokens"])
def test_it_is_ridge_regression_with_fading_steps(width):
    correction = Correction(5, width)
    steps = [[features(9, 5, seed=s, scored=width)] for s in range(3)]
    steps[1].append(features(9, 5, seed=20, scored=width))  # a step in two parts
    for parts in steps:
        for part in parts:
            correction.learn(*part)
        correction.update()
    rows = [(part, FORGET ** (2 - age)) for age, parts in enumerate(steps) for part in parts]
    x = torch.cat([with_one(scored) for (scored, _, _), _ in rows]).double()
    y = torch.cat([torch.cat([a - x[:, :5], b - x[:, :5]], 1) for (x, a, b), _ in rows]).double()
    w = torch.cat([torch.full((9,), weight) for _, weight in rows]).double()[:, None]
    gram = x.T @ (w * x)
    wanted = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(width + 1), x.T @ (w * y))
    torch.testing.assert_close(correction.weight_XY.double(), wanted, rtol=1e-4, atol=1e-5)
    scored = numbers(4, width, seed=30)
    missing = with_one(scored).double() @ wanted
    for guess, half in zip(correction(scored), missing.chunk(2, 1), strict=True):
        torch.testing.assert_close(guess.double(), scored[:, :5].double() + half, rtol=1e-4, atol=1e-5)


def test_what_the_target_itself_made_is_left_as_it_is():
    correction, (scored, online, _) = Correction(5, 5), features(32, 5, seed=0)
    correction.learn(scored, online, scored)
    correction.update()
    guess_online, guess_target = correction(scored)
    assert torch.equal(guess_target, scored) and not torch.equal(guess_online, scored)


def test_it_follows_what_changes_and_forgets_a_step_that_is_skipped():
    correction, true = Correction(5, 10), numbers(11, 10)
    for step in range(80):
        if step == 30:
            true = -true
        scored = numbers(32, 10, seed=step)
        halves = (with_one(scored) @ true).chunk(2, 1)
        correction.learn(scored, *(scored[:, :5] + half for half in halves))
        correction.update()
    torch.testing.assert_close(correction.weight_XY, true, rtol=0.05, atol=0.1)
    before = {name: value.clone() for name, value in correction.state_dict().items()}
    correction.learn(*features(32, 5, seed=0, scored=10))
    correction.skip()
    correction.update()
    assert all(torch.equal(value, before[name]) for name, value in correction.state_dict().items())


def test_images_that_do_not_count_teach_nothing():
    correction, others = Correction(5, 5), Correction(5, 5)
    scored, online, target = features(9, 5, seed=0)
    counts = torch.arange(9) % 3 > 0
    correction.learn(scored, online, target, counts)
    others.learn(scored[counts], online[counts], target[counts])
    correction.update(), others.update()
    torch.testing.assert_close(correction.weight_XY, others.weight_XY)


def test_features_in_bf16_are_regressed_in_fp32():
    low = [part.bfloat16() for part in features(9, 5, seed=0)]
    correction, plain = Correction(5, 5), Correction(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        correction.learn(*low)
        correction.update()
        assert all(guess.dtype == torch.float32 for guess in correction(numbers(2, 5).bfloat16()))
    plain.learn(*(part.float() for part in low))
    plain.update()
    torch.testing.assert_close(correction.weight_XY, plain.weight_XY)


def flat(seed: int) -> tuple[torch.Tensor]:
    """Four views of 32 images that differ in their colour alone."""
    return (numbers(32, 4, 3, 1, 1, seed=seed).expand(-1, -1, -1, 8, 8).contiguous(),)


@pytest.mark.parametrize("layer", [None, 1], ids=["all blocks", "one block of two"])
@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: type(config).__name__)
def test_the_target_learns_that_the_online_encoder_sees_it_the_other_way_round(config, layer):
    torch.manual_seed(0)
    objective = build_objective(config, replace(STILL, depth=2), Length(1000, 100)).train()
    norm = objective.online.backbone.norm
    with torch.no_grad():
        norm.weight.neg_()  # the online encoder's features are the target's with the sign changed

    selection = SelectionConfig(encoder="target", layer=layer)

    def regret() -> float:
        found = []
        for seed in range(1000, 1004):
            choice = objective.pair_losses(flat(seed), selection).best("hardest")
            found.append(objective.audit(flat(seed), choice, selection)["selection/regret"])
        return float(torch.stack(found).mean())

    before = regret()
    for step in range(40):
        crops = flat(step)
        scores = objective.pair_losses(crops, selection)
        by_chance = replace(scores, losses_BP=torch.rand(32, 6)).best("hardest")
        objective.loss(objective.take(crops, by_chance, scores))
        for part in objective.modules():
            if isinstance(part, Correction):
                part.update()  # a step in which neither encoder moves
    assert before > 0.5 and regret() < 0.7 * before, (before, regret())


def test_full_scores_neither_use_nor_teach_a_guess():
    torch.manual_seed(0)
    objective = build_objective(OBJECTIVES[0], STILL, Length(1000, 100)).train()
    crops = (numbers(8, 4, 3, 8, 8),)
    wanted = objective.pair_losses(crops, SelectionConfig()).losses_BP
    objective.correction.weight_XY.normal_()
    scores = objective.pair_losses(crops, SelectionConfig())
    assert torch.equal(scores.losses_BP, wanted)
    objective.loss(objective.take(crops, torch.zeros(8, dtype=torch.int64), scores))
    objective.correction.update()
    assert not objective.correction.gram_XX.any()
