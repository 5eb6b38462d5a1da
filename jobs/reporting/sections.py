"""The report's sections: each a pure function from a run's data to HTML, or to the reason why it is left out."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jobs.reporting import charts
from jobs.reporting.charts import Bar, Series
from jobs.reporting.health import checks
from jobs.reporting.html import Markup, join, number, percent, seconds, table, tag
from jobs.reporting.protocols import described, side_by_side
from jobs.reporting.rundata import RunData, is_finite

# A str that is not Markup is the reason why a section has nothing to show.
Section = Callable[[RunData], Markup | str]

KEY_SETTINGS = (
    ("Objective", ("objective.name", "objective")),
    ("Backbone", ("backbone.name", "backbone")),
    ("Image size (px)", ("backbone.image_size",)),
    ("Views per image", ("selection.views",)),
    ("Selection rule", ("selection.rule",)),
    ("Selection encoder", ("selection.encoder",)),
    ("Synthetic share", ("data.synthetic_share",)),
    ("Views drawn by", ("views.policy",)),
    ("Batch (images)", ("batch",)),
    ("Learning rate", ("optimizer.lr",)),
    ("Epochs", ("epochs",)),
    ("Seed", ("seed",)),
)


def summary(run: RunData) -> Markup:
    """Headline numbers, signs of health, settings."""
    tiles = [
        tag("dl", tag("dt", name), tag("dd", value), tag("dd", note), class_="tile")
        for name, value, note in headline(run)
    ]
    marks = {"good": "✓", "warn": "!", "bad": "✕"}
    signs = [
        tag("li", tag("span", marks[c.state], class_="mark", aria_hidden="true"),
            tag("div", tag("b", c.name), tag("span", f" ({c.state})", class_="hidden"), " ", tag("span", c.text)),
            class_=c.state)
        for c in checks(run)
    ]  # fmt: skip
    settings: list[list[object]] = [
        [name, str(value)] for name, keys in KEY_SETTINGS if (value := run.setting(*keys)) is not None
    ]
    if run.origin:
        settings.append(["Started from", run.origin])
    full = json.dumps(run.config, indent=1, ensure_ascii=False)
    return join(
        tag("div", *tiles, class_="tiles") if tiles else None,
        tag(
            "div",
            tag("div", tag("h3", "Health"), tag("ul", *signs, class_="checks"), class_="card"),
            tag(
                "div",
                tag("h3", "Settings"),
                table(["Setting", "Value"], settings, sortable=False) if settings else None,
                tag("details", tag("summary", "Whole configuration"), tag("pre", full, tabindex="0")),
                class_="card",
            ),
            class_="cards",
        ),
    )


def headline(run: RunData) -> list[tuple[str, str, str]]:
    """Name, value and note of the numbers a reader looks for first."""
    tiles = []
    step = max((line.get("step", 0) for line in run.metrics), default=0)
    if step:
        tiles.append(("Steps", number(step), f"state: {run.state.get('state', 'not recorded')}"))
    if verdict := run.state.get("verdict"):
        tiles.insert(0, ("Verdict", verdict.replace("-", " "), "judged while training, see Health"))
    _, knn = run.series("knn/top1")
    if len(knn):
        note = f"{percent(knn[0])} at the first measure" if len(knn) > 1 else "one measure so far"
        tiles.append(("kNN top-1", percent(knn[-1]), note))
    for label, (score,) in side_by_side([run]).items():
        if score is not None:
            tiles.append((f"{label} top-1", percent(score.top1), f"step {score.step}, {score.which} encoder"))
    loss = run.last("train/loss")
    if loss is not None:
        tiles.append(("Loss", number(loss, 4), f"{number(run.series('train/loss')[1][0], 4)} at the start"))
    _, speed = run.series("train/images_per_second")
    if len(speed):
        tiles.append(("Images per second", number(round(float(np.median(speed)), 1), 4), "median over the run"))
    share, chance = (run.analysis or {}).get("lowest_iou_share"), (run.analysis or {}).get("chance")
    if is_finite(share) and is_finite(chance):
        tiles.append(("Hardest is lowest IoU", percent(share), f"{percent(chance)} by chance"))
    return tiles


def curves(run: RunData) -> Markup | str:
    """Loss, kNN, learning rate and every sign of health that was logged."""
    if not run.metrics:
        return "Curves need metrics.jsonl, and this run has none or an empty one."
    drawn = []
    for name, title, note in (
        ("train/loss", "Training loss", "moving mean over 3 % of the run, raw values behind it"),
        ("knn/top1", "kNN top-1 on held-out images", "share right"),
    ):
        drawn.append(_curve(run, name, title, note))
    known = {"train/loss", "knn/top1", "train/images_per_second"}
    small = [n for n in run.names() if n not in known and not n.startswith(("time/", "grad/"))]
    drawn += [_gradients(run), *(_curve(run, name, name, "") for name in small)]
    figures = [figure for figure in drawn if figure is not None]
    steps = {line.get("step") for line in run.metrics}
    few = tag("p", "The metrics hold a single step, so curves are points.") if len(steps) == 1 else None
    return join(few, tag("div", *figures[:2], class_="cards"), _fold("More curves", figures[2:]))


def _fold(name: str, figures: Sequence[Markup]) -> Markup | None:
    if not figures:
        return None
    return tag(
        "details",
        tag("summary", f"{name} ({len(figures)})"),
        tag("div", *figures, class_="cards"),
        open=len(figures) <= 6,
    )


def _curve(run: RunData, name: str, title: str, note: str) -> Markup | None:
    x, y = run.series(name)
    if not np.isfinite(y).any():
        return None
    smoothed = charts.smooth(y) if name.startswith("train/") else y
    raw = y if smoothed is not y and len(y) > 1 else None
    shape = percent if _is_share(name) else number
    broken = int((~np.isfinite(y)).sum())
    note = f"{note}; {broken} values are not finite" if broken else note
    lines = [Series(name, x, smoothed, faint=raw)]
    marks = run.synthetic_span() if name == "train/loss" else []
    at, chance = run.series("train/chance")
    if name == "train/loss" and len(chance):  # it steps where synthetic negatives begin and end
        lines.append(Series("chance", at, chance, colour=1, dashed=True))
    if marks:
        at, real = run.real_loss()
        lines.append(Series("against real negatives alone", at, charts.smooth(real), colour=2))
    return charts.line_chart(title, lines, x_label="step", note=note, shape=shape, marks=marks)


def _gradients(run: RunData) -> Markup | None:
    """Gradient norms of a few layers from the first to the last: MoCo v3 saw spikes start at the patch projection."""
    names = run.names("grad/")
    layers = [n for n in names if "backbone" in n and ("patch_embed" in n or "blocks" in n or "layers" in n)] or names
    picked = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(4, len(layers))).round().astype(int))]
    series = []
    for i, name in enumerate(picked):
        x, y = run.series(name)
        if np.isfinite(y).any():
            series.append(Series(name.split("/")[-1].removeprefix("online.backbone."), x, y, colour=i))
    return charts.line_chart("Gradient norm by layer", series, x_label="step", floor=0.0) if series else None


def _is_share(name: str) -> bool:
    return name.split("/")[-1].endswith(("top1", "top5", "share", "accuracy", "knn"))


def scores(run: RunData) -> Markup | str:
    """All evaluations as one table, then per k, confusion and per class of the newest ones."""
    if not run.evaluations:
        return "Nothing was evaluated yet: `hardviews evaluate` writes scores into the run."
    rows: list[list[object]] = []
    for e in run.evaluations:
        s, model = e.get("scores", {}), e.get("model", {})
        rows.append([
            e["kind"], model.get("name", ""), model.get("step") if model.get("step") is not None else "",
            model.get("which", ""),
            _score(s, "top1"), _score(s, "top5"), _score(s, "map"), _score(s, "rankme", plain=True),
            e.get("train", {}).get("name", ""), e.get("test", {}).get("name", ""),
            described(e.get("protocol") or {}), e.get("identity", ""),
        ])  # fmt: skip
    heads = [
        "Evaluation", "Model", "Step", "Encoder", "Top-1", "Top-5", "mAP", "RankMe",
        "Learned from", "Test images", "Protocol", "Identity",
    ]  # fmt: skip
    empty = [i for i in range(len(heads)) if all(row[i] == "" for row in rows)]
    kept = [i for i in range(len(heads)) if i not in empty]
    overview = table(
        [heads[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        "Scores; deviations are over seeds. Only those of equal protocols on the same images can be compared",
    )
    parts = [tag("div", overview, class_="card wide")]
    newest = {e["kind"]: e for e in sorted(run.evaluations, key=lambda e: e.get("model", {}).get("step") or 0)}
    for e in newest.values():
        parts += _details(e)
    return tag("div", *parts, class_="cards")


def _score(s: dict[str, Any], name: str, plain: bool = False) -> object:
    mean = s.get(name)
    if not is_finite(mean):
        return ""
    text = number(mean, 4) if plain else percent(mean)
    deviation = s.get(f"{name}_deviation")
    return (mean, f"{text} ± {number(100 * deviation, 2)}" if is_finite(deviation) else text)


def _details(e: dict[str, Any]) -> list[Markup]:
    parts = []
    by_k = e.get("by_k") or []
    name = f"{e['kind']} of {e.get('model', {}).get('name', 'the model')}"
    if by_k:
        bars = [Bar(f"k = {row['k']}", row["top1"]) for row in by_k]
        parts.append(charts.bar_chart("kNN top-1 by number of neighbours", bars, shape=percent))
    per_class = e.get("per_class") or []
    if per_class:
        rows: list[list[object]] = [[c["class"], c["images"], (c["top1"], percent(c["top1"]))] for c in per_class]
        parts.append(
            tag("div", tag("h3", f"Per class: {name}"), table(["Class", "Images", "Top-1"], rows), class_="card")
        )
    confusion = np.array(e.get("confusion") or [], dtype=np.float64)
    if confusion.ndim == 2 and 2 <= len(confusion) <= 25:
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        names = e.get("classes") or [str(i) for i in range(len(confusion))]
        parts.append(
            charts.heatmap(
                f"Confusion: {name}", shares, names, names, note="row: true class, column: predicted, % of the row"
            )
        )
    return parts


def selection(run: RunData) -> Markup | str:
    """IoU of chosen, all and random pairs; importance of what makes a pair hard; over training; by source."""
    a = run.analysis
    if a is None:
        return "There is no analysis of the augmentation log: `hardviews analyse RUN` writes it."
    parts = [
        part for part in (_iou(a), _importance(a), *_over_training(a), _by_source(a), _remarks(a)) if part is not None
    ]
    if not parts:
        return "The analysis holds none of IoU histograms, importance, training curves or sources."
    return tag("div", *parts, class_="cards")


def _iou(a: dict[str, Any]) -> Markup | None:
    h = a.get("iou_histograms") or {}
    if not h.get("edges"):
        return None
    counts = {name: np.array(h[name], dtype=np.float64) for name in ("chosen", "all", "random") if h.get(name)}
    shares = {f"{name} pairs": c / max(c.sum(), 1e-12) for name, c in counts.items()}
    return charts.histogram(
        "IoU of view pairs",
        np.array(h["edges"], dtype=np.float64),
        shares,
        x_label="IoU",
        note="share of pairs per bin",
    )


NAMES = {"iou": "IoU", "distance": "relative distance", "all_jointly": "all jointly"}


def _importance(a: dict[str, Any]) -> Markup | None:
    rows = [r for r in a.get("importance") or [] if is_finite(r.get("share"))]
    bars = [
        Bar(NAMES.get(r["feature"], str(r["feature"]).replace("_", " ")), r["share"], r.get("low"), r.get("high"))
        for r in sorted(rows, key=lambda r: -r["share"])
    ]
    note = "share of the loss's variance (fANOVA, empirical marginals)"
    return charts.bar_chart("What makes a pair hard", bars, note=note, shape=percent) if bars else None


# Title, unit of its values, and (line, key of analysis.json) for each line.
OVER_TRAINING = (
    ("Chosen pair has the lowest IoU", percent, (("chosen pairs", "lowest_iou_share"), ("chance", "chance"))),
    ("Mean IoU", number, (("chosen", "mean_iou"), ("all", "mean_iou_all"), ("random", "mean_iou_random"))),
    ("Mean relative distance", number, (("chosen", "mean_distance"), ("all", "mean_distance_all"))),
    ("Mean loss", number, (("chosen", "mean_loss_chosen"), ("all", "mean_loss"))),
)


def _over_training(a: dict[str, Any]) -> list[Markup]:
    rows = [r for r in a.get("over_training") or [] if is_finite(r.get("step"))]
    drawn = []
    for title, shape, lines in OVER_TRAINING:
        series = []
        for i, (name, key) in enumerate(lines):
            points = [(r["step"], r[key]) for r in rows if is_finite(r.get(key))]
            if points:
                x, y = np.array(points, dtype=np.float64).T
                series.append(Series(name, x, y, colour=i, dashed=name == "chance"))
        if series:
            drawn.append(charts.line_chart(title, series, x_label="step", shape=shape))
    return drawn


# What a reader compares between sources; analysis/by_source.csv holds the rest.
SOURCE_COLUMNS = (
    ("rows", "Images", number),
    ("mean_loss", "Mean loss", lambda x: number(x, 4)),
    ("mean_loss_chosen", "Loss of chosen", lambda x: number(x, 4)),
    ("lowest_iou_share", "Hardest is lowest IoU", percent),
    ("mean_iou", "IoU of chosen", number),
    ("mean_distance", "Distance of chosen", number),
    ("mean_zoom", "Zoom of chosen", number),
)


def _by_source(a: dict[str, Any]) -> Markup | None:
    sources: dict[str, dict[str, Any]] = a.get("by_source") or {}
    columns = [column for column in SOURCE_COLUMNS if any(is_finite(f.get(column[0])) for f in sources.values())]
    if not columns:
        return None
    body: list[list[object]] = [
        [name, *((f[k], shape(f[k])) if is_finite(f.get(k)) else "" for k, _, shape in columns)]
        for name, f in sources.items()
    ]
    heads = ["Source", *(head for _, head, _ in columns)]
    return tag("div", tag("h3", "By source"), table(heads, body), class_="card wide")


def _remarks(a: dict[str, Any]) -> Markup | None:
    classifier = a.get("classifier") or {}
    lines = [str(note) for note in a.get("notes") or []]
    if is_finite(classifier.get("top1")) and is_finite(classifier.get("chance")):
        lines.insert(
            0,
            f"A gradient-boosting classifier names the chosen pair of an image it has not seen in "
            f"{percent(classifier['top1'])} of cases, {percent(classifier['chance'])} by chance.",
        )
    return (
        tag("div", tag("h3", "Remarks"), tag("ul", *(tag("li", line) for line in lines)), class_="card wide")
        if lines
        else None
    )


def throughput(run: RunData) -> Markup | str:
    """Images per second over the run, seconds per step by phase, and the phase that bounds them."""
    x, speed = run.series("train/images_per_second")
    if not len(speed):
        return "metrics.jsonl has no train/images_per_second."
    figures = [
        charts.line_chart("Images per second", [Series("images per second", x, speed)], x_label="step", floor=0.0)
    ]
    parts, step = phases(run)
    verdict = None
    if parts:
        figures.append(
            charts.stacked_bar(
                "One step by phase", parts, note=f"{seconds(step)} per step, mean over the run", shape=seconds
            )
        )
        name, longest = max(parts, key=lambda part: part[1])
        verdict = tag("p", bound(name, longest / step))
    return join(verdict, tag("div", *figures, class_="cards"))


def phases(run: RunData) -> tuple[list[tuple[str, float]], float]:
    """Mean seconds per step of each timed phase, with the rest as `other`, and of the whole step."""
    means = {name.removeprefix("time/"): float(np.nanmean(run.series(name)[1])) for name in run.names("time/")}
    step = means.pop("step", 0.0) or sum(means.values())
    parts = sorted(((name, mean) for name, mean in means.items() if mean > 0), key=lambda part: -part[1])
    rest = step - sum(mean for _, mean in parts)
    return ([*parts, ("other", rest)] if rest > 0.01 * step else parts), step


def bound(name: str, share: float) -> str:
    """One sentence on what bounded the run."""
    if name == "data":
        return (
            f"The run waited for data during {percent(share, 0)} of a step: decoding and augmentation bound it. "
            "More decoding threads, or smaller stored images, would help."
        )
    return f"The longest phase of a step is “{name}” with {percent(share, 0)}: the model, not the data, bounds the run."


def quarantine(run: RunData) -> Markup | str:
    """Samples that could not be read, with the reason."""
    if not run.quarantine:
        return "No sample was put aside: every image that was asked for could be read."
    heads = list(dict.fromkeys(key for line in run.quarantine for key in line))
    rows: list[list[object]] = [[_plain(line.get(key, "")) for key in heads] for line in run.quarantine[:200]]
    more = len(run.quarantine) - len(rows)
    note = f"{len(run.quarantine)} samples were replaced by others" + (
        f"; the first {len(rows)} are listed" if more else ""
    )
    return tag("div", table(heads, rows, note), class_="card")


def _plain(cell: object) -> object:
    return cell if isinstance(cell, int | float | str) else json.dumps(cell)


def pictured(name: str, absent: str) -> Section:
    """A section whose HTML was made beforehand, as it needs images or a model."""
    return lambda run: run.pictures.get(name, absent)


SECTIONS: tuple[tuple[str, str, str, Section], ...] = (
    ("summary", "Summary", "", summary),
    ("curves", "Curves", "", curves),
    ("scores", "Scores", "Accuracy on labelled images that the backbone was not trained on.", scores),
    (
        "views",
        "Hard views",
        "Images with the views drawn from them. The pair with solid boxes and outlined views was trained on. "
        "Under a view: its share of the image's area; factors of brightness, contrast and saturation and the shift of "
        "hue, where they apply; other operations.",
        pictured("views", "The gallery needs the augmentation log and the shards."),
    ),
    ("selection", "What was chosen", "Geometry and colour of the chosen pairs beside all candidates.", selection),
    (
        "samples",
        "Real and synthetic",
        "Images of each source, side by side.",
        pictured("samples", "Samples need the shards of the run."),
    ),
    (
        "attention",
        "Attention",
        "Where the untrained backbone and the run's checkpoints look.",
        pictured("attention", "Attention maps need a checkpoint and the shards."),
    ),
    ("throughput", "Throughput", "", throughput),
    ("quarantine", "Quarantine", "", quarantine),
)
