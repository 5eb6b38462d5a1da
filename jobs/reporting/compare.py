"""Several runs side by side: one table to sort, common curves."""

from collections.abc import Callable, Sequence

import numpy as np

from jobs.reporting import charts
from jobs.reporting.charts import Series
from jobs.reporting.html import Markup, join, number, percent, table, tag
from jobs.reporting.protocols import side_by_side
from jobs.reporting.rundata import RunData, flatten, is_finite

COMPARED = (("train/loss", "Training loss", number), ("knn/top1", "kNN top-1 on held-out images", percent))
# Settings that name the run rather than describe it.
PLACES = ("run.folder", "run.path", "run.run", "run.name", "run")


def comparison(runs: Sequence[RunData]) -> Markup:
    """Final numbers of all runs, what differs between their settings, and their curves in one chart each."""
    rows: list[list[object]] = []
    for run in runs:
        share = (run.analysis or {}).get("lowest_iou_share")
        _, speed = run.series("train/images_per_second")
        rows.append([
            run.name,
            run.state.get("verdict", ""),
            max((line.get("step", 0) for line in run.metrics), default=0),
            _cell(run.last("train/loss"), lambda x: number(x, 4)),
            _cell(run.last("knn/top1"), percent),
            _cell(float(np.median(speed)) if len(speed) else None, lambda x: number(x, 4)),
            _cell(share, percent),
        ])  # fmt: skip
    heads = [
        "Run",
        "Verdict",
        "Steps",
        "Loss",
        "kNN",
        "Images/s",
        "Hardest is lowest IoU",
    ]
    kept = [i for i in range(len(heads)) if any(row[i] != "" for row in rows)]
    overview = table(
        [heads[i] for i in kept], [[row[i] for i in kept] for row in rows], "Newest values; a header sorts"
    )
    figures = [figure for name, title, shape in COMPARED if (figure := _together(runs, name, title, shape)) is not None]
    return join(
        tag("div", overview, class_="card"),
        tag("div", evaluated(runs), class_="card", style="margin:1rem 0"),
        tag("div", differences(runs), class_="card", style="margin:1rem 0"),
        tag("div", *figures, class_="cards"),
    )


def evaluated(runs: Sequence[RunData]) -> Markup:
    """Top-1 of the runs' own checkpoints, a row for each protocol."""
    scored = side_by_side(runs)
    if not scored:
        return tag("p", "No run was evaluated yet.")
    rows: list[list[object]] = [
        [label, *("" if score is None else (score.top1, f"{percent(score.top1)} (step {number(score.step)})")
                  for score in row)]
        for label, row in scored.items()
    ]  # fmt: skip
    return table(
        ["Evaluation", *(run.name for run in runs)], rows, "Top-1 by equal protocols, of the newest step scored"
    )


def differences(runs: Sequence[RunData]) -> Markup:
    """The settings in which the runs differ."""
    flats = [flatten(run.config) for run in runs]
    keys = [k for k in dict.fromkeys(k for flat in flats for k in flat) if k not in PLACES]
    differing = [k for k in keys if len({repr(flat.get(k)) for flat in flats}) > 1]
    if not differing:
        return tag("p", "The runs have the same settings.")
    rows: list[list[object]] = [[k, *(str(flat.get(k, "")) for flat in flats)] for k in differing]
    return table(["Setting", *(run.name for run in runs)], rows, "Settings that differ")


def _together(runs: Sequence[RunData], name: str, title: str, shape: Callable[[float], str]) -> Markup | None:
    series = []
    for i, run in enumerate(runs):
        x, y = run.series(name)
        if np.isfinite(y).any():
            smoothed = charts.smooth(y) if name.startswith("train/") else y
            series.append(Series(run.name, x, smoothed, colour=i, dashed=i >= charts.SERIES_COLOURS))
    return charts.line_chart(title, series, x_label="step", shape=shape) if series else None


def _cell(x: float | None, shape: Callable[[float], str]) -> object:
    return (x, shape(x)) if is_finite(x) else ""
