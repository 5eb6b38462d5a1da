"""`hardviews index`: makes a data set of WebDataset tars that others wrote, in place."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from jobs.run.summary import summary_table
from jobs.run.terminal import console, parse, progress
from shards.engines import run_tasks
from shards.errors import InputError
from shards.files import local_path
from shards.images import Rules
from shards.index import index
from shards.manifest import Manifest
from shards.writer import ShardResult, shards_in


@dataclass(frozen=True)
class IndexConfig:
    """Writes manifest, column files and DALI indexes beside the tars of a folder; the tars stay as they are."""

    folder: tyro.conf.Positional[str]
    """Folder of WebDataset tars."""
    source: str = "real"
    """Tag of these images in manifests, logs and reports."""
    classes: Path | None = None
    """Text file with the name of a class in each line, in the order of the labels in the .cls files."""
    image: str | None = None
    """Which file of a sample (its extension, jpg or seg.png) is the image, where several could be."""
    check: Literal["full", "header"] = "full"
    """full: decode every image; header: read only its header and end (several times faster, finds fewer faults)."""
    max_pixels: int = 100_000_000
    """Largest number of pixels (height × width); larger images, such as decompression bombs, are left out."""
    workers: int | None = None
    """Processes; by default one per core."""
    overwrite: bool = False
    """Index again, although there is an index."""


def run(config: IndexConfig) -> Manifest:
    """Indexes with a progress bar and prints the result."""
    folder = local_path(config.folder)
    if folder is None:
        raise InputError(f"{config.folder}: tars are indexed in place, in a local folder; copy them to one")
    classes = read_classes(config.classes) if config.classes else ()
    left_out = 0
    with progress("indexing", len(shards_in(folder)), "shards") as bar:

        def on_shard(result: ShardResult) -> None:
            nonlocal left_out
            left_out += len(result.rejected)
            bar.advance(1, f"{left_out} images left out" if left_out else None)

        manifest = index(
            folder,
            config.source,
            partial(run_tasks, "local", workers=config.workers),
            rules=Rules(check=config.check, max_pixels=config.max_pixels),
            classes=classes,
            image=config.image,
            overwrite=config.overwrite,
            on_shard=on_shard,
        )
    console.print(summary_table(manifest), soft_wrap=False)
    return manifest


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads class names, one per line."""
    try:
        return tuple(path.read_text(encoding="utf-8-sig").splitlines())
    except OSError as error:
        raise InputError(f"--classes {path}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {path}: is no UTF-8 (byte {error.start}); save it as UTF-8") from error


def main(argv: list[str]) -> None:
    """Entry point of `hardviews index`."""
    run(parse(IndexConfig, argv, prog="hardviews index"))
