"""`hardviews build`: images of a folder, of tars or of Parquet → WebDataset shards with a manifest."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from jobs.run.summary import summary_table
from jobs.run.terminal import console, parse, progress
from shards.build import build, plan
from shards.engines import run_tasks
from shards.images import Rules
from shards.manifest import Manifest
from shards.writer import ShardResult


@dataclass(frozen=True)
class BuildConfig:
    """Writes the shards that --out does not hold yet; a build that was killed goes on when it is run again."""

    images: tyro.conf.Positional[str]
    """Where the images are: imagefolder:PATH (a folder per class), folder:PATH (no classes), tars:PATH (WebDataset),
    parquet:PATH (as Hugging Face writes it). PATH may be an address such as s3://bucket/images; for tars and Parquet
    also a pattern with *."""
    out: Path
    """Folder for the shards."""
    source: str = "real"
    """Tag of these images in manifests, logs and reports."""
    shard_samples: int = 1000
    """Images per shard."""
    keep_order: bool = False
    """Take the files of a folder in the order of their names. Otherwise they are spread, so that each shard holds all
    classes. Tars and Parquet are always read in their own order."""
    image: str | None = None
    """Which file of a tar's samples (its extension, jpg or seg.png) or which column of Parquet is the image, where
    several could be."""
    label: str | None = None
    """Which column of Parquet, or of --labels, is the label, where several could be."""
    label_from: str | None = None
    """Where the labels of a tar's samples stand: cls (their .cls file, the default), json:FIELD (a field of their .json
    file), or folder (the folder they lie in, or the tar where it has none). Labels are class numbers; where any is
    text, they are names, and the classes are these in sorted order."""
    labels: str | None = None
    """File of labels for folder: and tars: (CSV, TSV or Parquet): a column with the images' names or keys, and one
    with their labels, class numbers or names."""
    split: str | None = None
    """Which split to take, such as train, where names of files or folders tell of several (train/cat/1.jpg,
    train-00000-of-00012.parquet)."""
    exclude: Path | None = None
    """duplicates.csv of `hardviews duplicates` from shards of these images, built with the same settings: all of a
    group but the first are left out."""
    check: Literal["full", "header"] = "full"
    """full: decode every image; header: read only its header and end (several times faster, finds fewer faults)."""
    resize_short: int | None = None
    """Reduce images whose shorter side is longer than this, in pixels. Without it the original bytes are kept."""
    quality: int | None = None
    """Re-encode every image as JPEG or WebP with this quality, 1 to 100."""
    format: Literal["jpg", "png", "webp"] | None = None
    """Re-encode images of other formats in this one."""
    max_pixels: int = 100_000_000
    """Largest number of pixels (height × width); larger images, such as decompression bombs, are left out."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or tasks of a Ray cluster that sees the same folders."""
    workers: int | None = None
    """Tasks at a time; by default one per core."""
    address: str | None = None
    """Address of the Ray cluster; by default Ray is started on this machine."""
    overwrite: bool = False
    """Replace shards in --out that were made from other images or settings, and remove surplus ones."""


def run(config: BuildConfig) -> Manifest:
    """Builds with a progress bar and prints the result."""
    rules = Rules(config.check, config.resize_short, config.quality, config.format, config.max_pixels)
    tasks = partial(run_tasks, config.engine, workers=config.workers, address=config.address)
    planned = plan(
        config.images,
        config.out,
        tasks,
        rules=rules,
        shard_samples=config.shard_samples,
        keep_order=config.keep_order,
        image=config.image,
        label=config.label,
        label_from=config.label_from,
        labels=config.labels,
        split=config.split,
        exclude=config.exclude,
    )
    left_out = 0
    with progress("building", planned.images, "images") as bar:

        def on_shard(result: ShardResult) -> None:
            nonlocal left_out
            left_out += len(result.rejected)
            bar.advance(result.entry.count + len(result.rejected), f"{left_out} left out" if left_out else None)

        manifest = build(planned, config.source, tasks, overwrite=config.overwrite, on_shard=on_shard)
    console.print(summary_table(manifest), soft_wrap=False)
    return manifest


def main(argv: list[str]) -> None:
    """Entry point of `hardviews build`."""
    run(parse(BuildConfig, argv, prog="hardviews build"))
