"""A logged step's views, made again from the log and the shards.

Shape suffixes: B images, N views, S side of a view in pixels, 3 channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.log.reader import Log, Rows, open_log
from jobs.run.config import PretrainConfig, load_config
from jobs.run.data import check_shards, open_data, run_policy, view_dtype
from jobs.run.folder import RunFolder
from jobs.run.world import pick_device
from pipelines.batch import Recipe
from pipelines.colour import MEAN, STD
from pipelines.decode import open_decoder
from pipelines.replay import replay, same_draws
from shards.errors import InputError
from shards.manifest import Manifest
from shards.reader import SampleReader


@dataclass(frozen=True)
class Replayed:
    """Some images of one step: what the log says of them, and their pixels."""

    rows: Rows
    scored: int
    """The leading views whose pairs competed."""
    names: tuple[str, ...]
    """Shard and key of each image."""
    classes: tuple[str, ...]
    """Class name of each image, empty where unknown."""
    originals: tuple[NDArray[np.uint8], ...]
    """uint8 [height, width, 3] of each image."""
    crops: tuple[Tensor, ...]
    """[B, n, 3, S, S] per group of views, bit for bit what training saw on this device, in its dtype."""
    redrawn_B: NDArray[np.bool_]
    """Whether this program, with the run's configuration, draws the logged parameters again."""

    def views(self, image: int) -> list[NDArray[np.uint8]]:
        """uint8 [S, S, 3] of all views of an image, groups one after the other."""
        return [view for crops in self.crops for view in visible(crops[image])]


def replay_step(
    folder: RunFolder,
    step: int,
    images: Sequence[int] | None = None,
    *,
    limit: int | None = None,
    real: tuple[str, ...] = (),
    synthetic: tuple[str, ...] = (),
    device: str = "auto",
) -> Replayed:
    """The views of a step.

    Args:
        images: which rows of the step's batch (all ranks side by side); None for all.
        limit: at most so many rows.
        real, synthetic: where the shards lie now; none for where the run found them.
        device: auto (the run's), cpu or cuda.

    Raises:
        InputError: no such step or image, or the shards are not those of the log.
    """
    config = load_config(folder.config)
    moved = {name: value for name, value in (("real", real), ("synthetic", synthetic)) if value}
    config = replace(config, data=replace(config.data, **moved))
    log = open_log(folder.log)
    rows = step_rows(log, step, images)[:limit]
    try:
        data = open_data(config)
    except InputError as error:
        raise InputError(f"{error}; if the shards have moved, name where with --real or --synthetic") from error
    try:
        check_shards(log.facts["shards"], data.manifests, "--real or --synthetic")
        place = pick_device(config.device if device == "auto" else device)
        dtype = view_dtype(log.facts.get("precision", "fp32"), place)
        return replay_rows(config, rows, log.scored, data.manifests, data.reader, place, dtype)
    finally:
        data.reader.close()


def step_rows(log: Log, step: int, images: Sequence[int] | None) -> Rows:
    """The log's rows of a step, or those of some of its images.

    Raises:
        InputError: there are none.
    """
    if not log.rows:
        raise InputError(f"log: {log.path} has no rows yet")
    parts = list(log.chunks(steps=(step, step + 1)))
    if not parts:
        first, last = log.step_range
        raise InputError(f"step: {step} is not in the log, which holds steps {first} to {last}")
    rows = Rows.concatenate(parts)
    if images is None:
        return rows
    if outside := [image for image in images if not 0 <= image < len(rows)]:
        raise InputError(f"image: {outside[0]} is not in step {step}, which has images 0 to {len(rows) - 1}")
    return rows[np.array(images)]


def replay_rows(
    config: PretrainConfig,
    rows: Rows,
    scored: int,
    manifests: Sequence[Manifest],
    reader: SampleReader,
    device: torch.device,
    dtype: torch.dtype,
) -> Replayed:
    """The pixels of logged rows.

    Raises:
        InputError: a sample cannot be read any more.
    """
    recipe = Recipe(run_policy(config), config.seed)
    batch = replay(
        reader,
        recipe,
        rows.sample_B,
        rows.sizes_B2,
        rows.params,
        device=device,
        dtype=dtype,
        colour=config.views.colour,
        compiled=config.compile != "off",
    )
    drawn_B = same_draws(recipe, rows.sample_B, rows.epoch_B, rows.sizes_B2, rows.position_B, rows.params)
    return Replayed(
        rows=rows,
        scored=scored,
        names=tuple(" ".join(reader.name(int(sample))) for sample in rows.sample_B),
        classes=tuple(
            manifests[source].classes[label] if label >= 0 else ""
            for source, label in zip(rows.source_B.tolist(), rows.label_B.tolist(), strict=True)
        ),
        originals=originals(reader, rows.sample_B),
        crops=batch.crops,
        redrawn_B=drawn_B,
    )


def originals(reader: SampleReader, sample_B: NDArray[np.int64]) -> tuple[NDArray[np.uint8], ...]:
    """uint8 [height, width, 3] of samples that are known to be readable."""
    decoder = open_decoder(len(sample_B))
    data = [item for item in reader.read(sample_B) if isinstance(item, np.ndarray)]
    return tuple(image.numpy().copy() for image in decoder.decode(data) if isinstance(image, Tensor))


def visible(views_n3SS: Tensor) -> NDArray[np.uint8]:
    """uint8 [n, S, S, 3] from normalised views."""
    mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = ((views_n3SS.float().cpu() * std_311 + mean_311) * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
