"""The analysis's pictures, each as PNG and SVG. Input is the content of analysis.json, so they can be drawn again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.analysis.choices import DISTANCE_EDGES, HISTOGRAMS, ZOOM_EDGES

COLOURS = {"chosen": "#0b6e99", "all": "#b35900", "random": "#6b6b6b"}
CYCLE = ["#0b6e99", "#b35900", "#3d7a3d", "#8a3a8a", "#6b6b6b", "#a32020"]
NAMES = {
    "iou": "IoU",
    "distance": "relative distance",
    "colour_distance": "colour distance",
    "zoom": "zoom (octaves of area)",
}
Analysis = Mapping[str, Any]


def draw_all(analysis: Analysis, folder: Path) -> list[Path]:
    """Every picture for which the analysis has what it takes; returns the files."""
    pictures: dict[str, tuple[str, Callable[[Analysis], Figure]]] = {
        "lowest_iou_share": ("over_training", lambda a: over_training({"": a}, "lowest_iou_share")),
        "mean_iou": ("over_training", mean_iou),
        "distributions": ("histograms", distributions),
        "zoom_distance": ("zoom_distance", zoom_distance),
        "importance": ("importance", importance),
        "loss_curves": ("importance_details", loss_curves),
        "interactions": ("importance_details", interactions),
        "by_source": ("by_source", by_source),
    }
    files = []
    for name, (needs, draw) in pictures.items():
        if analysis.get(needs):
            files += save(draw(analysis), folder / name)
    return files


def draw_comparison(analyses: Mapping[str, Analysis], folder: Path) -> list[Path]:
    """The runs on top of one another: lowest-IoU share, mean IoU and loss over training, IoU of chosen pairs,
    importance. Runs that lack a part are left out of its picture."""
    over_time = {run: a for run, a in analyses.items() if a.get("over_training")}
    files = []
    if over_time:
        for measure in ("lowest_iou_share", "mean_iou", "mean_loss_chosen"):
            files += save(over_training(over_time, measure), folder / f"compare_{measure}")
        files += save(_compared_iou(over_time), folder / "compare_iou")
    if explained := {run: a for run, a in analyses.items() if a.get("importance")}:
        files += save(_compared_importance(explained), folder / "compare_importance")
    return files


def save(figure: Figure, path: Path) -> list[Path]:
    """PATH.png and PATH.svg."""
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(files[0], dpi=150)
    figure.set_layout_engine("none")  # keeps the layout, which takes as long as drawing
    figure.savefig(files[1], metadata={"Date": None})
    return files


def over_training(analyses: Mapping[str, Analysis], measure: str) -> Figure:
    """One measure over the steps, a line a run, with its error band; chance where the measure has one."""
    figure, axes = _figure(1)
    for (run, analysis), colour in zip(analyses.items(), CYCLE * len(analyses), strict=False):
        _band(axes[0], analysis["over_training"], measure, run or "chosen pairs", colour)
    if measure == "lowest_iou_share":
        chance = next(iter(analyses.values()))["over_training"]
        _line(axes[0], chance, "chance", "chance", "black", linestyle=":")
        axes[0].set_ylim(bottom=0)
    title = {
        "lowest_iou_share": "chosen pair has the lowest IoU: share of images",
        "mean_iou": "mean IoU of chosen pairs",
        "mean_loss_chosen": "mean loss of chosen pairs",
    }[measure]
    axes[0].set(xlabel="step", title=title)
    _legend(axes[0])
    return figure


def mean_iou(analysis: Analysis) -> Figure:
    """IoU, distance, zoom and loss of chosen and all pairs over training."""
    figure, axes = _figure(4, columns=2)
    for ax, (name, title) in zip(
        axes,
        {"iou": "mean IoU", "distance": "mean relative distance", "zoom": "mean zoom (octaves)"}.items(),
        strict=False,
    ):
        _band(ax, analysis["over_training"], f"mean_{name}", "chosen pairs", COLOURS["chosen"])
        _band(ax, analysis["over_training"], f"mean_{name}_all", "all pairs", COLOURS["all"])
        ax.set(title=title, xlabel="step")
        _legend(ax)
    _band(axes[3], analysis["over_training"], "mean_loss_chosen", "chosen pairs", COLOURS["chosen"])
    _band(axes[3], analysis["over_training"], "mean_loss", "all pairs", COLOURS["all"])
    axes[3].set(title="mean loss", xlabel="step")
    _legend(axes[3])
    return figure


def distributions(analysis: Analysis) -> Figure:
    """Densities of IoU, distance, zoom and colour distance of chosen, all and random pairs."""
    figure, axes = _figure(4, columns=2)
    for ax, (name, edges) in zip(axes, HISTOGRAMS.items(), strict=True):
        for kind, colour in COLOURS.items():
            counts = np.array(analysis["histograms"][name][kind])
            density = counts / max(counts.sum(), 1) / np.diff(edges)
            ax.stairs(
                density,
                edges,
                color=colour,
                label=f"{kind} pairs",
                linewidth=1.5,
                linestyle=":" if kind == "random" else "-",
            )
        ax.set(xlabel=NAMES[name], ylabel="density")
    _legend(axes[0])
    return figure


def zoom_distance(analysis: Analysis) -> Figure:
    """How much more often than at random a pair of given zoom and distance is chosen."""
    figure, axes = _figure(1)
    lift = np.array([[np.nan if v is None else v for v in row] for row in analysis["zoom_distance"]["lift"]])
    most = max(np.nanmax(np.abs(np.log2(np.maximum(lift, 2**-3)))), 1e-3)
    mesh = axes[0].pcolormesh(
        DISTANCE_EDGES, ZOOM_EDGES, np.log2(np.maximum(lift, 2**-3)), cmap="PuOr", vmin=-most, vmax=most
    )
    axes[0].grid(visible=False)
    figure.colorbar(mesh, label="log2 (chosen / at random)")
    axes[0].set(xlabel=NAMES["distance"], ylabel=NAMES["zoom"], title="which zoom and distance is chosen")
    return figure


def importance(analysis: Analysis) -> Figure:
    """Bars of all three measures, with the published values beside Hutter's."""
    details = analysis["importance_details"]
    figure, axes = _figure(3, width=5)
    titles = {
        "loss": "share of the loss's variance\n(own distributions, leaves of 50)",
        "tree": "Hutter's measure\n(uniform, fully grown, of the tree)",
        "correlation": "correlation ratio\n(with all it is correlated with)",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        shares = details[name]
        _bars(ax, shares)
        if name == "tree":
            published = [100 * details["published"].get(share["feature"], np.nan) for share in shares]
            ax.plot(published, np.arange(len(shares)), "D", color="black", markersize=5, label="HVP, appendix E")
            _legend(ax)
        ax.set_title(title)
    return figure


def loss_curves(analysis: Analysis) -> Figure:
    """The forest's mean loss as each metric changes and the others keep their distributions."""
    curves = analysis["importance_details"]["curves"]
    figure, axes = _figure(len(curves), columns=4, width=3.4)
    low, high = (f([f(curve["loss"]) for curve in curves.values()]) for f in (min, max))
    for ax, (name, curve) in zip(axes, curves.items(), strict=False):
        ax.plot(curve["metric"], curve["loss"], color=COLOURS["chosen"])
        ax.set(
            xlabel=NAMES.get(name, f"{name} difference"), ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low))
        )
    axes[0].set_ylabel("mean loss")
    return figure


