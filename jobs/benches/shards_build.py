"""Building shards of an ImageFolder of photographs, beside a `webdataset.ShardWriter` loop with the same check."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from webdataset.writer import ShardWriter

from jobs.benches.photographs import jpeg
from shards.build import build, plan
from shards.engines import run_tasks
from shards.images import Rules, prepare
from shards.sources.base import Options
from shards.sources.kinds import open_source

DISTINCT = 64  # photographs made; the folder's files repeat them, as making one takes as long as checking fifty
CLASSES = 10
SHARD_SAMPLES = 500
MEMORY = Path("/dev/shm")

Check = Literal["full", "header"]


def build_figures(
    images: int = 4000, repeats: int = 3, workers: int = 2, folder: Path | None = None
) -> dict[str, float | str]:
    """Images a second, medians over alternating repeats, each run from a warm page cache into an empty folder.

    Args:
        images: files of about 110 KB.
        repeats: runs of each way.
        workers: our processes; the plain loop has one, and ours is measured with one too.
        folder: where to write; by default memory (/dev/shm) where there is room, else the temporary folder. A disk
            that writes 300 MB/s holds every way back to 2,700 images/s.
    """
    bytes_needed = 3 * 130_000 * images
    if folder is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > bytes_needed:
        folder = MEMORY
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        size = write_photographs(root / "images", images)
        ways: dict[str, Callable[[Path], None]] = {}
        for check in ("full", "header"):
            ways[f"hardviews_{check}"] = partial(run_ours, root / "images", check, workers)
            ways[f"hardviews_{check}_1_worker"] = partial(run_ours, root / "images", check, 1)
            ways[f"shardwriter_{check}"] = partial(run_plain, root / "images", check)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                seconds[name].append(timed(way, root / "out"))
        speeds = {f"{name}_images_per_s": images / statistics.median(times) for name, times in seconds.items()}
        ratios = {
            f"{check}_over_shardwriter{suffix}": speeds[f"hardviews_{check}{suffix}_images_per_s"]
            / speeds[f"shardwriter_{check}_images_per_s"]
            for check in ("full", "header")
            for suffix in ("", "_1_worker")
        }
        return {
            "images": images,
            "kilobytes_per_image": size / images / 1e3,
            "workers": workers,
            "cores": len(os.sched_getaffinity(0)),
            "written_to": str(root.parent),
            **speeds,
            **ratios,
        }


def write_photographs(folder: Path, images: int) -> int:
    """Writes an ImageFolder and returns its bytes."""
    contents = [jpeg(seed) for seed in range(min(images, DISTINCT))]
    for number in range(CLASSES):
        (folder / f"class{number}").mkdir(parents=True)
    for number in range(images):
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.write_bytes(contents[number % len(contents)])
    return sum(len(contents[number % len(contents)]) for number in range(images))


def timed(way: Callable[[Path], None], out: Path) -> float:
    """Seconds that one way takes into an empty folder."""
    out.mkdir()
    start = time.perf_counter()
    way(out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def run_ours(images: Path, check: Check, workers: int, out: Path) -> None:
    """All that `hardviews build` does."""
    run = partial(run_tasks, "local", workers=workers)
    build(plan(f"imagefolder:{images}", out, run, rules=Rules(check=check), shard_samples=SHARD_SAMPLES), "real", run)


def run_plain(images: Path, check: Check, out: Path) -> None:
    """What people write: a loop over the files, each checked and handed to ShardWriter."""
    rules = Rules(check=check)
    source = open_source(f"imagefolder:{images}", Options(SHARD_SAMPLES, keep_order=True), map)
    with ShardWriter(str(out / "shard-%06d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
        numbered = (record for part in source.parts for record in part.records())
        for number, record in enumerate(numbered):
            prepare(record.content, rules)
            writer.write({"__key__": f"{number:09d}", "jpg": record.content, "cls": record.label})
