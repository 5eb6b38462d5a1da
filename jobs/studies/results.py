"""What came of a study: its runs, means and deviations by arm, the table and the picture."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.table import Table

from jobs.run.folder import RunFolder, write_json
from jobs.studies.plan import Changes, Member

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
    reason: str = ""
    """Of a failure."""


def scores_file(folder: Path) -> Path:
    """Where a study keeps the scores of a run."""
    return folder / "evaluation" / "sweep.json"


def read_result(member: Member, out: Path, settings: Mapping[str, Any]) -> RunResult:
    """How a run stands; scores that were taken with other settings do not count."""
    folder = out / member.name
    recorded, kept = RunFolder(folder).read_state(), {}
    if scores_file(folder).is_file():
        kept = json.loads(scores_file(folder).read_text())
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
        recorded.get("reason", ""),
    )


def summarise(results: Sequence[RunResult]) -> dict[str, dict[str, Any]]:
    """arm → measure → mean, standard deviation over seeds (None for one), values by seed; of runs that are done."""
    summary: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(result.arm for result in results):
        done = [result for result in results if result.arm == arm and result.state == "done"]
        measures = dict.fromkeys(name for result in done for name in result.scores)
        summary[arm] = {name: spread([r.scores[name] for r in done if name in r.scores]) for name in measures}
        speeds = [result.images_per_second for result in done if result.images_per_second]
        summary[arm]["images_per_second"] = spread(speeds) if speeds else None
    return summary


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation, values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "values": list(values)}


def write_results(
    out: Path, name: str, arms: Mapping[str, Changes], results: Sequence[RunResult], settings: Mapping[str, Any]
) -> None:
    """summary.json (arms with what they change, means and deviations; runs), runs.csv (a row per run), results.png."""
    summary = summarise(results)
    facts = {arm: {"changes": dict(arms[arm]), **summary[arm]} for arm in summary}
    content = {"study": name, "scored": dict(settings), "arms": facts, "runs": [asdict(result) for result in results]}
    write_json(out / "summary.json", content)
    with (out / "runs.csv").open("w", newline="") as file:
        plain = [name for name in asdict(results[0]) if name != "scores"]
        writer = csv.DictWriter(file, [*plain, *MEASURES], restval="")
        writer.writeheader()
        for result in results:
            row = asdict(result)
            writer.writerow({**{name: row[name] for name in plain}, **result.scores})
    if any(result.scores for result in results):
        plot(summary, arms, out / "results.png")


def table_of(results: Sequence[RunResult]) -> Table:
    """Mean ± deviation of each measure, speed and finished runs by arm."""
    summary = summarise(results)
    measures = [name for name in MEASURES if any(name in arm for arm in summary.values())]
    table = Table("arm")
    for head in (*(f"{MEASURES[name]} top-1" for name in measures), "images/s", "runs"):
        table.add_column(head, justify="right")
    for arm, measured in summary.items():
        own = [result for result in results if result.arm == arm]
        done = sum(result.state == "done" for result in own)
        speed = measured["images_per_second"]
        cells = [percent(measured[name]) if name in measured else "–" for name in measures]
        table.add_row(arm, *cells, f"{speed['mean']:,.0f}" if speed else "–", f"{done} of {len(own)}")
    return table


def percent(value: Mapping[str, Any]) -> str:
    """52.1 ± 0.4 %"""
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread} %"


def plot(summary: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Changes], path: Path) -> None:
    """A PNG with a panel per measure: every run, and mean ± deviation of the arms; along the values of a single axis of
    numbers, else one line per arm."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {arm: measured for arm, measured in summary.items() if measured.keys() & MEASURES.keys()}
    measures = [name for name in MEASURES if any(name in measured for measured in shown.values())]
    numbers = axis_of_numbers({arm: arms[arm] for arm in shown})
    height = 3.6 if numbers else 0.45 * len(shown) + 1.4
    figure, panels = pyplot.subplots(1, len(measures), figsize=(5.0 * len(measures), height), squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=True):
        measured = {arm: value[measure] for arm, value in shown.items() if measure in value}
        label = f"{MEASURES[measure]} top-1 (%)"
        means = [100 * value["mean"] for value in measured.values()]
        spreads = [100 * (value["std"] or 0.0) for value in measured.values()]
        if numbers:
            at, title = [numbers[1][arm] for arm in measured], numbers[0]
            panel.errorbar(at, means, yerr=spreads, fmt="o-", capsize=3)
            points = [(x, 100 * v) for x, value in zip(at, measured.values(), strict=True) for v in value["values"]]
            panel.scatter(*zip(*points, strict=True), s=12, color="grey", alpha=0.6, zorder=3)
            panel.set(xlabel=title, ylabel=label)
        else:
            panel.errorbar(means, range(len(measured)), xerr=spreads, fmt="o", capsize=3)
            points = [(100 * v, y) for y, value in enumerate(measured.values()) for v in value["values"]]
            panel.scatter(*zip(*points, strict=True), s=12, color="grey", alpha=0.6, zorder=3)
            panel.set_yticks(range(len(measured)), list(measured))
            panel.set_ylim(len(measured) - 0.5, -0.5)
            panel.set_xlabel(label)
            panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def axis_of_numbers(arms: Mapping[str, Changes]) -> tuple[str, dict[str, float]] | None:
    """The field and each arm's value, where the arms differ in one field of numbers."""
    fields = {name for changes in arms.values() for name in changes}
    if len(fields) != 1 or len(arms) < 2:
        return None
    (name,) = fields
    values = {arm: changes[name] for arm, changes in arms.items()}
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values())
    return (name, values) if numeric else None


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
