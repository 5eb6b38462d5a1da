"""`hardviews compare`: curves and final numbers of several runs side by side, as a table and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table

from jobs.reporting.charts import smooth
from jobs.reporting.compare import PLACES, arm_differences
from jobs.reporting.protocols import side_by_side
from jobs.reporting.rundata import RunData, flatten, read_run, told_apart
from jobs.run.terminal import console, parse, tables
from jobs.studies.difference import Difference, in_points
from shards.errors import InputError

USUAL = ("train/loss", "knn/top1", "train/images_per_second")
COLUMNS = 2  # charts beside each other
LOWER_IS_BETTER = ("loss", "time", "grad", "memory")


@dataclass(frozen=True)
class CompareConfig:
    """Puts runs side by side: final and best numbers, the settings that differ, and one chart per metric."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, two or more."""
    metrics: tuple[str, ...] = ()
    """Metrics to compare; by default training loss, kNN accuracy and images per second, where they were logged."""
    out: Path = Path("comparison.png")
    """Picture to write: a file ending in .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON object instead of the tables."""


def compare(paths: Sequence[str], metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Numbers of several runs.

    Returns:
        `runs`: names; `verdicts`: as judged while they trained, None where nothing was; `metrics`: by name, per run
        the last and the best value and the best one's step (None where it was not logged); `scores`: top-1 by
        protocol, per run (None where it was not scored so); `differences`: where the runs are two arms with seeds in
        common, by score the second arm's less the first's with its 95 % interval; `settings`: those that differ, per
        run.

    Raises:
        InputError: fewer than two runs, a folder that is none, or a metric that no run logged.
    """
    if len(paths) < 2:
        raise InputError(f"runs: {len(paths)} given; name two run folders or more")
    runs = told_apart([read_run(Path(path)) for path in paths])
    flats = [flatten(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for flat in flats for key in flat) if key not in PLACES]
    return {
        "runs": [run.name for run in runs],
        "verdicts": [run.state.get("verdict") for run in runs],
        "metrics": {name: [summary(run, name) for run in runs] for name in chosen_metrics(runs, metrics)},
        "scores": {
            label: [None if score is None else score.top1 for score in row] for label, row in side_by_side(runs).items()
        },
        "differences": {name: asdict(pair) for name, pair in arm_differences(runs).items()},
        "settings": {
            key: [flat.get(key) for flat in flats] for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1
        },
    }


def chosen_metrics(runs: Sequence[RunData], asked: Sequence[str]) -> list[str]:
    """The wanted metrics, by default the usual ones that any run logged.

    Raises:
        InputError: one that no run logged.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.names()))
    for name in asked:
        if name not in known:
            raise InputError(
                f"metrics: {name} was logged by none of the runs; known ones: {', '.join(known) or 'none'}"
            )
    return list(asked) or [name for name in USUAL if name in known]


def summary(run: RunData, name: str) -> dict[str, float] | None:
    """Last and best finite value of a metric, and the best one's step."""
    steps, values = run.series(name)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    steps, values = steps[finite], values[finite]
    lower = any(word in name for word in LOWER_IS_BETTER)
    best = int(values.argmin() if lower else values.argmax())
    return {"last": float(values[-1]), "best": float(values[best]), "best_step": int(steps[best])}


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The comparison as tables: numbers, then settings that differ."""
    numbers = Table("", *content["runs"], title="last value (best, at step)")
    if any(content["verdicts"]):
        numbers.add_row("verdict", *(verdict or "–" for verdict in content["verdicts"]))
    for name, cells in content["metrics"].items():
        texts = (f"{c['last']:.4g} ({c['best']:.4g}, {c['best_step']:,})" if c else "–" for c in cells)
        numbers.add_row(name, *texts)
    for name, values in content["scores"].items():
        numbers.add_row(name, *("–" if value is None else f"{value:.1%}" for value in values))
    found = [numbers]
    if content["differences"]:
        beside = Table("score", "second arm less the first", title="over the seeds that both arms have, 95 % interval")
        for name, pair in content["differences"].items():
            beside.add_row(name, in_points(Difference(**pair)))
        found.append(beside)
    if not content["settings"]:
        return found
    settings = Table("setting", *content["runs"], title="settings that differ")
    for name, values in content["settings"].items():
        settings.add_row(name, *map(str, values))
    return [*found, settings]


def draw(paths: Sequence[str], names: Sequence[str], metrics: Sequence[str], out: Path) -> None:
    """Writes a picture with one chart per metric and one line per run; training metrics are smoothed.

    Raises:
        InputError: the picture cannot be written there, or not in that format.
    """
    from matplotlib.figure import Figure

    runs = [read_run(Path(path)) for path in paths]
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    for place, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(rows, columns, place)
        for run, name in zip(runs, names, strict=True):
            steps, values = run.series(metric)
            if len(steps):
                axes.plot(steps, smooth(values) if metric.startswith("train/") else values, label=name, linewidth=1.4)
        axes.set(title=metric, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"out: {out} cannot be written ({error}); choose another --out") from error


def run(config: CompareConfig) -> dict[str, Any]:
    """Prints the numbers and writes the picture."""
    content = compare(config.runs, config.metrics)
    if config.json:
        print(json.dumps(content))
    else:
        for table in tables_of(content):
            tables.print(table)
    if content["metrics"]:
        draw(config.runs, content["runs"], list(content["metrics"]), config.out)
        console.print(f"curves are in {config.out}")
    return content


def main(argv: list[str]) -> None:
    """Entry point of `hardviews compare`."""
    run(parse(CompareConfig, argv, prog="hardviews compare"))
