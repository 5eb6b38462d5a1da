"""`hardviews runs`: all runs below a folder with state, step, speed and last metrics."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table
from rich.text import Text

from jobs.run.folder import RunFolder
from jobs.run.terminal import parse, tables
from shards.errors import InputError

SILENT = 600  # seconds without a sign of life after which a run that never said it ended is called silent
COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "silent": "red"}
SPEED = "train/images_per_second"


@dataclass(frozen=True)
class RunsConfig:
    """Lists runs, the newest sign of life first."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder below which runs lie, at any depth."""
    metrics: tuple[str, ...] = ("train/loss", "knn/top1")
    """Metrics to show, by their last values."""
    json: bool = False
    """Print a JSON list instead of a table."""


@dataclass(frozen=True)
class RunState:
    """State of one run."""

    run: str
    """Its folder, relative to the one that was searched."""
    state: str
    """running, finished, interrupted or failed, from its state.json; silent: running, but nothing written lately."""
    step: int
    """Last known step."""
    steps: int | None
    """Length of the run, where it is known."""
    images_per_second: float | None
    """Last measured speed."""
    updated: float
    """Last sign of life, in Unix seconds."""
    metrics: dict[str, float]
    """Last finite value of each metric."""
    reason: str | None = None
    """Why it failed."""
    verdict: str | None = None
    """learning, not-learning-yet, not-learning, collapsed or diverging, as judged while it trained."""


def find_runs(folder: Path) -> Iterator[RunFolder]:
    """Run folders at or below `folder`; what lies inside a run is not searched."""
    for root, folders, files in os.walk(folder):
        run = RunFolder(Path(root))
        if "config.json" in files and (run.state.is_file() or run.checkpoints.is_dir() or run.log.is_dir()):
            folders.clear()
            yield run


def last_values(path: Path, names: Sequence[str]) -> dict[str, float]:
    """The last finite value of each metric, and the last step as `step`; only lines that may tell more are parsed."""
    found: dict[str, float] = {}
    missing = {"step", *names}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in reversed(lines):
        if not missing:
            break
        if not any(f'"{name}"'.encode() in line for name in missing):
            continue
        try:
            entry = json.loads(line)
        except ValueError:  # half-written
            continue
        new = {name: entry[name] for name in missing if is_finite(entry.get(name))}
        found |= new
        missing -= set(new)
    return found


def is_finite(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_state(run: RunFolder, root: Path, metrics: Sequence[str], now: float) -> RunState:
    """State of a run at `now` (Unix seconds)."""
    try:
        recorded = run.read_state()
    except (OSError, ValueError):
        recorded = {}
    values = last_values(run.metrics, [*metrics, SPEED])
    signs = [path.stat().st_mtime for path in (run.config, run.state, run.metrics) if path.is_file()]
    updated = max([*signs, float(recorded.get("updated") or 0)])
    state = str(recorded.get("state", "unknown"))
    if state == "running" and now - updated > SILENT:
        state = "silent"
    return RunState(
        run=str(run.path.relative_to(root)) if run.path != root else run.path.resolve().name,
        state=state,
        step=int(max(recorded.get("step") or 0, values.get("step", 0))),
        steps=recorded.get("steps"),
        images_per_second=values.get(SPEED, recorded.get("images_per_second")),
        updated=updated,
        metrics={name: values[name] for name in metrics if name in values},
        reason=recorded.get("reason"),
        verdict=recorded.get("verdict"),
    )


def list_runs(folder: Path, metrics: Sequence[str]) -> list[RunState]:
    """All runs below a folder, the newest sign of life first.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise InputError(f"folder: {folder} does not exist; give the folder that holds runs")
    now = time.time()
    states = [read_state(run, folder, metrics, now) for run in find_runs(folder)]
    if not states:
        raise InputError(f"folder: no run below {folder}; start one with `hardviews pretrain … --run {folder}/NAME`")
    return sorted(states, key=lambda state: (-state.updated, state.run))


def ago(seconds: float) -> str:
    """A span of time as a reader takes it: 12 s, 5 min, 3 h, 2 days."""
    for length, unit in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / (86400 if unit == 'days' else length):.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def table_of(states: Sequence[RunState], metrics: Sequence[str], now: float) -> Table:
    """The list as a table."""
    table = Table("run", "state", "verdict")
    for head in ("step", "images/s", *metrics, "last sign"):
        table.add_column(head, justify="right")
    for one in states:
        colour = COLOURS.get(one.state, "default")
        table.add_row(
            one.run,
            Text(one.state, style=colour),
            one.verdict or "",
            f"{one.step:,}" + (f" / {one.steps:,}" if one.steps else ""),
            "" if one.images_per_second is None else f"{one.images_per_second:,.1f}",
            *(f"{one.metrics[name]:.4g}" if name in one.metrics else "" for name in metrics),
            f"{ago(now - one.updated)} ago",
        )
    return table


def run(config: RunsConfig) -> None:
    """Prints the list."""
    states = list_runs(config.folder, config.metrics)
    if config.json:
        print(json.dumps([asdict(state) for state in states]))
    else:
        tables.print(table_of(states, config.metrics, time.time()))
        for state in states:
            if state.reason:
                tables.print(f"{state.run}: {state.reason}", highlight=False, soft_wrap=True)


def main(argv: list[str]) -> None:
    """Entry point of `hardviews runs`."""
    run(parse(RunsConfig, argv, prog="hardviews runs"))
