"""Attention maps and Grad-CAM of chosen images, several checkpoints side by side (SynBY, figure 1; Syn²Co, figure 2).

Suffixes: B images, S side in pixels, h × w patches, C classes, D width.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jobs.evaluation.attention import attention_maps, overlay
from jobs.evaluation.backbones import ModelConfig, load_frozen
from jobs.evaluation.features import default_crop
from jobs.evaluation.frozen import Frozen
from jobs.evaluation.gradcam import Score, grad_cam, prototype_score, self_score
from jobs.evaluation.images import ImageSet, open_images
from jobs.evaluation.loading import Loader, centre_crop
from jobs.evaluation.splits import subset
from jobs.run.checkpoint import Which, entries
from jobs.run.folder import open_run
from jobs.run.terminal import warn
from jobs.run.world import pick_device
from shards.errors import InputError

Method = Literal["attention", "grad-cam"]
# Images per class whose mean feature stands for the class in Grad-CAM's score.
PROTOTYPE_SHOTS = 20


@dataclass(frozen=True, kw_only=True)
class MapsConfig:
    """Draws where one run's checkpoints look, as a PNG: a row per image, a column per checkpoint."""

    run: Path
    """Run folder."""
    images: str
    """Folder of shards, or ImageFolder, to take the images from."""
    rows: tuple[int, ...] = ()
    """Numbers of the images; none = `count` of them, evenly spread."""
    count: int = 6
    """How many images where none are named."""
    steps: tuple[int, ...] = ()
    """Steps of the checkpoints; none = first, middle and last of those kept. An untrained column is always there."""
    which: Which = "kept"
    """Encoder of the checkpoints."""
    method: Literal["both", "attention", "grad-cam"] = "both"
    """Last layer's attention, mean over heads; or Grad-CAM of the similarity to the image's class."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbone runs; auto = cuda where there is one."""
    out: Path | None = None
    """Folder for the pictures; default: the run's evaluation folder."""


@dataclass(frozen=True)
class MapGrid:
    """crops: uint8 [S, S, 3] per image; overlays[image][column]: uint8 [S, S, 3]; columns and names label them."""

    names: list[str]
    crops: list[np.ndarray]
    columns: list[str]
    overlays: list[list[np.ndarray]]


def checkpoint_steps(run: Path, most: int = 3) -> list[int]:
    """Up to `most` steps of finished checkpoints, evenly spread, first and last among them."""
    steps = [entry.step for entry in entries(open_run(run).checkpoints)]
    picks = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[i] for i in picks]


def spread(images: ImageSet, count: int) -> list[int]:
    """`count` row numbers, evenly spread over the set."""
    total = len(images.labels)
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def checkpoint_models(run: Path, steps: Sequence[int], which: Which) -> list[tuple[str, Frozen]]:
    """The untrained backbone and each step's; steps that cannot be loaded are named in a warning.

    Raises:
        InputError: not one checkpoint can be loaded.
    """
    models = [("untrained", load_frozen(ModelConfig(run=run, untrained=True))[0])]
    for step in steps:
        try:
            models.append((f"step {step:,}", load_frozen(ModelConfig(run=run, step=step, which=which))[0]))
        except InputError as error:
            warn(str(error))
    if len(models) == 1:
        raise InputError(f"run: {run} has no checkpoint that can be loaded; maps need one")
    return models


def check_rows(images: ImageSet, rows: Sequence[int]) -> None:
    """Raises InputError for a row that does not exist."""
    total = len(images.labels)
    if any(not 0 <= row < total for row in rows):
        raise InputError(f"rows: {tuple(rows)} go beyond the {total} images of {images.name}; give 0 to {total - 1}")


def map_grid(
    models: Sequence[tuple[str, Frozen]], images: ImageSet, rows: Sequence[int], method: Method, device: torch.device
) -> MapGrid:
    """Maps of the images `rows` by every model.

    Raises:
        InputError: an image that cannot be read, or an architecture that has no such map.
    """
    crops, columns, overlays = [], [], [[] for _ in rows]
    for name, frozen in models:
        model = frozen.model.to(device).eval()
        crops_B3SS = _crops(frozen, images, rows, device)
        if method == "attention":
            maps_Bhw = attention_maps(model, crops_B3SS)
        else:
            maps_Bhw = grad_cam(model, crops_B3SS, _score(frozen, images, rows, device))
        crops = [_visible(frozen, crop) for crop in crops_B3SS]
        columns.append(name)
        for line, crop, one in zip(overlays, crops, maps_Bhw.cpu().numpy(), strict=True):
            line.append(overlay(crop, one))
    return MapGrid([_name(images, row) for row in rows], crops, columns, overlays)


