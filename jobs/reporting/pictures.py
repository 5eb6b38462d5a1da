"""The report's parts that need images or a model: hard views, samples, attention. Each is HTML, or why it is not there.

Suffixes: B images, N views, V views of one image.
"""

from contextlib import closing
from pathlib import Path

import numpy as np
from torch import Tensor

from jobs.evaluation.images import ImageSet, open_images
from jobs.evaluation.maps import MapGrid, Method, checkpoint_models, checkpoint_steps, map_grid, spread
from jobs.log.reader import Rows, open_log
from jobs.log.replaying import Replayed, replay_step, step_rows
from jobs.reporting.gallery import HardViews, gallery
from jobs.reporting.html import Markup, attempt, join, number, tag
from jobs.reporting.images import picture
from jobs.reporting.rundata import RunData
from jobs.run.folder import open_run
from jobs.run.world import pick_device
from pipelines.decode import open_decoder
from pipelines.params import ViewParams, pair_iou, pairs
from shards.errors import InputError

SAMPLES = 24
MAPPED = 4

NO_SHARDS = "The configuration names no shards."


def pictures(run: RunData, images: int) -> dict[str, Markup | str]:
    """The three parts, with `images` images in the gallery of hard views; none of them for 0."""
    if images == 0:
        return dict.fromkeys(("views", "samples", "attention"), "Pictures were not asked for.")
    return {
        "views": attempt(lambda: hard_views(run.path, images)),
        "samples": attempt(lambda: samples(run, min(SAMPLES, 2 * images))),
        "attention": attempt(lambda: attention(run, min(MAPPED, images))),
    }


# Hard views


def hard_views(run: Path, images: int) -> Markup | str:
    """Cards of the last logged step, and some of the first, whose pairs nobody had learnt from."""
    folder = open_run(run)
    log = open_log(folder.log)
    if not log.rows:
        return "The augmentation log has no rows yet."
    first, last = log.step_range
    early = images // 4 if last > first else 0
    parts = []
    for step, count in ((last, images - early), (first, early)):
        picked = _mixed(step_rows(log, step, None), count)
        if picked:
            cards = step_cards(replay_step(folder, step, picked), log.sources)
            parts += [tag("h3", f"Step {number(step)}"), gallery(cards)]
    if not parts:
        return "No pair was chosen by its loss in the first or the last step of the log."
    return tag("div", *parts, class_="stackup")


def _mixed(rows: Rows, count: int) -> list[int]:
    """`count` images of a step that trained on a pair chosen by its loss, the sources taking turns."""
    by_loss = (rows.choice_B >= 0) & ~rows.at_random_B & np.isfinite(rows.loss_BP).all(axis=1)
    scored = np.flatnonzero(by_loss)
    queues = [scored[rows.source_B[scored] == source].tolist() for source in np.unique(rows.source_B[scored])]
    turns = [row for turn in range(len(scored)) for queue in queues for row in queue[turn : turn + 1]]
    return sorted(turns[:count])


def step_cards(replayed: Replayed, sources: list[str]) -> list[HardViews]:
    """A card per replayed image."""
    rows, params = replayed.rows, replayed.rows.params
    table = pairs(replayed.scored)
    overlaps_BP = pair_iou(params[:, : replayed.scored])
    cards = []
    for image in range(len(rows)):
        height, width = replayed.originals[image].shape[:2]
        name = replayed.classes[image] or "unlabelled"
        cards.append(
            HardViews(
                title=f"{name} · sample {int(rows.sample_B[image])}",
                note=f"{sources[int(rows.source_B[image])]}, {width}×{height}, {replayed.names[image].split()[-1]}",
                original=replayed.originals[image],
                boxes_V4=np.stack([getattr(params, k)[image] for k in ("top", "left", "height", "width")], axis=1),
                views=replayed.views(image),
                pairs_P2=table,
                losses_P=rows.loss_BP[image],
                chosen=int(rows.choice_B[image]),
                overlaps_P=overlaps_BP[image],
                captions=[caption(params[image], v, height * width) for v in range(params.shape[1])],
                trained_V=rows.chosen_BN[image],
            )
        )
    return cards