def interactions(analysis: Analysis) -> Figure:
    """Share of the loss's variance that two metrics explain beyond each alone."""
    pairs = sorted(analysis["importance_details"]["interactions"], key=lambda pair: -pair["share"])[:10]
    figure, axes = _figure(1)
    places = np.arange(len(pairs))
    axes[0].barh(places, [100 * pair["share"] for pair in pairs], color=COLOURS["chosen"])
    axes[0].set_yticks(places, [f"{_name(pair['first'])} × {_name(pair['second'])}" for pair in pairs])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="% of the loss's variance", title="pairwise interactions, the ten largest")
    return figure


def by_source(analysis: Analysis) -> Figure:
    """Loss, lowest-IoU share, IoU and zoom of each source, with error bars."""
    measures = {"mean_loss": "mean loss of all pairs", "lowest_iou_share": "lowest-IoU share", "mean_iou": "mean IoU, chosen", "mean_zoom": "mean zoom, chosen"}  # fmt: skip  # noqa: E501
    figure, axes = _figure(4, columns=4, width=2.6)
    for ax, (measure, title) in zip(axes, measures.items(), strict=True):
        for place, (source, facts) in enumerate(analysis["by_source"].items()):
            value = facts[measure]
            if value is not None:
                half = value - facts.get("low", facts)[measure]
                ax.errorbar(place, value, half, fmt="o", color=CYCLE[place % len(CYCLE)], capsize=4, label=source)
        ax.set_xticks(range(len(analysis["by_source"])), list(analysis["by_source"]))
        ax.set_xlim(-0.5, len(analysis["by_source"]) - 0.5)
        ax.set_title(title)
    return figure


