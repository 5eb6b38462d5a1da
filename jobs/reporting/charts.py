"""Charts as HTML and inline SVG.

Shapes are drawn in a box of 1 × 1 that stretches with its column, while every text is HTML beside it: so a chart is
crisp at any width and its letters keep their size on a phone. Each chart carries a description, a read-out by pointer
and arrow keys (script.py) and its values as a table.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.reporting.html import Markup, join, number, tag
from jobs.reporting.html import table as html_table
from jobs.reporting.style import SERIES_COLOURS

# Points drawn per line: more than a screen has pixels across a card is waste.
MOST_POINTS = 320
TABLE_ROWS = 24


@dataclass(frozen=True)
class Series:
    """One line: x and y float64 [n], its colour's index; `faint` draws the unsmoothed values behind it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    faint: np.ndarray | None = None
    dashed: bool = False
    area: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar with an optional interval, in the chart's unit."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0


def colour(index: int) -> str:
    """The CSS colour of series `index`."""
    return f"var(--s{index % SERIES_COLOURS})"


def smooth(y: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Centred moving mean over `share` of the points, narrower at the ends; not-finite values are left out."""
    half = int(len(y) * share / 2)
    if half == 0:
        return y
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(y))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high` inclusive, steps of 1, 2 or 5 times a power of ten, at most `most`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1, 2, 5, 10):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(x: np.ndarray, *ys: np.ndarray) -> tuple[np.ndarray, ...]:
    """At most MOST_POINTS points, evenly spaced by row; first and last stay."""
    if len(x) <= MOST_POINTS:
        return (x, *ys)
    rows = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
    return tuple(a[rows] for a in (x, *ys))


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    note: str = "",
    shape: Callable[[float], str] = number,
    references: Sequence[tuple[str, float]] = (),
    marks: Sequence[tuple[str, float]] = (),
    floor: float | None = None,
) -> Markup:
    """Lines over a common x. `references` are dashed horizontal lines with a name, `marks` dotted vertical ones;
    `floor` pins the lower y limit.

    Raises:
        ValueError: no series has a finite value.
    """
    # A line is thinned after smoothing; its faint original is thinned by the same rows.
    drawn = [_thinned(s) for s in series]
    finite = np.concatenate([a[np.isfinite(a)] for s in drawn for a in (s.y, s.faint) if a is not None])
    if not len(finite):
        raise ValueError(f"{title}: no finite value to draw")
    levels = np.concatenate([finite, [value for _, value in references]])
    bottom, top = _limits(levels, floor)
    left, right = min(float(s.x.min()) for s in drawn), max(float(s.x.max()) for s in drawn)
    across = lambda x: (x - left) / (right - left) if right > left else np.full_like(x, 0.5)  # noqa: E731
    up = lambda y: (y - bottom) / (top - bottom)  # noqa: E731

    shapes: list[Markup] = _grid([float(up(t)) for t in ticks(bottom, top)])
    for s in drawn:
        if s.faint is not None:
            shapes.append(_path(across(s.x), up(s.faint), "faint", s.colour))
        if s.area:
            shapes.append(_area(across(s.x), up(s.y), float(max(0.0, -bottom / (top - bottom))), s.colour))
        shapes.append(_path(across(s.x), up(s.y), "line dashed" if s.dashed else "line", s.colour))
    for _, value in references:
        at = 1 - float(up(value))
        shapes.append(tag("line", x1=0, x2=1, y1=f"{at:.4f}", y2=f"{at:.4f}", class_="reference dashed"))
    for _, x in marks:
        at = float(across(np.float64(x)))
        shapes.append(tag("line", x1=f"{at:.4f}", x2=f"{at:.4f}", y1=0, y2=1, class_="reference dotted"))
    # A single point has no line: show it as a dot.
    dots = [
        tag("span", class_="mark-dot", style=f"left:{100 * float(across(s.x)[0]):.2f}%;"
            f"bottom:{100 * float(up(s.y)[0]):.2f}%;--c:{colour(s.colour)}")
        for s in drawn if np.isfinite(s.y).sum() == 1 and np.isfinite(s.y[0])
    ]  # fmt: skip
    lines = [
        {
            "name": s.name,
            "colour": s.colour % SERIES_COLOURS,
            "at": _rounded(across(s.x[keep])),
            "height": _rounded(up(s.y[keep])),
            "x": [number(float(x), 6) for x in s.x[keep]],
            "y": [shape(float(y)) for y in s.y[keep]],
        }
        for s in drawn
        for keep in [np.isfinite(s.y)]
        if keep.any()
    ]
    summary = "; ".join(f"{s.name} {_story(s, shape)}" for s in drawn)
    plot = tag(
        "div",
        _svg(f"{title}: {summary}", shapes),
        *dots,
        *_y_ticks(bottom, top, shape),
        *_x_ticks(left, right),
        tag("span", x_label, class_="axis"),
        class_="plot",
        tabindex="0",
        role="group",
        aria_label=f"{title}. Arrow keys read the values.",
        data_lines=json.dumps({"x_label": x_label, "lines": lines}, separators=(",", ":"), ensure_ascii=False),
    )
    keys = [(s.name, s.colour, s.dashed) for s in drawn]
    extra = [tag("li", tag("i"), f"{name} {shape(value)}", class_="dashed", style="--c:var(--muted)")
             for name, value in references]  # fmt: skip
    extra += [tag("li", tag("i"), f"{name}: {x_label} {number(x, 6)}", class_="dotted", style="--c:var(--muted)")
              for name, x in marks]  # fmt: skip
    return _figure(title, note, _legend(keys, extra), plot, _line_table(drawn, x_label, shape))


def histogram(title: str, edges: np.ndarray, shares: Mapping[str, np.ndarray], *, x_label: str, note: str) -> Markup:
    """Outlined histograms over common bins: edges [n + 1], shares {name: [n]} of all values of that name."""
    x = np.repeat(edges, 2)
    series = [
        Series(name, x, np.concatenate([[0.0], np.repeat(share, 2), [0.0]]), i, area=True)
        for i, (name, share) in enumerate(shares.items())
    ]
    return line_chart(title, series, x_label=x_label, note=note, shape=lambda y: f"{100 * y:.3g} %", floor=0.0)


def bar_chart(title: str, bars: Sequence[Bar], *, note: str = "", shape: Callable[[float], str] = number) -> Markup:
    """Horizontal bars from 0, each with its value written beside it, and an interval where there is one."""
    longest = max([b.high if b.high is not None else b.value for b in bars] + [1e-12])
    rows = []
    for b in bars:
        width = 100 * max(b.value, 0) / longest
        whisker, between = None, None
        if b.low is not None and b.high is not None:
            low, high = 100 * max(b.low, 0) / longest, 100 * max(b.high, 0) / longest
            whisker = tag("span", class_="whisker", style=f"left:{low:.2f}%;width:{max(high - low, 0):.2f}%")
            between = tag("small", f" {shape(b.low)} to {shape(b.high)}")
        fill = tag("span", class_="fill", style=f"width:{width:.2f}%;--c:{colour(b.colour)}")
        track = tag("span", fill, whisker, class_="track", aria_hidden="true")
        amount = tag("span", tag("b", shape(b.value)), between, class_="amount")
        rows.append(tag("div", tag("span", b.name, role="cell"), track, amount, class_="row", role="listitem"))
    return tag("figure", _caption(title, note), tag("div", *rows, class_="bars", role="list"), class_="chart card")


def stacked_bar(title: str, parts: Sequence[tuple[str, float]], *, note: str, shape: Callable[[float], str]) -> Markup:
    """One bar of parts that add up to a whole, with a legend that states each part."""
    total = sum(value for _, value in parts) or 1.0
    spans = [
        tag("span", style=f"width:{100 * value / total:.2f}%;--c:{colour(i)}", title=f"{name}: {shape(value)}")
        for i, (name, value) in enumerate(parts)
    ]
    words = [
        tag("li", tag("i"), f"{name}: {shape(value)} ({100 * value / total:.0f} %)", style=f"--c:{colour(i)}")
        for i, (name, value) in enumerate(parts)
    ]
    bar = tag("div", *spans, class_="stack", aria_hidden="true")
    return tag("figure", _caption(title, note), bar, tag("ul", *words, class_="legend"), class_="chart card")


def heatmap(title: str, shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, note: str) -> Markup:
    """A table of shares 0 to 1 (rows × columns), the deeper its cell's colour the larger the share."""
    head = tag("tr", tag("td"), *(tag("th", name, scope="col") for name in columns))
    body = [
        tag("tr", tag("th", name, scope="row"), *(
            tag("td", f"{100 * x:.0f}" if x >= 0.005 else "", style=f"--share:{0.85 * x:.3f}") for x in line
        ))
        for name, line in zip(rows, shares, strict=True)
    ]  # fmt: skip
    content = tag(
        "table", tag("caption", title, class_="hidden"), tag("thead", head), tag("tbody", *body), class_="heat"
    )
    box = tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=title)
    return tag("figure", _caption(title, note), box, class_="chart card wide")


