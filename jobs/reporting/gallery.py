"""The hard-view gallery: what was drawn from an image, what each pair cost, and which pair was trained on.

V views, P pairs of views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.reporting.charts import colour
from jobs.reporting.html import Markup, number, tag
from jobs.reporting.images import picture

PAIRS_SHOWN = 6


@dataclass(frozen=True)
class HardViews:
    """One image of one step.

    original: uint8 [H, W, 3]; boxes_V4: top, left, height, width in pixels of the original; views: uint8 [h, w, 3]
    each; pairs_P2: view numbers; losses_P: float; chosen: row of pairs_P2; overlaps_P: IoU of the pair's boxes;
    trained_V: bool, the views that trained, where these are more than the chosen pair (multi-crop).
    """

    title: str
    note: str
    original: np.ndarray
    boxes_V4: np.ndarray
    views: Sequence[np.ndarray]
    pairs_P2: np.ndarray
    losses_P: np.ndarray
    chosen: int
    overlaps_P: np.ndarray | None = None
    captions: Sequence[str] = ()
    trained_V: np.ndarray | None = None


def gallery(rows: Sequence[HardViews]) -> Markup:
    """A card per image."""
    return tag("div", *(view_card(row) for row in rows), class_="stackup")


def view_card(row: HardViews) -> Markup:
    """Original with boxes, all views with the chosen pair outlined, pairs by falling loss."""
    trained = row.pairs_P2[row.chosen] if row.trained_V is None else np.flatnonzero(row.trained_V)
    chosen = {int(v) for v in trained}
    return tag(
        "article",
        tag("header", tag("h3", row.title), tag("span", row.note)),
        original(row, chosen),
        tag("ol", *(_view(row, v, v in chosen) for v in range(len(row.views))), class_="views"),
        pair_bars(row),
        class_="card view-card",
    )


def original(row: HardViews, chosen: set[int]) -> Markup:
    """The image as it is stored, under the boxes of its views; chosen boxes are solid and on top."""
    height, width = row.original.shape[:2]
    rects = []
    for v in sorted(range(len(row.boxes_V4)), key=lambda v: v in chosen):
        top, left, box_height, box_width = (int(x) for x in row.boxes_V4[v])
        place = {"x": left, "y": top, "width": box_width, "height": box_height}
        if v in chosen:
            rects.append(tag("rect", **place, class_="halo"))
        rects.append(tag("rect", **place, class_="chosen" if v in chosen else None, style=f"--c:{colour(v)}"))
    names = " and ".join(str(v + 1) for v in sorted(chosen))
    words = f"{len(row.boxes_V4)} crop boxes; solid: views {names}"
    overlay = tag("svg", tag("title", words), *rects, viewBox=f"0 0 {width} {height}", role="img")
    return tag("div", picture(row.original, f"Original image: {row.title}", 320), overlay, class_="original")


def _view(row: HardViews, v: int, chosen: bool) -> Markup:
    badge = tag("span", " chosen", class_="badge") if chosen else None
    caption = row.captions[v] if v < len(row.captions) else None
    words = tag(
        "p", tag("i", style=f"--c:{colour(v)}"), f"View {v + 1}", badge, tag("br") if caption else None, caption
    )
    alt = f"View {v + 1} of {row.title}" + (", in the chosen pair" if chosen else "")
    return tag("li", picture(row.views[v], alt, 176), words, class_="chosen" if chosen else None)


def pair_bars(row: HardViews) -> Markup:
    """Loss per pair as bars, hardest first. Bars start at the lowest loss less a tenth of the range, not at 0, as
    pairs of one image differ by little; the numbers are written beside them."""
    finite = row.losses_P[np.isfinite(row.losses_P)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    low -= (high - low) * 0.1
    order = sorted(range(len(row.pairs_P2)), key=lambda p: -row.losses_P[p])
    shown = order[:PAIRS_SHOWN] + [p for p in order[PAIRS_SHOWN:] if p == row.chosen]
    heading = "loss" if row.overlaps_P is None else "loss · IoU"
    lines = [tag("div", tag("span", "Pair"), tag("span"), tag("span", heading, class_="amount"), class_="row")]
    for p in shown:
        width = 100 * (row.losses_P[p] - low) / (high - low) if high > low else 100.0
        fill = tag("span", class_="fill", style=f"width:{width:.1f}%")
        first, second = (int(v) + 1 for v in row.pairs_P2[p])
        name = tag("span", f"{first} · {second}", tag("span", " chosen", class_="hidden") if p == row.chosen else None)
        overlap = "" if row.overlaps_P is None else f" · {row.overlaps_P[p]:.2f}"
        amount = tag("span", tag("b", number(float(row.losses_P[p]), 4)), overlap, class_="amount")
        kind = "row chosen" if p == row.chosen else "row"
        lines.append(tag("div", name, tag("span", fill, class_="track", aria_hidden="true"), amount, class_=kind))
    rest = len(order) - len(shown)
    if rest:
        lines.append(tag("div", tag("span"), tag("span", f"{rest} more pairs"), tag("span"), class_="row"))
    return tag("div", *lines, class_="bars")
