"""The ready-made studies: what each arm changes."""

import difflib
from collections.abc import Sequence
from dataclasses import replace

from jobs.run.config import CheckpointConfig, MonitorConfig, PretrainConfig, ViewsConfig, to_plain
from jobs.run.presets import PRESETS, RANDOM_PAIR, VIT_TINY_32, preset, small, synby
from jobs.studies.plan import Changes, Study, arms_of
from models.backbones import BackboneConfig
from models.negatives import KINDS, NONE, NegativesConfig
from models.objectives import (
    BYOLConfig,
    DINOConfig,
    IBOTConfig,
    MoBYConfig,
    MoCoV3Config,
    ObjectiveConfig,
    SimCLRConfig,
    SimSiamConfig,
    SwAVConfig,
)
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
    """MoBY with random pairs on the demo's digits and views, without its synthetic images, on a ViT of 16 tokens and
    0.1 M parameters: 240 steps of 128 images."""
    base = preset("synby-vit-tiny")
    assert isinstance(base.objective, MoBYConfig)
    return replace(
        base,
        views=DIGIT_VIEWS,
        selection=RANDOM_PAIR,
        objective=replace(base.objective, negatives=NONE),
        backbone=replace(base.backbone, width=64, depth=2, heads=2),
        monitor=MonitorConfig(every=20, health_every=40, bank=0, loggers=("json",)),
        checkpoint=CheckpointConfig(every=240, keep=1),
        steps=240,
    )


# Synthetic negatives are mixed from embeddings, which a run of some hundred steps has in its second half.
LATE = replace(NONE, start_epoch=120, last_epochs_without=60, of_epochs=300)
SYNBY = replace(LATE, hardest=64, **dict.fromkeys(KINDS, 32))
MOCHI = replace(LATE, hardest=64, mixing=64, interpolation=32)
# Narrow heads; targets that follow within some twenty steps; temperatures as published.
MOBY_SMALL = MoBYConfig(NONE, queue=1024, momentum=0.95, hidden=512, width=128)
DINO_SMALL = DINOConfig(outputs=512, hidden=256, bottleneck=64, momentum=0.95, local_views=2)
IBOT_SMALL = IBOTConfig(
    outputs=512,
    hidden=256,
    bottleneck=64,
    momentum=0.95,
    local_views=0,
    norm_last_layer=False,
    warmup_teacher_epochs=0,
)
OBJECTIVES_SMALL: dict[str, ObjectiveConfig] = {
    "moby": MOBY_SMALL,
    "synby": replace(MOBY_SMALL, negatives=SYNBY),
    "mochi": replace(MOBY_SMALL, negatives=MOCHI),
    "moco-v3": MoCoV3Config(momentum=0.95, hidden=512, width=128),
    "simclr": SimCLRConfig(hidden=512, width=128),
    "simsiam": SimSiamConfig(width=512, bottleneck=128),
    "byol": BYOLConfig(momentum=0.95, hidden=512, width=128),
    "swav": SwAVConfig(prototypes=100, hidden=512, width=128),
    "dino": DINO_SMALL,
    "ibot": IBOT_SMALL,
}
# Local crops of two by two patches. DINO's own blur and solarization are for 224 pixels.
MULTI_CROP: Changes = {
    "views.policy": "dino",
    "views.local_size": 16,
    "views.blur": 0.0,
    "views.solarize": 0.0,
    "views.local_views": 2,
}


# What an objective needs beside its own fields: DINO local crops, iBOT a class token.
BESIDE: dict[str, Changes] = {"dino": MULTI_CROP, "ibot": {"backbone.pool": "token"}}


def objective_arms() -> dict[str, Changes]:
    """Every objective with random pairs and with hard views."""
    arms: dict[str, Changes] = {}
    for name, objective in OBJECTIVES_SMALL.items():
        plain = to_plain(PretrainConfig(objective=objective))["objective"]
        own = {"objective": plain, **BESIDE.get(name, {})}
        more = {"views.local_views": 4} if name == "dino" else {}  # hard multi-crop chooses among twice as many
        arms |= {f"{name}-random": {**own, **PLAIN}, f"{name}-hard": {**own, **HARD, **more}}
    return arms


