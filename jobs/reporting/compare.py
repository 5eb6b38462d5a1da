"""Several runs side by side: one table to sort, common curves."""

from collections.abc import Callable, Sequence

import numpy as np

from jobs.reporting import charts
from jobs.reporting.charts import Series
from jobs.reporting.html import Markup, join, number, percent, table, tag
from jobs.reporting.protocols import side_by_side
from jobs.reporting.rundata import RunData, flatten, is_finite
from jobs.studies.difference import Difference, difference, in_points

LOSS = "train/loss"
COMPARED = (
    (LOSS, "Training loss, against real negatives alone", number),
    ("knn/top1", "kNN top-1 on held-out images", percent),
)
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
    arms = arm_differences(runs)
    beside: list[list[object]] = [[name, in_points(pair)] for name, pair in arms.items()]
    about = "Second arm less the first, in points, over shared seeds; 95 % interval by Student's t"
    return join(
        tag("div", overview, class_="card"),
        tag("div", evaluated(runs), class_="card", style="margin:1rem 0"),
        tag("div", table(["Score", "Difference"], beside, about), class_="card", style="margin:1rem 0") if arms else "",
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


def arm_differences(runs: Sequence[RunData]) -> dict[str, Difference]:
    """By score, what the second of two arms has more than the first, paired over the seeds that both have. Runs that
    differ in their seed alone are one arm; empty where there are not two arms, or none of their seeds is shared."""
    scored = scores_of(runs)
    arms: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        own = {key: value for key, value in flatten(run.config).items() if key not in (*PLACES, "seed")}
        arms.setdefault(repr(sorted(own.items(), key=lambda item: item[0])), []).append(i)
    if len(arms) != 2:
        return {}
    first, second = ([(runs[i].setting("seed"), scored[i]) for i in arm] for arm in arms.values())
    pairs = {}
    for name in dict.fromkeys(name for _, scores in first for name in scores):
        one, other = ({s: scores[name] for s, scores in arm if name in scores} for arm in (first, second))
        if (pair := difference(other, one)) is not None:
            pairs[name] = pair
    return pairs


def scores_of(runs: Sequence[RunData]) -> list[dict[str, float]]:
    """Each run's accuracies by name: the last held-out kNN while training, and evaluations by protocol."""
    scored = [{} if (last := run.last("knn/top1")) is None else {"kNN": last} for run in runs]
    for label, row in side_by_side(runs).items():
        for scores, score in zip(scored, row, strict=True):
            if score is not None:
                scores[label] = score.top1
    return scored


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
        x, y = run.real_loss() if name == LOSS else run.series(name)
        if np.isfinite(y).any():
            smoothed = charts.smooth(y) if name.startswith("train/") else y
            series.append(Series(run.name, x, smoothed, colour=i, dashed=i >= charts.SERIES_COLOURS))
    references = _chance(runs) if name == LOSS else []
    return charts.line_chart(title, series, x_label="step", shape=shape, references=references) if series else None


def _chance(runs: Sequence[RunData]) -> list[tuple[str, float]]:
    """The chance level of the loss against real negatives, where it is the same in all runs."""
    levels = {run.state.get("verdict_figures", {}).get("chance") for run in runs}
    level = levels.pop()
    return [("chance", level)] if not levels and is_finite(level) else []


def _cell(x: float | None, shape: Callable[[float], str]) -> object:
    return (x, shape(x)) if is_finite(x) else ""
