"""The online features predicted from the target's: the regression is the formula's, and choices follow it."""

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
from models.selection import SelectionConfig, select

STILL = BackboneConfig("vit_tiny_patch16_224", 8, 4, width=16, depth=1, heads=2)
OBJECTIVES = [MoBYConfig(NONE, queue=64, hidden=32, width=8), BYOLConfig(hidden=32, width=8)]
OBJECTIVES.append(MoCoV3Config(hidden=32, width=8))  # pyright: ignore[reportArgumentType]
CROPPED = {"outputs": 24, "hidden": 32, "bottleneck": 8, "local_views": 0, "freeze_epochs": 0}
OBJECTIVES += [DINOConfig(**CROPPED), IBOTConfig(**CROPPED)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(images: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [images, width] of the target and of the online encoder for the same images."""
    return numbers(images, width, seed=seed), numbers(images, width, seed=seed + 50)


def with_one(target: torch.Tensor) -> torch.Tensor:
    """The regression's inputs: the features and a constant."""
    return torch.cat([target, torch.ones(len(target), 1)], 1)


def test_nothing_is_corrected_before_anything_was_learned():
    correction, target = Correction(5), numbers(7, 5)
    correction.update()
    assert torch.equal(correction(target), target)


def test_it_is_ridge_regression_with_fading_steps():
    correction = Correction(5)
    steps = [[features(9, 5, seed=s)] for s in range(3)]
    steps[1].append(features(9, 5, seed=20))  # a step in two parts
    for parts in steps:
        for part in parts:
            correction.observe(*part)
        correction.update()
    rows = [(part, FORGET ** (2 - age)) for age, parts in enumerate(steps) for part in parts]
    x = torch.cat([with_one(target) for (target, _), _ in rows]).double()
    y = torch.cat([online - target for (target, online), _ in rows]).double()
    w = torch.cat([torch.full((9,), weight) for _, weight in rows]).double()[:, None]
    gram = x.T @ (w * x)
    wanted = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(6), x.T @ (w * y))
    torch.testing.assert_close(correction.weight_XF.double(), wanted, rtol=1e-4, atol=1e-5)
    target = numbers(4, 5, seed=30)
    expected = target.double() + with_one(target).double() @ wanted
    torch.testing.assert_close(correction(target).double(), expected, rtol=1e-4, atol=1e-5)


def test_it_follows_what_changes_and_forgets_a_step_that_is_skipped():
    correction, true = Correction(5), numbers(6, 5)
    for step in range(80):
        if step == 30:
            true = -true
        target = numbers(32, 5, seed=step)
        correction.observe(target, target + with_one(target) @ true)
        correction.update()
    torch.testing.assert_close(correction.weight_XF, true, rtol=0.05, atol=0.1)
    before = {name: value.clone() for name, value in correction.state_dict().items()}
    correction.observe(*features(32, 5, seed=0))
    correction.skip()
    correction.update()
    assert all(torch.equal(value, before[name]) for name, value in correction.state_dict().items())


def test_images_that_do_not_count_teach_nothing():
    correction, others = Correction(5), Correction(5)
    target, online = features(9, 5, seed=0)
    counts = torch.arange(9) % 3 > 0
    correction.observe(target, online, counts)
    others.observe(target[counts], online[counts])
    correction.update(), others.update()
    torch.testing.assert_close(correction.weight_XF, others.weight_XF)


def test_features_in_bf16_are_regressed_in_fp32():
    low = [part.bfloat16() for part in features(9, 5, seed=0)]
    correction, plain = Correction(5), Correction(5)
    with torch.autocast("cpu", torch.bfloat16):
        correction.observe(*low)
        correction.update()
        assert correction(numbers(2, 5).bfloat16()).dtype == torch.float32
    plain.observe(*(part.float() for part in low))
    plain.update()
    torch.testing.assert_close(correction.weight_XF, plain.weight_XF)


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
            choice = select(objective.pair_losses(flat(seed), selection).losses_BP, "hardest")
            found.append(objective.audit(flat(seed), choice, selection)["selection/regret"])
        return float(torch.stack(found).mean())

    before = regret()
    for step in range(40):
        crops = flat(step)
        scores = objective.pair_losses(crops, selection)
        by_chance = torch.rand(32, 6).argmax(1)
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
    objective.correction.weight_XF.normal_()
    scores = objective.pair_losses(crops, SelectionConfig())
    assert torch.equal(scores.losses_BP, wanted)
    objective.loss(objective.take(crops, torch.zeros(8, dtype=torch.int64), scores))
    objective.correction.update()
    assert not objective.correction.gram_XX.any()
