"""`hardviews bench shards`: building, reading, the order of samples and how well it shuffles.

Reading and the order run in processes of their own, so that the peak memory is theirs. Figures are medians over
repeats, and the sides of a comparison take turns.
Letters: n samples, S shards.
"""

import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from jobs.benches.photographs import jpeg
from jobs.run.terminal import parse, progress, tables
from shards.errors import InputError
from shards.manifest import columns_name, index_name, open_manifest, write_manifest
from shards.order import SampleOrder
from shards.reader import SampleReader
from shards.writer import Sample, finish, sample_key, shard_name, write_shard

MEMORY = Path("/dev/shm")
SEED = 0
BATCH = 256  # images
DISTINCT = 64  # photographs made; the shards repeat them
READ_SHARD = 250  # samples of a shard, some 27 MB
MANY_SHARDS, MANY_ROWS = 10_000, 1_000  # the large data set on disk, and rows of each of its shards
VAST_SHARDS, VAST_ROWS = 100_000, 10_000  # the order of a billion samples, from counts alone
BLOCKS = (4, 16, 64)  # shards shuffled together
SHUFFLED_SHARDS, SHUFFLED_ROWS, SHUFFLED_CLASSES, SHUFFLED_EPOCHS = 256, 400, 100, 4

Part = Literal["read", "order", "shuffle", "build"]
Figures = dict[str, Any]


@dataclass(frozen=True)
class ShardsBench:
    """Measures shards and the order of samples."""

    parts: tuple[Part, ...] = ("read", "order", "shuffle", "build")
    """What to measure."""
    images: int = 2000
    """Photographs of about 110 KB in the shards that are read, and in the folder that is built from."""
    repeats: int = 3
    """Times that each side is measured."""
    seconds: float = 3.0
    """Length of a reading measurement, seconds."""
    threads: int = 2
    """Our reader's threads, the other reader's processes, and the build's processes."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("images", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: {getattr(self, name)} must be at least 1")


def main(argv: list[str]) -> None:
    """Measures and prints."""
    config = parse(ShardsBench, argv, "hardviews bench shards")
    figures: dict[str, Figures] = {"machine": {"cores": len(os.sched_getaffinity(0))}}
    with progress("measuring", len(config.parts), "parts") as bar:
        for part in config.parts:
            figures[part] = MEASURES[part](config)
            bar.advance(1, part)
    tables.print(table(figures))
    if config.json:
        print(json.dumps(figures))


def alone(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """Runs a function in a fresh process and adds that process's peak memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable[..., Figures], arguments: tuple[Any, ...]) -> Figures:
    figures = function(*arguments)
    return figures | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


def scratch(needed: int) -> Path | None:
    """A folder in memory where there is room for `needed` bytes; None for the temporary folder."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed else None


# Reading


def measure_read(config: ShardsBench) -> Figures:
    """Images a second in our order, and through `webdataset.WebDataset` in the order of the tars."""
    with tempfile.TemporaryDirectory(dir=scratch(2 * 130_000 * config.images)) as folder:
        root = Path(folder) / "shards"
        mean = write_photograph_shards(root, config.images)
        sides: dict[str, tuple[Any, ...]] = {
            "hardviews": (read_ours, root, config.seconds, config.threads),
            "webdataset": (read_webdataset, root, config.seconds, 0),
            "webdataset_workers": (read_webdataset, root, config.seconds, config.threads),
        }
        runs = [{name: alone(*side) for name, side in sides.items()} for _ in range(config.repeats)]
    figures: Figures = {"kilobytes_per_image": mean / 1e3, "threads": config.threads}
    for name in sides:
        figures[f"{name}_images_per_s"] = statistics.median(run[name]["images_per_s"] for run in runs)
        figures[f"{name}_peak_mb"] = max(run[name]["peak_mb"] for run in runs)
    return figures


def write_photograph_shards(root: Path, images: int) -> float:
    """Writes shards of photographs, and returns an image's mean size in bytes."""
    root.mkdir()
    contents = [jpeg(seed) for seed in range(min(images, DISTINCT))]

    def samples(first: int, count: int) -> Iterator[Sample]:
        for number in range(first, first + count):
            yield Sample(sample_key(number), contents[number % len(contents)], "jpg", 400, 470, number % 10)

    results = [
        write_shard(root, shard_name(shard), samples(first, min(READ_SHARD, images - first)), {})
        for shard, first in enumerate(range(0, images, READ_SHARD))
    ]
    finish(root, results, source="real", classes=[str(label) for label in range(10)], provenance={})
    return statistics.fmean(map(len, contents))


