"""Studies: a base configuration, arms or axes of changes to it, and seeds."""

import dataclasses
import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.run.config import PretrainConfig, from_plain, to_plain
from shards.errors import InputError

Changes = Mapping[str, Any]  # dotted field → value; `objective` → a whole objective in its plain form


@dataclass(frozen=True)
class Study:
    """A ready-made study; `base` lacks the shards, which the command line names."""

    base: Callable[[], PretrainConfig]
    arms: Mapping[str, Changes]
    seeds: int
    """Runs per arm."""
    probe_epochs: int
    """Epochs of the linear probe at the end of each run."""
    against: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """arm → the arm that it is compared with; by default the first."""
    time: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """In a study of costs: arm → what its training costs, in plain steps."""
    plain: Sequence[str] = ()
    """There, the arms on random pairs, of different lengths."""


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
    configs = {arm: changed(base, changes) for arm, changes in arms.items()}
    for one, other in itertools.combinations(configs, 2):
        if configs[one] == configs[other]:
            raise InputError(f"axis: {one} and {other} are the same configuration; leave one out")
    return [
        Member(f"{arm}-seed{seed}", arm, replace(config, seed=seed))
        for seed in range(seeds)
        for arm, config in configs.items()
    ]


def changed(config: PretrainConfig, changes: Changes) -> PretrainConfig:
    """The configuration with some dotted fields replaced.

    Raises:
        InputError: as `members`.
    """
    plain = to_plain(config)
    known = [name for name, _ in _leaves(plain) if name != "objective.name"]
    for dotted, value in changes.items():
        *parents, last = _field(dotted).split(".")
        place: Any = plain
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if dotted == "objective.name":
            raise InputError("objective.name: an objective comes with its preset; sweep one preset after the other")
        if not isinstance(place, dict) or last not in place:
            near = [name for name in known if name.rsplit(".", 1)[-1] == last]
            near = near or difflib.get_close_matches(dotted, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{dotted}: the configuration has no such field; {hint}")
        if isinstance(place[last], dict) and not isinstance(value, Mapping):
            raise InputError(f"{dotted}: has fields of its own; name one, such as {dotted}.{next(iter(place[last]))}")
        place[last] = value
    return from_plain(plain)


def differences(one: PretrainConfig, other: PretrainConfig) -> list[str]:
    """Dotted names of the fields in which two configurations differ, but for what a run notes of its beginning."""
    flat = [dict(_leaves(to_plain(replace(config, origin=None, preset="")))) for config in (one, other)]
    return sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))


def _leaves(plain: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in plain.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def arms_of(axes: Sequence[str]) -> dict[str, Changes]:
    """`field=value,value…` per axis → every combination, named by its values.

    Raises:
        InputError: an axis without values, one that is given twice, a value that is given twice.
    """
    parsed = [_assignment("axis", axis) for axis in axes]
    _refuse_repeats("axis", [field for field, _ in parsed])
    last = Counter(field.rsplit(".", 1)[-1] for field, _ in parsed)
    arms: dict[str, Changes] = {}
    for values in itertools.product(*(values for _, values in parsed)):
        changes = dict(zip((field for field, _ in parsed), values, strict=True))
        shorts = {field: field.rsplit(".", 1)[-1] for field in changes}
        names = {field: short if last[short] == 1 else field for field, short in shorts.items()}
        arm = "-".join(f"{names[field]}={_text(value)}" for field, value in changes.items()) or "base"
        if arm in arms:
            raise InputError(f"axis: the values of {arm} are given twice; leave one out")
        arms[arm] = changes
    return arms


def shared_changes(changes: Sequence[str]) -> Changes:
    """`field=value` each → the changes that all arms share.

    Raises:
        InputError: not of that form, several values, or a field that is given twice.
    """
    parsed = [_assignment("change", change) for change in changes]
    _refuse_repeats("change", [field for field, _ in parsed])
    for field, values in parsed:
        if len(values) > 1:
            raise InputError(f"change {field}: {len(values)} values; give one, or vary the field by --axis")
    return {field: values[0] for field, values in parsed}


def _assignment(flag: str, text: str) -> tuple[str, list[Any]]:
    field, _, values = text.partition("=")
    if not field.strip() or not values.strip():
        more = ",0.003" if flag == "axis" else ""
        raise InputError(f"{flag}: {text!r} is not of the form field=value; for example optimizer.lr=0.001{more}")
    if _field(field) == "seed":
        raise InputError(f"{flag} seed: every arm has the seeds 0, 1 …; say how many by --seeds")
    return _field(field), _values(values)


def _field(dotted: str) -> str:
    return dotted.strip().replace("-", "_")


def _refuse_repeats(flag: str, fields: Sequence[str]) -> None:
    for field, count in Counter(fields).items():
        if count > 1:
            raise InputError(f"{flag} {field}: given {count} times; give it once")


def _values(text: str) -> list[Any]:
    """Values between commas: numbers, true, false, null and [lists] as JSON reads them, else text."""
    text = re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), re.sub(r"\bNone\b", "null", text))
    try:
        return json.loads(f"[{text}]")
    except json.JSONDecodeError:
        return [_value(part.strip()) for part in text.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _text(value: Any) -> str:
    """A value as part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value, separators=("_", ":"))
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "none"