def _crops(frozen: Frozen, images: ImageSet, rows: Sequence[int], device: torch.device) -> Tensor:
    loader = Loader(images, frozen.size, max(len(rows), 1), frozen.mean, frozen.std)
    try:
        (batch,) = loader.batches(np.asarray(rows), centre_crop(default_crop(frozen.size)), device)
    finally:
        loader.close()
    if batch.broken:
        row, reason = next(iter(batch.broken.items()))
        raise InputError(f"rows: image {row} of {images.name} cannot be read ({reason}); choose others with --rows")
    return batch.crops_B3SS


def _visible(frozen: Frozen, crop_3SS: Tensor) -> np.ndarray:
    mean, std = (torch.tensor(x)[:, None, None] for x in (frozen.mean, frozen.std))
    return ((crop_3SS.cpu() * std + mean) * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _name(images: ImageSet, row: int) -> str:
    label = int(images.labels[row])
    return f"{images.classes[label]} · {row}" if label >= 0 else f"image {row}"


@torch.no_grad()
def _score(frozen: Frozen, images: ImageSet, rows: Sequence[int], device: torch.device) -> Score:
    """Similarity to the mean feature of the image's class; for unlabelled images, the feature with itself."""
    labels_B = torch.from_numpy(images.labels[list(rows)]).to(device)
    if (labels_B < 0).any():
        return self_score
    few = np.bincount(images.labels[images.labels >= 0]).min()
    shots = int(max(1, min(PROTOTYPE_SHOTS, few)))
    picked = subset(images.labels, shots=shots)
    loader = Loader(images, frozen.size, 64, frozen.mean, frozen.std)
    total_CD, count_C = None, torch.zeros(len(images.classes), device=device)
    try:
        for batch in loader.batches(picked, centre_crop(default_crop(frozen.size)), device):
            features = frozen.features(batch.crops_B3SS)
            labels = torch.from_numpy(images.labels[batch.rows]).to(device)
            if total_CD is None:
                total_CD = torch.zeros(len(images.classes), features.shape[1], device=device)
            total_CD.index_add_(0, labels, features)
            count_C += torch.bincount(labels, minlength=len(images.classes))
    finally:
        loader.close()
    assert total_CD is not None
    return prototype_score(total_CD / count_C.clamp_min(1)[:, None], labels_B)


def draw_maps(config: MapsConfig) -> list[Path]:
    """Writes one PNG per method and returns their paths.

    Raises:
        InputError: no checkpoint, no such image, no such map for the architecture.
    """
    folder = open_run(config.run)
    models = checkpoint_models(config.run, config.steps or checkpoint_steps(config.run), config.which)
    device = pick_device(config.device)
    written = []
    with closing(open_images(config.images)) as images:
        rows = list(config.rows) or spread(images, config.count)
        check_rows(images, rows)
        methods: tuple[Method, ...] = ("attention", "grad-cam") if config.method == "both" else (config.method,)
        for method in methods:
            try:
                grid = map_grid(models, images, rows, method, device)
            except InputError as error:
                if config.method != "both":
                    raise
                warn(str(error))
                continue
            place = (config.out or folder.evaluation) / f"{method}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            _figure(grid, place)
            written.append(place)
    return written


def _figure(grid: MapGrid, place: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(grid.crops), len(grid.columns) + 1
    figure = Figure(figsize=(1.7 * columns, 1.75 * rows + 0.3), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for r in range(rows):
        pictures = [grid.crops[r], *grid.overlays[r]]
        for axis, picture in zip(axes[r], pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[r][0].set_ylabel(grid.names[r], fontsize=8)
    for axis, title in zip(axes[0], ["image", *grid.columns], strict=True):
        axis.set_title(title, fontsize=9)
    figure.savefig(place, dpi=160)