def read_ours(root: Path, seconds: float, threads: int) -> Figures:
    """Checked bytes in shuffled order, the next batch being read while one is taken."""
    manifest = open_manifest(root)
    reader, order = SampleReader([manifest], threads=threads), SampleOrder([manifest.counts], [1.0], SEED)

    def read(position: int) -> int:
        items = reader.read(order.at(position, BATCH).ids)
        assert all(isinstance(item, np.ndarray) for item in items)
        return len(items)

    def batches() -> Iterator[int]:
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(read, 0)
            position = BATCH
            while True:
                count = pending.result()
                pending = ahead.submit(read, position)
                position += BATCH
                yield count

    speed = images_per_second(batches(), seconds, warm_up=len(manifest))
    reader.close()
    return {"images_per_s": speed}


def read_webdataset(root: Path, seconds: float, workers: int) -> Figures:
    """Unchecked bytes in the order of the tars, in this process or through worker processes."""
    from webdataset.compat import WebDataset, WebLoader
    from webdataset.shardlists import single_node_only

    tars = [str(root / name) for name in open_manifest(root).shards]
    dataset = WebDataset(tars, shardshuffle=False, nodesplitter=single_node_only).repeat()
    loader = WebLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset

    def images() -> Iterator[int]:
        for sample in loader:
            assert sample["jpg"]
            yield 1

    return {"images_per_s": images_per_second(images(), seconds, warm_up=open_manifest(root).counts.sum())}


def images_per_second(counts: Iterator[int], seconds: float, warm_up: int) -> float:
    """Speed after the first `warm_up` images, which bring the files into the page cache."""
    while warm_up > 0:
        warm_up -= next(counts)
    images, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        images += next(counts)
    return images / spent


# Order


def measure_order(config: ShardsBench) -> Figures:
    """The first batch of ten million samples, and the order of a billion, from a standing start."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        write_many_shards(root)
        many = [alone(first_batch, root) for _ in range(config.repeats)]
    vast = [alone(order_anywhere) for _ in range(config.repeats)]
    return {
        "many_shards": MANY_SHARDS,
        "many_samples": MANY_SHARDS * MANY_ROWS,
        "first_batch_s": statistics.median(run["seconds"] for run in many),
        "first_batch_peak_mb": max(run["peak_mb"] for run in many),
        "vast_shards": VAST_SHARDS,
        "vast_samples": VAST_SHARDS * VAST_ROWS,
        "order_anywhere_s": statistics.median(run["seconds"] for run in vast),
        "order_anywhere_peak_mb": max(run["peak_mb"] for run in vast),
    }


def write_many_shards(root: Path) -> None:
    """A data set of 10 million samples whose shards are links to one: its files are real, its room is one shard's."""
    root.mkdir()
    bits = np.random.default_rng(SEED)
    contents = [b"\xff\xd8" + bits.bytes(200).replace(b"\xff", b"\0") + b"\xff\xd9" for _ in range(MANY_ROWS)]
    samples = [Sample(sample_key(n), content, "jpg", 400, 470, n % 10) for n, content in enumerate(contents)]
    result = write_shard(root, shard_name(0), samples, {})
    entries = [replace(result.entry, name=shard_name(number)) for number in range(MANY_SHARDS)]
    for entry in entries[1:]:
        for name in (str, columns_name, index_name):
            (root / name(entry.name)).hardlink_to(root / name(result.entry.name))
    write_manifest(
        root,
        source="real",
        classes=[str(label) for label in range(10)],
        class_counts=[result.labels[label] * MANY_SHARDS for label in range(10)],
        unlabelled=0,
        entries=entries,
        provenance={},
    )


