"""The picture of a study."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from jobs.studies.plan import Changes, Study
from jobs.studies.results import MEASURES


def plot(summary: Mapping[str, Mapping[str, Any]], chosen: Study, path: Path) -> None:
    """A PNG with a panel per measure: every run, and mean ± deviation of the arms. Along the values of a single axis of
    numbers; in a study of costs along the time, a curve for each rule of choice; else one line per arm."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {arm: measured for arm, measured in summary.items() if measured.keys() & MEASURES.keys()}
    measures = [name for name in MEASURES if any(name in measured for measured in shown.values())]
    numbers = axis_of_numbers({arm: chosen.arms[arm] for arm in shown})
    height = 4.2 if numbers or chosen.time else 0.45 * len(shown) + 1.4
    figure, panels = pyplot.subplots(1, len(measures), figsize=(5.6 * len(measures), height), squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=True):
        measured = {arm: value[measure] for arm, value in shown.items() if measure in value}
        label = f"{MEASURES[measure]} top-1 (%)"
        if chosen.time:
            curves: dict[str, dict[float, Any]] = {}
            for arm, value in measured.items():
                curves.setdefault(arm.rpartition("-")[0], {})[chosen.time[arm]] = value
            for rule, points in curves.items():
                along(panel, dict(sorted(points.items())), label=rule)
            panel.set(xlabel="time of training, in plain steps", ylabel=label, xscale="log")
            panel.legend(fontsize="small")
        elif numbers:
            along(panel, {numbers[1][arm]: value for arm, value in measured.items()})
            panel.set(xlabel=numbers[0], ylabel=label)
        else:
            means = [100 * value["mean"] for value in measured.values()]
            spreads = [100 * (value["std"] or 0.0) for value in measured.values()]
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


def along(panel: Axes, points: Mapping[float, Mapping[str, Any]], label: str = "") -> None:
    """A curve of means with their deviations, and every run."""
    means = [100 * value["mean"] for value in points.values()]
    spreads = [100 * (value["std"] or 0.0) for value in points.values()]
    panel.errorbar([*points], means, yerr=spreads, fmt="o-", capsize=3, label=label, markersize=4)
    runs = [(x, 100 * v) for x, value in points.items() for v in value["values"]]
    panel.scatter(*zip(*runs, strict=True), s=8, color="grey", alpha=0.6, zorder=3)


def axis_of_numbers(arms: Mapping[str, Changes]) -> tuple[str, dict[str, float]] | None:
    """The field and each arm's value, where the arms differ in one field of numbers."""
    fields = {name for changes in arms.values() for name in changes}
    if len(fields) != 1 or len(arms) < 2:
        return None
    (name,) = fields
    values = {arm: changes[name] for arm, changes in arms.items()}
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values())
    return (name, values) if numeric else None
