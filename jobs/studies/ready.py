"""The ready-made studies: what each arm changes."""

import difflib
from collections.abc import Sequence
from dataclasses import replace

from jobs.run.config import CheckpointConfig, MonitorConfig, PretrainConfig, ViewsConfig
from jobs.run.presets import PRESETS, RANDOM_PAIR, VIT_TINY_32, preset, small, synby
from jobs.studies.plan import Changes, Study, arms_of
from models.backbones import BackboneConfig
from models.negatives import KINDS, NONE
from models.objectives import MoBYConfig
from shards.errors import InputError

# No mirror image of a digit is a digit, and there are no colours to change or to take away.
DIGIT_VIEWS = ViewsConfig(
    "small", crop_scale=(0.5, 1.0), flip=0, brightness=0.3, contrast=0.3, saturation=0, hue=0, gray=0
)

PLAIN: Changes = {"selection.views": 2, "selection.rule": "random"}
HARD: Changes = {"selection.views": 4, "selection.rule": "hardest"}
NO_SYNTHETIC = {f"objective.negatives.{kind}": 0 for kind in KINDS}
# MoBY, SynBY, MoBY with hard views, both; hard views chosen by either encoder. They differ in nothing else.
CIFAR10_ARMS: dict[str, Changes] = {
    "moby": {**PLAIN, **NO_SYNTHETIC},
    "synby": PLAIN,
    "moby-hard": {**HARD, **NO_SYNTHETIC},
    "synby-hard": HARD,
    "moby-hard-target": {**HARD, **NO_SYNTHETIC, "selection.encoder": "target"},
    "synby-hard-target": {**HARD, "selection.encoder": "target"},
}


def cifar10() -> PretrainConfig:
    """A ViT of 64 tokens at 32×32 under SynBY's own values, but for the views: batch 512, 100 epochs, queues of 4,096.

    Not compiled: in short pieces, compiling anew in each would cost more than it saves at this size.
    """
    return replace(
        synby(BackboneConfig("vit_tiny_patch16_224", 32, patch_size=4, width=192, depth=6, heads=3, pool="avg")),
        views=ViewsConfig("small"),
        monitor=MonitorConfig(every=20, health_every=200),
        checkpoint=CheckpointConfig(every=500, keep=1),
        epochs=100.0,
        compile="off",
    )


def cifar10_small() -> PretrainConfig:
    """The same study at a size that shows the machinery on a CPU, not the result: 16 tokens, 60 steps of 64 images."""
    base = small(synby(replace(VIT_TINY_32, width=64, depth=2, heads=2)))
    assert isinstance(base.objective, MoBYConfig)
    negatives = replace(base.objective.negatives, hardest=64, **dict.fromkeys(KINDS, 32))
    return replace(
        base,
        objective=replace(base.objective, negatives=negatives),
        monitor=MonitorConfig(every=10, health_every=0, bank=2048),
        checkpoint=CheckpointConfig(every=30, keep=1),
        steps=60,
        batch=64,
    )


def digits() -> PretrainConfig:
    """What the demo trains on its digits with random pairs, without its synthetic images: MoBY, a ViT of 16 tokens and
    0.8 M parameters, 240 steps of 128 images."""
    base = preset("synby-vit-tiny")
    assert isinstance(base.objective, MoBYConfig)
    return replace(
        base,
        views=DIGIT_VIEWS,
        selection=RANDOM_PAIR,
        objective=replace(base.objective, negatives=NONE),
        monitor=MonitorConfig(every=20, health_every=40, bank=0, loggers=("json",)),
        checkpoint=CheckpointConfig(every=120, keep=1),
        steps=240,
    )


# Rules of choice by what a user pays for them: the forward passes that score the views.
RULES: dict[str, Changes] = {
    "random": PLAIN,
    "hard": HARD,
    "lowest-iou": {**HARD, "selection.rule": "lowest-iou"},
    "hard-target": {**HARD, "selection.encoder": "target"},
    "hard-every4": {**HARD, "selection.every": 4},
    "predicted-every4": {**HARD, "selection.rule": "predicted", "selection.every": 4},
    "predicted-every8": {**HARD, "selection.rule": "predicted", "selection.every": 8},
    "residual": {**HARD, "selection.rule": "residual"},
    "hard-every2": {**HARD, "selection.every": 2},
    "hard-every8": {**HARD, "selection.every": 8},
    "hard-bf16": {**HARD, "selection.precision": "bf16"},
    "hard-half": {**HARD, "selection.resolution": 16},
}
# On two cores in fp32, a step that scores four views costs 1.62 plain ones.
SAME_TIME = {240: 390, 480: 780, 960: 1560}


def cost_arms() -> dict[str, Changes]:
    """Every rule at every length, and random pairs with as many steps as the hardest pair's time allows."""
    arms: dict[str, Changes] = {
        f"{rule}-{steps}": {**changes, "steps": steps} for steps in SAME_TIME for rule, changes in RULES.items()
    }
    return arms | {f"random-{steps}": {**PLAIN, "steps": steps} for steps in SAME_TIME.values()}


STUDIES = {
    "cifar10-study": Study(cifar10, CIFAR10_ARMS, seeds=3, probe_epochs=30),
    "cifar10-study-small": Study(cifar10_small, CIFAR10_ARMS, seeds=2, probe_epochs=10),
    "cost-small": Study(digits, cost_arms(), seeds=3, probe_epochs=50),
}


def study(name: str, axes: Sequence[str] = ()) -> Study:
    """A ready-made study, or a preset whose arms the axes make.

    Raises:
        InputError: neither a study nor a preset, axes for a study that has arms, or as `arms_of`.
    """
    if name in STUDIES:
        if axes:
            raise InputError(f"axis: {name} has its own arms; give a preset to vary, or --change for all arms")
        return STUDIES[name]
    if name in PRESETS:
        return Study(PRESETS[name], arms_of(axes), seeds=3, probe_epochs=30)
    near = difflib.get_close_matches(name, [*STUDIES, *PRESETS], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"study: {name!r} is not known; {hint}studies: {', '.join(STUDIES)}; presets to vary: {', '.join(PRESETS)}"
    )