def first_batch(root: Path) -> Figures:
    """Opens a data set and reads a batch from its middle."""
    start = time.perf_counter()
    manifest = open_manifest(root)
    reader, order = SampleReader([manifest]), SampleOrder([manifest.counts], [1.0], SEED)
    items = reader.read(order.at(order.epoch_length // 2, BATCH).ids)
    assert all(isinstance(item, np.ndarray) for item in items)
    seconds = time.perf_counter() - start
    reader.close()
    return {"seconds": seconds}


def order_anywhere() -> Figures:
    """Makes the order of two sources and asks for batches near and far."""
    start = time.perf_counter()
    order = SampleOrder([np.full(VAST_SHARDS // 2, VAST_ROWS)] * 2, [0.7, 0.3], SEED)
    for position in (0, order.epoch_length // 2, order.epoch_length - BATCH // 2, 300 * order.epoch_length + 7):
        assert len(np.unique(order.at(position, BATCH).ids)) == BATCH
    return {"seconds": time.perf_counter() - start}


# Shuffling


def measure_shuffle(config: ShardsBench) -> Figures:
    """Block shuffling of samples that lie sorted by class, the worst case, beside a full shuffle."""
    counts = np.full(SHUFFLED_SHARDS, SHUFFLED_ROWS)
    total = int(counts.sum())
    figures: Figures = {"samples": total, "shards": SHUFFLED_SHARDS, "classes": SHUFFLED_CLASSES, "batch": BATCH}
    for block in BLOCKS:
        order = SampleOrder([counts], [1.0], SEED, block)
        epochs = [order.at(epoch * total, total).ids for epoch in range(SHUFFLED_EPOCHS)]
        figures |= {f"block_{block}_{name}": value for name, value in shuffling(epochs, total).items()}
    full = [np.random.default_rng(epoch).permutation(total) for epoch in range(SHUFFLED_EPOCHS)]
    return figures | {f"full_{name}": value for name, value in shuffling(full, total).items()}


def shuffling(epochs: list[np.ndarray], total: int) -> Figures:
    """Means over epochs: Spearman's |ρ| of input and output positions, and how many classes are in a batch."""
    correlations = [abs(np.corrcoef(ids, np.arange(total))[0, 1]) for ids in epochs]
    labels = [(ids * SHUFFLED_CLASSES // total)[: total // BATCH * BATCH].reshape(-1, BATCH) for ids in epochs]
    distinct = [len(np.unique(batch)) for epoch in labels for batch in epoch]
    return {"rank_correlation": float(np.mean(correlations)), "classes_per_batch": statistics.fmean(distinct)}


def measure_build(config: ShardsBench) -> Figures:
    """Building shards of an ImageFolder beside a ShardWriter loop."""
    from jobs.benches.shards_build import (
        build_figures,
    )  # brings torch, whose memory the processes measured must not pay

    return build_figures(images=config.images, repeats=config.repeats, workers=config.threads)


MEASURES: dict[Part, Callable[[ShardsBench], Figures]] = {
    "read": measure_read,
    "order": measure_order,
    "shuffle": measure_shuffle,
    "build": measure_build,
}


def table(figures: dict[str, Figures]) -> Table:
    """A line per figure: ours, what it is compared with, and the aim."""
    made = Table(title=f"hardviews bench shards, {figures['machine']['cores']} cores")
    for column in ("figure", "hardviews", "compared with", "aim"):
        made.add_column(column, justify="left" if column in ("figure", "compared with") else "right")
    if read := figures.get("read"):
        others = (
            f"webdataset {read['webdataset_images_per_s']:,.0f}, "
            f"{read['threads']} workers {read['webdataset_workers_images_per_s']:,.0f}"
        )
        name = f"reading, images/s of {read['kilobytes_per_image']:.0f} KB"
        made.add_row(name, f"{read['hardviews_images_per_s']:,.0f}", others, "≥ 5,000")
        peaks = f"webdataset {read['webdataset_peak_mb']:,.0f} MB"
        made.add_row("  peak memory", f"{read['hardviews_peak_mb']:,.0f} MB", peaks, "≤ 400 MB")
    if order := figures.get("order"):
        name = f"first batch of {order['many_samples'] / 1e6:.0f} million samples, {order['many_shards']:,} shards"
        made.add_row(name, f"{order['first_batch_s']:.2f} s", "", "≤ 5 s")
        made.add_row("  peak memory", f"{order['first_batch_peak_mb']:,.0f} MB", "", "≤ 600 MB")
        name = f"any position, {order['vast_samples'] / 1e9:.0f} billion samples, {order['vast_shards']:,} shards"
        made.add_row(name, f"{order['order_anywhere_s']:.2f} s", "", "≤ 10 s")
        made.add_row("  peak memory", f"{order['order_anywhere_peak_mb']:,.0f} MB", "", "≤ 2,000 MB")
    if shuffle := figures.get("shuffle"):
        for block in BLOCKS:
            name = f"rank correlation, blocks of {block} of {shuffle['shards']} sorted shards"
            ours = f"{shuffle[f'block_{block}_rank_correlation']:.3f}"
            made.add_row(name, ours, f"full shuffle {shuffle['full_rank_correlation']:.3f}", "")
            ours = f"{shuffle[f'block_{block}_classes_per_batch']:.1f}"
            name = f"  classes in a batch of {shuffle['batch']}, of {shuffle['classes']}"
            made.add_row(name, ours, f"full shuffle {shuffle['full_classes_per_batch']:.1f}", "")
    if build := figures.get("build"):
        for check, aim in (("full", "≥ 1,000"), ("header", "≥ 4,000")):
            name = f"building, {check} check, images/s, {build['workers']} workers"
            baseline = f"ShardWriter {build[f'shardwriter_{check}_images_per_s']:,.0f}"
            made.add_row(name, f"{build[f'hardviews_{check}_images_per_s']:,.0f}", baseline, aim)
            made.add_row("  1 worker", f"{build[f'hardviews_{check}_1_worker_images_per_s']:,.0f}", baseline, "")
    return made