def claims() -> PretrainConfig:
    """The digits for twice as many steps."""
    return replace(digits(), steps=480)


def claims_arms() -> dict[str, Changes]:
    """What the papers claim a gain or a loss of: hard views, synthetic negatives, both; the encoder that scores; the
    easiest pairs; negatives of other classes alone; the number of views; the share of synthetic negatives."""

    def objective(negatives: NegativesConfig, oracle: bool = False) -> Changes:
        config = replace(MOBY_SMALL, negatives=negatives, oracle=oracle)
        return {"objective": to_plain(PretrainConfig(objective=config))["objective"]}

    moby, synby, target = objective(NONE), objective(SYNBY), {"selection.encoder": "target"}
    return {
        "moby": {**moby, **PLAIN},
        "synby": {**synby, **PLAIN},
        "moby-hard": {**moby, **HARD},
        "synby-hard": {**synby, **HARD},
        "easiest": {**moby, **HARD, "selection.rule": "easiest"},
        "mochi": {**objective(MOCHI), **PLAIN},
        "mochi-oracle": {**objective(MOCHI, oracle=True), **PLAIN},
        "moby-hard-target": {**moby, **HARD, **target},
        "synby-hard-target": {**synby, **HARD, **target},
        "moby-hard-8": {**moby, **HARD, "selection.views": 8},
        "synby-half": {**objective(replace(SYNBY, share=0.5)), **PLAIN},
    }


# Rules of choice by what a user pays for them: the forward passes that score the views.
RULES: dict[str, Changes] = {
    "random": PLAIN,
    "hard": HARD,
    "lowest-iou": {**HARD, "selection.rule": "lowest-iou"},
    "hard-target": {**HARD, "selection.encoder": "target"},
    "hard-every4": {**HARD, "selection.every": 4},
    "hard-every2": {**HARD, "selection.every": 2},
    "hard-every8": {**HARD, "selection.every": 8},
    "hard-bf16": {**HARD, "selection.precision": "bf16"},
    "hard-half": {**HARD, "selection.resolution": 16},
}
# What a step costs by each rule, in steps on random pairs: CPU time by `hardviews bench rules` in fp32, between what it
# says of the demo's ViT and of the smaller one here.
COST = {
    "random": 1.0,
    "hard": 1.62,
    "lowest-iou": 1.03,
    "hard-target": 1.27,
    "hard-every4": 1.16,
    "hard-every2": 1.31,
    "hard-every8": 1.1,
    "hard-bf16": 1.45,
    "hard-half": 1.45,
}
LENGTHS = (240, 480, 960)
# As many steps on random pairs as the hardest pair's time allows: 1.62 times as many, to a multiple of ten.
SAME_TIME = (390, 780, 1560)


def cost_study() -> Study:
    """Every rule at every length, and random pairs with as many steps as the hardest pair's time allows besides."""
    lengths = {f"{rule}-{steps}": (rule, steps) for steps in LENGTHS for rule in RULES}
    lengths |= {f"random-{steps}": ("random", steps) for steps in SAME_TIME}
    return Study(
        digits,
        {arm: {**RULES[rule], "steps": steps} for arm, (rule, steps) in lengths.items()},
        seeds=3,
        probe_epochs=50,
        against={arm: f"random-{steps}" for arm, (_, steps) in lengths.items()},
        time={arm: round(COST[rule] * steps) for arm, (rule, steps) in lengths.items()},
        plain=[arm for arm, (rule, _) in lengths.items() if rule == "random"],
    )


STUDIES = {
    "cifar10-study": Study(cifar10, CIFAR10_ARMS, seeds=3, probe_epochs=30),
    "cifar10-study-small": Study(cifar10_small, CIFAR10_ARMS, seeds=2, probe_epochs=10),
    "objectives-small": Study(
        digits,
        objective_arms(),
        seeds=3,
        probe_epochs=50,
        against={f"{name}-{pairs}": f"{name}-random" for name in OBJECTIVES_SMALL for pairs in ("random", "hard")},
    ),
    "claims-small": Study(claims, claims_arms(), seeds=3, probe_epochs=50),
    "cost-small": cost_study(),
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
