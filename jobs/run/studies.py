"""Studies: a base configuration, arms or axes of changes to it, and seeds."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.run.config import CheckpointConfig, DataConfig, MonitorConfig, PretrainConfig, from_plain, to_plain
from jobs.run.presets import preset
from shards.errors import InputError

Changes = Mapping[str, Any]  # dotted field → value


@dataclass(frozen=True)
class Member:
    """One run of a study: its folder's name, the arm it belongs to, its configuration."""

    name: str
    arm: str
    config: PretrainConfig


def members(base: PretrainConfig, arms: Mapping[str, Changes], seeds: int) -> list[Member]:
    """Arms × seeds, seed by seed, so that a study stopped early has whole comparisons.

    Raises:
        InputError: a change to a field that there is not, or to a value that it cannot have.
    """
    if seeds < 1:
        raise InputError(f"seeds: {seeds} must be at least 1")
    return [
        Member(f"{arm}-seed{seed}", arm, replace(changed(base, changes), seed=seed))
        for seed in range(seeds)
        for arm, changes in arms.items()
    ]


def changed(config: PretrainConfig, changes: Changes) -> PretrainConfig:
    """The configuration with some dotted fields replaced.

    Raises:
        InputError: as `members`.
    """
    plain = to_plain(config)
    for dotted, value in changes.items():
        *parents, last = dotted.replace("-", "_").split(".")
        place: Any = plain
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            known = ", ".join(sorted(place)) if isinstance(place, dict) else ", ".join(sorted(plain))
            raise InputError(f"axis {dotted}: the configuration has no such field; there: {known}")
        place[last] = value
    return from_plain(plain)


def arms_of(axes: Sequence[str]) -> dict[str, Changes]:
    """`field=value,value…` per axis → every combination, named by its values.

    Raises:
        InputError: an axis without values.
    """
    parsed: list[list[tuple[str, Any]]] = []
    for axis in axes:
        field, _, values = axis.partition("=")
        if not field or not values:
            raise InputError(
                f"axis: {axis!r} is not of the form field=value,value; for example optimizer.lr=0.001,0.003"
            )
        parsed.append([(field, _value(text)) for text in values.split(",")])
    arms = {}
    for combination in itertools.product(*parsed):
        name = "-".join(f"{field.rsplit('.', 1)[-1]}={value}" for field, value in combination) or "base"
        arms[name.replace("/", "_")] = dict(combination)
    return arms


def _value(text: str) -> Any:
    """A number, true, false or null where it reads as one, else the text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


PLAIN = {"selection.views": 2, "selection.rule": "random"}
HARD = {"selection.views": 4, "selection.rule": "hardest"}
NO_SYNTHETIC = {
    f"objective.negatives.{kind}": 0
    for kind in ("interpolation", "extrapolation", "mixing", "noise", "perturbation", "adversarial")
}
CIFAR10_ARMS: dict[str, Changes] = {
    "moby": {**PLAIN, **NO_SYNTHETIC},
    "synby": PLAIN,
    "moby-hard": {**HARD, **NO_SYNTHETIC},
    "synby-hard": HARD,
    "moby-hard-target": {**HARD, **NO_SYNTHETIC, "selection.encoder": "target"},
    "synby-hard-target": {**HARD, "selection.encoder": "target"},
}


def cifar10_study(real: str, test: str) -> PretrainConfig:
    """What the arms of the CIFAR-10 study share: a ViT at 32×32 with 64 tokens, batch 512, 100 epochs."""
    base = preset("synby-vit-tiny")
    return replace(
        base,
        backbone=replace(base.backbone, patch_size=4, width=192, depth=6, heads=3),
        data=DataConfig(real=real),
        monitor=MonitorConfig(every=20, health_every=200, knn_train=real, knn_test=test),
        checkpoint=CheckpointConfig(every=500, keep=1),
        epochs=100.0,
        batch=512,
    )


STUDIES: dict[str, tuple[Callable[[str, str], PretrainConfig], dict[str, Changes]]] = {
    "cifar10-study": (cifar10_study, CIFAR10_ARMS),
}
