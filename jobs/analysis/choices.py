"""Which pairs are chosen: overlap, distance and zoom of chosen pairs beside all and random ones, in one pass.

Everything is a sum over log rows, kept by window of training, by source and by group of images; the groups give error
bars that allow for an image's recurring over epochs. Memory does not grow with the log.

Shape suffixes: B log rows, P candidate pairs, S sources, T windows of training, I groups of images, M means, C classes.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.analysis.pairs import pair_metrics, pair_zoom, scored_params
from jobs.log.reader import Rows

MEANS: dict[str, str] = {
    "lowest_iou_share": "share of rows whose chosen pair has the lowest IoU of all pairs",
    "chance": "the same for a pair chosen at random (ties for the lowest count for both)",
    "mean_iou": "mean IoU of chosen pairs",
    "mean_iou_all": "mean IoU of all pairs",
    "mean_iou_random": "mean IoU of one random pair a row",
    "mean_distance": "mean relative distance of chosen pairs",
    "mean_distance_all": "mean relative distance of all pairs",
    "mean_zoom": "mean zoom (|log2| of the ratio of crop areas) of chosen pairs",
    "mean_zoom_all": "mean zoom of all pairs",
    "mean_colour_distance": "mean colour distance of chosen pairs",
    "mean_colour_distance_all": "mean colour distance of all pairs",
    "mean_loss": "mean loss of all pairs: how hard the views are",
    "mean_loss_chosen": "mean loss of chosen pairs",
}
GROUPS = 32
HISTOGRAMS = {
    "iou": np.linspace(0, 1, 51),
    "distance": np.linspace(0, 0.8, 41),
    "zoom": np.linspace(0, 4, 41),
    "colour_distance": np.linspace(0, 1.6, 41),
}
"""Metric → bin edges; what lies beyond the last edge counts in the last bin."""
ZOOM_EDGES = np.linspace(0, 3, 16)
DISTANCE_EDGES = np.linspace(0, 0.6, 16)
KINDS = ("chosen", "all", "random")


@dataclass
class Choices:
    """The sums; `add` takes rows, the other methods read results."""

    steps: tuple[int, int]
    """First and last step of the log."""
    sources: list[str]
    windows: int = 50
    """Equal windows of steps for series over training; fewer where the log has fewer steps."""
    seed: int = 0
    rows: int = 0
    histograms: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    grids: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first, last = self.steps
        self.windows = min(self.windows, last - first + 1)
        self._edges_T1 = np.linspace(first, last + 1, self.windows + 1)
        self._count_STI = np.zeros((len(self.sources), self.windows, GROUPS))
        self._sums_MSTI = np.zeros((len(MEANS), *self._count_STI.shape))
        self._class_count_C, self._class_sums_MC = np.zeros(0), np.zeros((len(MEANS), 0))
        self._rng = np.random.default_rng(self.seed)
        self.histograms = {m: {k: np.zeros(len(e) - 1) for k in KINDS} for m, e in HISTOGRAMS.items()}
        self.grids = {kind: np.zeros((len(ZOOM_EDGES) - 1, len(DISTANCE_EDGES) - 1)) for kind in ("chosen", "all")}

    def add(self, rows: Rows) -> None:
        """Takes rows whose choice is known."""
        if not len(rows):
            return
        self.rows += len(rows)
        params = scored_params(rows)
        metrics = {**pair_metrics(params, rows.sizes_B2), "zoom": pair_zoom(params)}
        pairs = rows.loss_BP.shape[1]
        picks = {"chosen": rows.choice_B, "random": self._rng.integers(0, pairs, len(rows))}
        self._add_means(rows, metrics, picks)
        for name, histogram in self.histograms.items():
            for kind in KINDS:
                values = metrics[name].ravel() if kind == "all" else _pick(metrics[name], picks[kind])
                histogram[kind] += _histogram(values, HISTOGRAMS[name])
        for kind, grid in self.grids.items():
            zoom, distance = (
                metrics[name].ravel() if kind == "all" else _pick(metrics[name], picks[kind])
                for name in ("zoom", "distance")
            )
            place = _place(zoom, ZOOM_EDGES) * grid.shape[1] + _place(distance, DISTANCE_EDGES)
            grid += np.bincount(place, minlength=grid.size).reshape(grid.shape)

    def total(self) -> dict[str, Any]:
        """Every mean over all rows."""
        return self._summary(self._count_STI.sum((0, 1)), self._sums_MSTI.sum((1, 2)))

    def over_training(self) -> list[dict[str, Any]]:
        """The same for each window that has rows; `step` is the window's middle."""
        count_TI, sums_MTI = self._count_STI.sum(0), self._sums_MSTI.sum(1)
        series = []
        for t in np.flatnonzero(count_TI.sum(1)):
            first, behind = (int(np.ceil(edge)) for edge in self._edges_T1[t : t + 2])
            where = {"step": (first + behind - 1) / 2, "first_step": first, "last_step": behind - 1}
            series.append(where | self._summary(count_TI[t], sums_MTI[:, t]))
        return series

    def by_source(self) -> dict[str, dict[str, Any]]:
        """The same for each source that has rows."""
        count_SI, sums_MSI = self._count_STI.sum(1), self._sums_MSTI.sum(2)
        present = np.flatnonzero(count_SI.sum(1))
        return {self.sources[s]: self._summary(count_SI[s], sums_MSI[:, s]) for s in present}

    def by_class(self) -> list[dict[str, Any]]:
        """Every mean for each label that occurs; empty where no image has one."""
        count_C = self._class_count_C
        return [
            {"class": int(c), "rows": int(count_C[c]), **_named(self._class_sums_MC[:, c] / count_C[c])}
            for c in np.flatnonzero(count_C)
        ]

    def _add_means(self, rows: Rows, metrics: dict[str, NDArray[Any]], picks: dict[str, NDArray[Any]]) -> None:
        lowest_BP = metrics["iou"] == metrics["iou"].min(1, keepdims=True)
        values = {
            "lowest_iou_share": _pick(lowest_BP, picks["chosen"]),
            "chance": lowest_BP.mean(1),
            "mean_iou_random": _pick(metrics["iou"], picks["random"]),
            "mean_loss": rows.loss_BP.mean(1),
            "mean_loss_chosen": _pick(rows.loss_BP, picks["chosen"]),
        }
        for name in HISTOGRAMS:
            values |= {f"mean_{name}": _pick(metrics[name], picks["chosen"]), f"mean_{name}_all": metrics[name].mean(1)}
        window_B = np.searchsorted(self._edges_T1, rows.step_B, side="right") - 1
        mixed_B = (rows.sample_B.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)  # splitmix's golden ratio
        group_B = (mixed_B >> np.uint64(40)).astype(np.int64) % GROUPS
        shape = self._count_STI.shape
        place_B = np.ravel_multi_index((rows.source_B.astype(np.int64), window_B, group_B), shape)
        self._count_STI += np.bincount(place_B, minlength=self._count_STI.size).reshape(shape)
        labelled = np.flatnonzero(rows.label_B >= 0)
        labels = rows.label_B[labelled]
        self._grow(int(labels.max(initial=-1)) + 1)
        self._class_count_C += np.bincount(labels, minlength=len(self._class_count_C))
        for m, name in enumerate(MEANS):
            value_B = values[name].astype(np.float64)
            self._sums_MSTI[m] += np.bincount(place_B, value_B, minlength=self._count_STI.size).reshape(shape)
            self._class_sums_MC[m] += np.bincount(labels, value_B[labelled], minlength=len(self._class_count_C))

    def _grow(self, classes: int) -> None:
        more = max(classes - len(self._class_count_C), 0)
        self._class_count_C = np.pad(self._class_count_C, (0, more))
        self._class_sums_MC = np.pad(self._class_sums_MC, ((0, 0), (0, more)))

    def _summary(self, count_I: NDArray[np.float64], sums_MI: NDArray[np.float64]) -> dict[str, Any]:
        """Means; `low` and `high` hold the ends of their bars, 1.96 standard errors of a ratio of sums over groups."""
        total, groups = count_I.sum(), int((count_I > 0).sum())
        mean_M = sums_MI.sum(1) / total
        found: dict[str, Any] = {"rows": int(total), **_named(mean_M)}
        if groups > 1:
            rest_MI = sums_MI - mean_M[:, None] * count_I
            error_M = np.sqrt(groups / (groups - 1) * (rest_MI**2).sum(1)) / total
            found |= {"low": _named(mean_M - 1.96 * error_M), "high": _named(mean_M + 1.96 * error_M)}
        return found


def _named(value_M: NDArray[np.float64]) -> dict[str, float | None]:
    """By name; JSON has no NaN, so what has not been measured is null."""
    return {name: float(value) if np.isfinite(value) else None for name, value in zip(MEANS, value_M, strict=True)}


def _pick(values_BP: NDArray[Any], choice_B: NDArray[Any]) -> NDArray[Any]:
    return values_BP[np.arange(len(values_BP)), choice_B]


def _place(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each value between equally spaced edges; beyond the last one, the last bin."""
    scaled = (values - edges[0]) / (edges[1] - edges[0])
    return np.clip(scaled, 0, len(edges) - 2).astype(np.int64)


def _histogram(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(_place(values, edges), minlength=len(edges) - 1).astype(np.float64)