def caption(params_V: ViewParams, v: int, area: int) -> str:
    """What was done to one view, in few words: share of the image, colour factors, other operations."""
    words = [f"{100 * int(params_V.height[v]) * int(params_V.width[v]) / area:.0f} % area"]
    if params_V.jitter[v]:
        factors = {name[0]: f"{getattr(params_V, name)[v]:.2f}" for name in ("brightness", "contrast", "saturation")}
        words += [f"{letter} {factor}" for letter, factor in factors.items() if factor != "1.00"]
        hue = f"{params_V.hue[v]:+.2f}".replace("-", "−")
        words += [f"h {hue}"] if hue[1:] != "0.00" else []
    words += [word for word in ("flip", "gray", "solarize") if getattr(params_V, word)[v]]
    if params_V.blur[v] > 0:
        words.append(f"blur {params_V.blur[v]:.1f}")
    # Words break between operations, not inside of one.
    return " · ".join(words).replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}·\N{NO-BREAK SPACE}", " · ")


# Samples


def samples(run: RunData, count: int) -> Markup | str:
    """Images of each source side by side, evenly spread, so classes stand opposite each other."""
    cards = []
    for source in ("real", "synthetic"):
        places = run.addresses(source)
        for place in places:
            folder = f": {place.rstrip('/').rpartition('/')[2]}" if len(places) > 1 else ""
            with closing(open_images(place)) as images:
                cards.append(_mosaic(source.capitalize() + folder, images, count))
    return tag("div", *cards, class_="cards") if cards else NO_SHARDS


def _mosaic(title: str, images: ImageSet, count: int) -> Markup:
    picked = by_class(images, count)
    items = []
    for row, image in zip(picked, _decode(images, picked), strict=True):
        label = int(images.labels[row])
        name = images.classes[label] if label >= 0 else "no label"
        items.append(tag("li", picture(image, f"{title} image {row}: {name}", 112), tag("p", name)))
    note = f"{number(len(images.labels))} images, {len(images.classes)} classes"
    head = tag("figcaption", title, tag("small", note))
    return tag("figure", head, tag("ol", *items, class_="mosaic"), class_="chart card")


def by_class(images: ImageSet, count: int) -> list[int]:
    """`count` rows, sorted by class; without labels, evenly spread."""
    labelled = np.flatnonzero(images.labels >= 0)
    if not len(labelled):
        return spread(images, count)
    order = labelled[np.argsort(images.labels[labelled], kind="stable")]
    return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))].tolist()


def _decode(images: ImageSet, rows: list[int]) -> list[np.ndarray]:
    data = images.read(rows)
    broken = [item for item in data if isinstance(item, str)]
    decoded = open_decoder(len(rows)).decode([item for item in data if not isinstance(item, str)])
    shown = [image.numpy().copy() for image in decoded if isinstance(image, Tensor)]
    if broken or len(shown) < len(rows):
        reason = broken[0] if broken else next(image for image in decoded if isinstance(image, str))
        raise InputError(f"images: some of {images.name} cannot be read ({reason}); `hardviews verify` names them")
    return shown


# Attention


def attention(run: RunData, count: int) -> Markup | str:
    """Attention maps and Grad-CAM of the untrained backbone and up to three checkpoints."""
    places = [*run.addresses("real"), *run.addresses("synthetic")]
    if not places:
        return NO_SHARDS
    models = checkpoint_models(run.path, checkpoint_steps(run.path), "target")
    figures: list[Markup] = []
    reasons: list[str] = []
    with closing(open_images(places[0])) as images:
        rows = by_class(images, count)
        methods: tuple[tuple[Method, str, str], ...] = (
            ("attention", "Attention", "last layer, mean over heads, from the class token or all patches"),
            ("grad-cam", "Grad-CAM", "of the similarity to the mean feature of the image's class"),
        )
        for method, title, note in methods:
            try:
                grid = map_grid(models, images, rows, method, pick_device("cpu"))
                figures.append(map_figure(grid, title, note))
            except InputError as error:
                reasons.append(str(error))
    if not figures:
        return " ".join(reasons)
    return join(tag("div", *figures, class_="cards"), *(tag("p", reason) for reason in reasons))


def map_figure(grid: MapGrid, title: str, note: str) -> Markup:
    """A table of pictures: a row per image, a column per checkpoint."""
    heads = [tag("th", name, scope="col") for name in ("image", *grid.columns)]
    body = []
    for name, crop, overlays in zip(grid.names, grid.crops, grid.overlays, strict=True):
        cells = [tag("td", picture(crop, name, 160))]
        cells += [
            tag("td", picture(one, f"{title} of {name}, {column}", 160))
            for column, one in zip(grid.columns, overlays, strict=True)
        ]
        body.append(tag("tr", *cells))
    content = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body), class_="maps")
    box = tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=title)
    return tag("figure", tag("figcaption", title, tag("small", note)), box, class_="chart card")