def _thinned(s: Series) -> Series:
    x, y, faint = thin(s.x, s.y, s.y if s.faint is None else s.faint)
    return Series(s.name, x, y, s.colour, None if s.faint is None else faint, s.dashed, s.area)


def _limits(values: np.ndarray, floor: float | None) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    low = low if floor is None else min(floor, low)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if floor is not None else low - room), high + room


def _rounded(a: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in np.asarray(a, dtype=float)]


def _path(x: np.ndarray, y: np.ndarray, kind: str, index: int) -> Markup:
    """A polyline in the unit box, broken where a value is not finite."""
    words, pen_up = [], True
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b):
            pen_up = True
            continue
        words.append(f"{'M' if pen_up else 'L'}{a:.4f} {1 - b:.4f}")
        pen_up = False
    return tag("path", d="".join(words), class_=kind, style=f"stroke:{colour(index)}")


def _area(x: np.ndarray, y: np.ndarray, zero: float, index: int) -> Markup:
    points = "L".join(f"{a:.4f} {1 - b:.4f}" for a, b in zip(x, y, strict=True))
    base = 1 - zero
    return tag("path", d=f"M{x[0]:.4f} {base:.4f}L{points}L{x[-1]:.4f} {base:.4f}Z", class_="area",
               style=f"fill:{colour(index)}")  # fmt: skip