def _compared_iou(analyses: Mapping[str, Analysis]) -> Figure:
    figure, axes = _figure(1)
    for (run, analysis), colour in zip(analyses.items(), CYCLE * len(analyses), strict=False):
        counts = np.array(analysis["histograms"]["iou"]["chosen"])
        edges = HISTOGRAMS["iou"]
        axes[0].stairs(counts / max(counts.sum(), 1) / np.diff(edges), edges, color=colour, label=run, linewidth=1.5)
    axes[0].set(xlabel="IoU", ylabel="density", title="IoU of chosen pairs")
    _legend(axes[0])
    return figure


def _compared_importance(analyses: Mapping[str, Analysis]) -> Figure:
    figure, axes = _figure(1)
    height = 0.8 / len(analyses)
    for number, (run, analysis) in enumerate(analyses.items()):
        _bars(axes[0], analysis["importance"], number * height, height, CYCLE[number % len(CYCLE)], run)
    axes[0].set_title("share of the loss's variance")
    _legend(axes[0])
    return figure


def _figure(panels: int, columns: int | None = None, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    columns = panels if columns is None else min(columns, panels)
    rows = -(-panels // columns)
    width = 7 if panels == 1 else width
    figure = Figure(figsize=(width * columns, 3.6 * rows if panels > 1 else 4.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    for ax in axes[panels:]:
        ax.set_axis_off()
    return figure, list(axes)


def _line(ax: Axes, series: Sequence[Mapping[str, Any]], measure: str, label: str, colour: str, **how: Any) -> None:
    points = [(row["step"], row[measure]) for row in series if row.get(measure) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, color=colour, label=label, marker="o" if len(points) == 1 else None, **how)


def _band(ax: Axes, series: Sequence[Mapping[str, Any]], measure: str, label: str, colour: str) -> None:
    _line(ax, series, measure, label, colour)
    rows = [row for row in series if row.get("low", {}).get(measure) is not None]
    if len(rows) > 1:
        low, high = ([row[end][measure] for row in rows] for end in ("low", "high"))
        ax.fill_between([row["step"] for row in rows], low, high, color=colour, alpha=0.2, linewidth=0)


def _bars(
    ax: Axes,
    shares: Sequence[Mapping[str, Any]],
    offset: float = 0,
    height: float = 0.7,
    colour: str = COLOURS["chosen"],
    label: str | None = None,
) -> None:
    places = np.arange(len(shares)) + offset
    values = np.array([[s["share"], s["share"] - s["low"], s["high"] - s["share"]] for s in shares]).T * 100
    ax.barh(places, values[0], height, xerr=np.maximum(values[1:], 0), color=colour, ecolor="#333333", label=label)
    ax.set_yticks(np.arange(len(shares)), [_name(s["feature"]) for s in shares])
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.set_xlabel("%")


def _name(feature: str) -> str:
    return NAMES.get(feature, feature)


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")
