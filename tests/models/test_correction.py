"""The target's guesses of queries: the regression is the formula's, and choices by the target follow it."""

import pytest
import torch

from models.backbones import BackboneConfig
from models.correction import FORGET, RIDGE, Correction, with_one
from models.negatives import NONE
from models.objectives import Length, build_objective
from models.objectives.byol import BYOLConfig
from models.objectives.moby import MoBYConfig
from models.objectives.moco_v3 import MoCoV3Config
from models.selection import SelectionConfig, select

STILL = BackboneConfig("vit_tiny_patch16_224", 8, 4, width=16, depth=1, heads=2)
OBJECTIVES = [MoBYConfig(NONE, queue=64, hidden=32, width=8), BYOLConfig(hidden=32, width=8)]
OBJECTIVES.append(MoCoV3Config(hidden=32, width=8))  # pyright: ignore[reportArgumentType]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_corrected_before_anything_was_learned():
    correction, guess = Correction(5, 3), numbers(7, 3)
    correction.update()
    assert torch.equal(correction(guess, numbers(7, 5)), guess)


def test_it_is_ridge_regression_with_fading_steps():
    correction = Correction(5, 3)
    steps = [[(numbers(9, 5, seed=s), numbers(9, 3, seed=s + 50))] for s in range(3)]
    steps[1].append((numbers(9, 5, seed=20), numbers(9, 3, seed=21)))  # a step in two parts
    for parts in steps:
        for features, missing in parts:
            correction.learn(features, missing)
        correction.update()
    rows = [(f, m, FORGET ** (2 - age)) for age, parts in enumerate(steps) for f, m in parts]
    x, y = (torch.cat([with_one(f) for f, _, _ in rows]).double(), torch.cat([m for _, m, _ in rows]).double())
    w = torch.cat([torch.full((len(f),), weight) for f, _, weight in rows]).double()[:, None]
    gram = x.T @ (w * x)
    wanted = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(6), x.T @ (w * y))
    torch.testing.assert_close(correction.weight_XD.double(), wanted, rtol=1e-4, atol=1e-5)
    features, guess = numbers(4, 5, seed=30), numbers(4, 3, seed=31)
    corrected = guess.double() + with_one(features).double() @ wanted
    torch.testing.assert_close(correction(guess, features).double(), corrected, rtol=1e-4, atol=1e-5)


def test_it_follows_what_changes_and_forgets_a_step_that_is_skipped():
    correction, true = Correction(5, 3), numbers(6, 3)
    for step in range(60):
        if step == 30:
            true = -true
        features = numbers(32, 5, seed=step)
        correction.learn(features, with_one(features) @ true)
        correction.update()
    torch.testing.assert_close(correction.weight_XD, true, rtol=0.05, atol=0.1)
    before = {name: value.clone() for name, value in correction.state_dict().items()}
    correction.learn(numbers(32, 5), numbers(32, 3))
    correction.skip()
    correction.update()
    assert all(torch.equal(value, before[name]) for name, value in correction.state_dict().items())


def test_features_in_bf16_are_regressed_in_fp32():
    correction = Correction(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        correction.learn(numbers(9, 5).bfloat16(), numbers(9, 3).bfloat16())
        correction.update()
        assert correction(numbers(2, 3).bfloat16(), numbers(2, 5).bfloat16()).dtype == torch.float32
    plain = Correction(5, 3)
    plain.learn(numbers(9, 5).bfloat16().float(), numbers(9, 3).bfloat16().float())
    plain.update()
    torch.testing.assert_close(correction.weight_XD, plain.weight_XD)


def flat(seed: int) -> tuple[torch.Tensor]:
    """Four views of 32 images that differ in their colour alone."""
    return (numbers(32, 4, 3, 1, 1, seed=seed).expand(-1, -1, -1, 8, 8).contiguous(),)


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: type(config).__name__)
def test_the_target_learns_that_the_online_encoder_sees_it_the_other_way_round(config):
    torch.manual_seed(0)
    objective = build_objective(config, STILL, Length(1000, 100)).train()
    norm = objective.online.backbone.norm
    with torch.no_grad():
        norm.weight.neg_()  # the online encoder's features are the target's with the sign changed

    selection = SelectionConfig(encoder="target")

    def regret() -> float:
        found = []
        for seed in range(1000, 1004):
            choice = select(objective.pair_losses(flat(seed), selection).losses_BP, "hardest")
            found.append(objective.audit(flat(seed), choice, selection)["selection/regret"])
        return float(torch.stack(found).mean())

    before = regret()
    for step in range(40):
        crops = flat(step)
        scores, choice = objective.pair_losses(crops, selection), torch.randint(6, (32,))
        objective.loss(objective.take(crops, choice, scores))
        objective.correction.update()  # a step in which neither encoder moves
    assert before > 0.5 and regret() < 0.7 * before, (before, regret())


def test_full_scores_neither_use_nor_teach_a_guess():
    torch.manual_seed(0)
    objective = build_objective(OBJECTIVES[0], STILL, Length(1000, 100)).train()
    crops = (numbers(8, 4, 3, 8, 8),)
    wanted = objective.pair_losses(crops, SelectionConfig()).losses_BP
    objective.correction.weight_XD.normal_()
    scores = objective.pair_losses(crops, SelectionConfig())
    assert torch.equal(scores.losses_BP, wanted)
    objective.loss(objective.take(crops, torch.zeros(8, dtype=torch.int64), scores))
    objective.correction.update()
    assert not objective.correction.gram_XX.any()
