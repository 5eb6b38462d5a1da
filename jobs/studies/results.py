"""How the runs of a study stand, and how long the missing ones will take."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jobs.run.folder import RunFolder
from jobs.studies.plan import Member

MEASURES = {"knn": "kNN", "linear": "linear"}
UNITS = ((86400, "days"), (3600, "h"), (60, "min"))


@dataclass(frozen=True)
class RunResult:
    """How one run of a study stands."""

    run: str
    """Its folder, relative to the study's."""
    arm: str
    seed: int
    state: str
    """new, running, interrupted, failed, trained (scores are missing) or done."""
    step: int = 0
    steps: int = 0
    images_per_second: float | None = None
    """Last measured, selection included."""
    scores: dict[str, float] = field(default_factory=dict)
    """knn and linear: top-1 (0 to 1)."""
    scoring_s: float = 0.0
    """How long the scores took (seconds)."""
    verdict: str = ""
    """As judged while it trained."""
    reason: str = ""
    """Of a failure."""
    untrained: dict[str, float] = field(default_factory=dict)
    """knn and linear of the same backbone before training, where they were measured."""
    pixels: dict[str, float] = field(default_factory=dict)
    """Those of raw pixels."""


def scores_file(folder: Path) -> Path:
    """Where a study keeps the scores of a run."""
    return folder / "evaluation" / "sweep.json"


def beside_file(folder: Path) -> Path:
    """Where it keeps what the run's scores have to be read beside."""
    return folder / "evaluation" / "sweep-beside.json"


def read_result(member: Member, out: Path, settings: Mapping[str, Any]) -> RunResult:
    """How a run stands; scores that were taken with other settings do not count."""
    folder = out / member.name
    recorded, kept = RunFolder(folder).read_state(), {}
    if scores_file(folder).is_file():
        kept = json.loads(scores_file(folder).read_text())
    measured = json.loads(beside_file(folder).read_text()) if beside_file(folder).is_file() else {}
    others = measured.get("scores", {}) if measured.get("settings") == dict(settings) else {}
    scored = recorded.get("state") == "finished" and kept.get("settings") == dict(settings)
    state = recorded.get("state", "new")
    return RunResult(
        member.name,
        member.arm,
        member.config.seed,
        "done" if scored else "trained" if state == "finished" else state,
        recorded.get("step", 0),
        recorded.get("steps", 0),
        recorded.get("images_per_second"),
        kept["scores"] if scored else {},
        kept.get("seconds", 0.0),
        recorded.get("verdict", ""),
        recorded.get("reason", ""),
        others.get("untrained", {}),
        others.get("pixels", {}),
    )


def seconds_left(members: Sequence[Member], results: Sequence[RunResult]) -> float | None:
    """What the missing runs will take, by the speed of runs of their arm, else of all; None before anything is known.

    `results` are those of `members`, in their order.
    """
    speeds: dict[str, list[float]] = {}
    for result in results:
        if result.images_per_second:
            speeds.setdefault(result.arm, []).append(result.images_per_second)
    every = [speed for measured in speeds.values() for speed in measured]
    lengths = [result.steps for result in results if result.steps]
    if not every:
        return None
    scoring = [result.scoring_s for result in results if result.scoring_s]
    total = 0.0
    for member, result in zip(members, results, strict=True):
        if result.state == "done":
            continue
        steps = (result.steps or round(float(np.mean(lengths)))) - result.step
        total += steps * member.config.batch / float(np.mean(speeds.get(result.arm, every)))
        total += float(np.mean(scoring)) if scoring else 0.0
    return total


def span(seconds: float) -> str:
    """A span of time as a reader takes it: 40 s, 5 min, 3.2 h."""
    for length, unit in UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if length >= 3600 else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
