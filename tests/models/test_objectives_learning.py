"""Short runs on a toy data set: every objective learns what its views share, and SimSiam on easy pairs collapses."""

from dataclasses import replace

import pytest

from models.negatives import NONE, NegativesConfig
from models.objectives import (
    OBJECTIVES,
    BYOLConfig,
    DINOConfig,
    IBOTConfig,
    MoBYConfig,
    MoCoV3Config,
    SimCLRConfig,
    SimSiamConfig,
    SwAVConfig,
)

from .toy_learning import train

STEPS = 70
SIX = NegativesConfig(32, 8, 8, 8, 8, 8, 8, start_epoch=0, last_epochs_without=0)
MIXED = replace(NONE, hardest=32, mixing=16, interpolation=8, start_epoch=0, last_epochs_without=0)
# Momentum and temperatures that suit 80 steps; learning rates that suit the heads.
CASES = {
    "moby": (MoBYConfig(NONE, queue=256, hidden=64, width=32, momentum=0.9), 2e-3),
    "synby": (MoBYConfig(SIX, queue=256, hidden=64, width=32, momentum=0.9), 2e-3),
    "mochi": (MoBYConfig(MIXED, queue=256, hidden=64, width=32, momentum=0.9), 2e-3),
    "moco_v3": (MoCoV3Config(hidden=64, width=32, momentum=0.9), 2e-3),
    "simclr": (SimCLRConfig(hidden=64, width=32), 2e-3),
    "simsiam": (SimSiamConfig(width=64, bottleneck=16), 5e-4),
    "byol": (BYOLConfig(hidden=64, width=32, momentum=0.9), 2e-3),
    "swav": (SwAVConfig(prototypes=32, hidden=64, width=32, freeze_epochs=0.2), 2e-3),
    "dino": (DINOConfig(256, 256, 64, momentum=0.99, freeze_epochs=0.2, local_views=2), 5e-4),
    "ibot": (
        IBOTConfig(256, 256, 64, 0.1, 0.04, warmup_teacher_epochs=0, momentum=0.99, freeze_epochs=0.2, local_views=0),
        5e-4,
    ),
}


def test_there_is_a_run_of_every_objective():
    assert {type(config) for config, _ in CASES.values()} == {config for config, _ in OBJECTIVES.values()}


@pytest.mark.parametrize("name", CASES)
def test_hard_views_teach_what_views_share(name):
    config, lr = CASES[name]
    before, after, _ = train(config, STEPS, "hardest", lr)
    assert after > before + 0.12, f"kNN {before:.2f} → {after:.2f}"


def test_synby_learns_from_images_and_clones_of_them():
    """Syn²Co: synthetic images and synthetic negatives. Judged on images alone."""
    before, after, _ = train(CASES["synby"][0], STEPS, "hardest", CASES["synby"][1], clones=0.5)
    assert after > before + 0.12, f"kNN {before:.2f} → {after:.2f}"


def test_easiest_pairs_make_simsiam_collapse():
    """HVP, section 4: the most alike of 28 pairs teach what views share by chance. Features then say nothing about
    images: what is left of their spread is what a mean over views leaves by chance, kNN falls towards chance (1/8).
    At this rate hardest pairs learn from any seed; random ones, in between, do from most."""
    config, _ = CASES["simsiam"]
    runs = {rule: train(config, STEPS, rule, 0.2, views=8, sgd=True) for rule in ("hardest", "easiest")}
    before, hardest, metrics = runs["hardest"]
    _, easiest, collapsed = runs["easiest"]
    assert collapsed["image_std"] < 0.3 < 0.45 < metrics["image_std"]
    assert easiest < min(before, hardest) - 0.15