def _grid(heights: Sequence[float]) -> list[Markup]:
    lines = [tag("line", x1=0, x2=1, y1=f"{1 - h:.4f}", y2=f"{1 - h:.4f}", class_="grid") for h in heights]
    return [*lines, tag("line", x1=0, x2=1, y1=1, y2=1, class_="base")]


def _svg(description: str, shapes: Sequence[Markup]) -> Markup:
    return tag(
        "svg", tag("title", description), *shapes, viewBox="0 0 1 1", preserveAspectRatio="none", role="img",
    )  # fmt: skip


def _y_ticks(bottom: float, top: float, shape: Callable[[float], str]) -> list[Markup]:
    return [
        tag(
            "span",
            shape(t).replace(".0 %", " %"),
            class_="tick y",
            style=f"bottom:{100 * (t - bottom) / (top - bottom):.2f}%",
        )
        for t in ticks(bottom, top)
    ]


def _x_ticks(left: float, right: float) -> list[Markup]:
    places = ticks(left, right, most=6)
    spans = []
    for i, t in enumerate(places):
        at = (t - left) / (right - left) if right > left else 0.5
        kind = "tick x" + (" odd" if i % 2 else "") + (" last" if at > 0.97 else "")
        spans.append(tag("span", _axis_number(t), class_=kind, style=f"left:{100 * at:.2f}%"))
    return spans


def _axis_number(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):g}{letter}"
    return number(x, 4)


def _story(s: Series, shape: Callable[[float], str]) -> str:
    finite = s.y[np.isfinite(s.y)]
    if not len(finite):
        return "has no finite value"
    return f"from {shape(float(finite[0]))} to {shape(float(finite[-1]))}, highest {shape(float(finite.max()))}"


def _legend(keys: Sequence[tuple[str, int, bool]], extra: Sequence[Markup]) -> Markup | None:
    if len(keys) < 2 and not extra:
        return None
    items = [
        tag("li", tag("i"), name, class_="dashed" if dashed else None, style=f"--c:{colour(index)}")
        for name, index, dashed in keys
    ]
    return tag("ul", *(items if len(keys) > 1 else []), *extra, class_="legend")


def _caption(title: str, note: str) -> Markup:
    return tag("figcaption", title, tag("small", note) if note else None)


def _line_table(series: Sequence[Series], x_label: str, shape: Callable[[float], str]) -> Markup:
    # One row per x of the longest line, at most TABLE_ROWS of them; other lines give their nearest value.
    longest = max(series, key=lambda s: len(s.x))
    picks = np.unique(np.linspace(0, len(longest.x) - 1, min(TABLE_ROWS, len(longest.x))).round().astype(int))
    rows: list[list[object]] = []
    for x in longest.x[picks]:
        nearest = [float(s.y[int(np.abs(s.x - x).argmin())]) for s in series]
        rows.append([(float(x), number(float(x), 6)), *((y, shape(y)) for y in nearest)])
    return html_table([x_label, *(s.name for s in series)], rows)


def _figure(title: str, note: str, legend: Markup | None, plot: Markup, values: Markup) -> Markup:
    return tag(
        "figure",
        _caption(title, note),
        join(legend),
        plot,
        tag("span", class_="live hidden", aria_live="polite"),
        tag("details", tag("summary", "Values"), values),
        class_="chart card",
    )
