"""`hardviews replay`: draws the views of a logged step again, as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jobs.log.replaying import Replayed, replay_step
from jobs.run.folder import open_run
from jobs.run.terminal import parse, warn
from pipelines.params import ViewParams, pair_iou
from shards.errors import InputError

# A colour for each view's box and frame that colour-blind readers can tell apart (Okabe and Ito 2008), then again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", "#444444")
INCH = 1.5  # side of a view in the picture
LEGEND = "Solid: the views that trained. b c s: brightness, contrast, saturation (factors); hue: turns; blur: pixels."


@dataclass(frozen=True)
class ReplayConfig:
    """Draws the views of a logged step again from the log and the shards, bit for bit those that were trained on."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    step: int
    """Step, counted from 0."""
    image: int | None = None
    """Image of the step's batch, counted from 0 over all processes; None = the first ones."""
    images: int = 6
    """Number of images to draw where --image is not given."""
    out: Path | None = None
    """PNG to write; None = analysis/replay-STEP.png in the run folder."""
    real: tuple[str, ...] = ()
    """Present addresses of the real shards; none = those of the run."""
    synthetic: tuple[str, ...] = ()
    """Present addresses of the synthetic shards; none = those of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that makes the views; auto = as in training. Equal devices give equal bits."""


def replay(config: ReplayConfig) -> Path:
    """Writes the picture and returns its path.

    Raises:
        InputError: no such run, step or image, changed shards, or a place that cannot be written.
    """
    if config.images < 1:
        raise InputError(f"images: {config.images} must be at least 1")
    folder = open_run(config.run)
    images = None if config.image is None else [config.image]
    replayed = replay_step(
        folder,
        config.step,
        images,
        limit=config.images,
        real=config.real,
        synthetic=config.synthetic,
        device=config.device,
    )
    if not replayed.redrawn_B.all():
        warn(
            f"{(~replayed.redrawn_B).sum()} images: this version draws other views for the run's seed; shown as logged"
        )
    out = config.out or folder.analysis / f"replay-{config.step:08d}.png"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure(replayed).savefig(out, format="png", dpi=130)
    except OSError as error:
        raise InputError(f"out: {out} cannot be written ({error.strerror}); choose another --out") from error
    return out


def figure(replayed: Replayed) -> Figure:
    """A row per image: the original with the crop boxes, then the views, the ones that trained outlined."""
    rows, params = replayed.rows, replayed.rows.params
    count, views = params.shape
    fig = Figure(figsize=((views + 2.2) * INCH, count * (INCH + 0.55) + 0.2), layout="constrained")
    grid = fig.add_gridspec(count, views + 1, width_ratios=[2, *[1] * views])
    for image in range(count):
        chosen = np.flatnonzero(rows.chosen_BN[image])
        boxes = fig.add_subplot(grid[image, 0])
        draw_original(boxes, replayed.originals[image], params[image], chosen)
        boxes.set_title(caption(replayed, image), fontsize=6, loc="left")
        for view, pixels in enumerate(replayed.views(image)):
            axes = fig.add_subplot(grid[image, view + 1])
            draw_view(axes, pixels, view, chosen=view in chosen)
            axes.set_xlabel(facts(params[image], view), fontsize=5)
    fig.supxlabel(LEGEND, fontsize=5, x=0.01, ha="left")
    return fig


def draw_original(axes: Axes, pixels: np.ndarray, params: ViewParams, chosen: np.ndarray) -> None:
    """The image as it is stored, with all crop boxes; those that trained are drawn last, thick and whole."""
    axes.imshow(pixels)
    for view in sorted(range(len(params)), key=lambda view: view in chosen):
        box = (float(params.left[view]) - 0.5, float(params.top[view]) - 0.5)
        width, height = float(params.width[view]), float(params.height[view])
        strong = view in chosen
        if strong:
            axes.add_patch(Rectangle(box, width, height, fill=False, edgecolor="white", linewidth=3.6))
        line, weight = ("solid", 2.2) if strong else ("dashed", 1.0)
        edge = Rectangle(box, width, height, fill=False, edgecolor=colour(view), linewidth=weight, linestyle=line)
        axes.add_patch(edge)
    axes.set_axis_off()


def draw_view(axes: Axes, pixels: np.ndarray, view: int, *, chosen: bool) -> None:
    """One view in the frame of its colour; the frame of one that trained is thick."""
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=colour(view) if chosen else "#BBBBBB", linewidth=3 if chosen else 0.5)
    axes.set_title(f"{view}{' · chosen' if chosen else ''}", fontsize=6, color=colour(view))


def colour(view: int) -> str:
    """The colour of a view."""
    return COLOURS[view % len(COLOURS)]


def caption(replayed: Replayed, image: int) -> str:
    """Which sample it is, and what the chosen pair cost."""
    rows = replayed.rows
    lines = [replayed.names[image].rsplit("/", 1)[-1], f"step {rows.step_B[image]}, position {rows.position_B[image]}"]
    if replayed.classes[image]:
        lines[0] += f" ({replayed.classes[image]})"
    choice = int(rows.choice_B[image])
    if choice >= 0:
        overlap = pair_iou(rows.params[image : image + 1, : replayed.scored])[0, choice]
        loss = rows.loss_BP[image, choice]
        how = f", loss {loss:.3f}" if np.isfinite(loss) else ", not scored"
        lines.append(f"IoU {overlap:.2f}{how}" + (", at random" if rows.at_random_B[image] else ""))
    return "\n".join(lines)


def facts(params: ViewParams, view: int) -> str:
    """What was done to a view, in a few words."""
    words = [name for name in ("flip", "gray", "solarize") if getattr(params, name)[view]]
    if params.blur[view] > 0:
        words.append(f"blur {params.blur[view]:.1f}")
    if params.jitter[view]:
        strengths = (params.brightness[view], params.contrast[view], params.saturation[view])
        words.append("b c s " + " ".join(f"{value:.1f}" for value in strengths) + f"\nhue {params.hue[view]:+.2f}")
    return ", ".join(words) or "plain"


def main(argv: list[str]) -> None:
    """Runs the command."""
    print(replay(parse(ReplayConfig, argv, prog="hardviews replay")))
