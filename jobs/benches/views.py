"""`hardviews bench views`: N views per image, beside the loader that people use, in one run and by turns.

Both sides read the same images by the same policy with as many cores. Rounds alternate, figures are medians over the
rounds, and each side rests while the others are timed. Two more measurements decode, and decode and crop, alone.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.table import Table

from jobs.benches.accuracy import differences, markdown
from jobs.benches.ordinary import PREFETCH, ordinary_batches
from jobs.benches.photographs import jpeg
from jobs.log.writer import AugmentationLog, batch_rows
from jobs.run.process import keep_freed_memory
from jobs.run.terminal import parse, progress, tables
from pipelines.crop import crop_views
from pipelines.decode import Decoder, open_decoder
from pipelines.draw import draw
from pipelines.host import CHUNK, SPARE
from pipelines.policies import Policy, build_policy
from pipelines.stream import ViewStream, cores
from shards.build import build, plan
from shards.engines import run_tasks
from shards.errors import InputError
from shards.manifest import Manifest, open_manifest
from shards.order import SampleOrder
from shards.reader import SampleError, SampleReader

SEED = 0
AHEAD = 2  # batches our stream makes ahead
KEPT = 256  # images whose bytes are kept in memory, for decoding alone


@dataclass(frozen=True)
class ViewsBench:
    """Measures views per image against an ordinary loader, or colour against torchvision."""

    images: Path | None = None
    """Folder of images to use, with or without class folders; by default photographs of about 470×400 pixels and
    110 KB are made."""
    views: int = 4
    """Views of an image."""
    size: int = 224
    """Side of a view, pixels."""
    policy: str = "byol"
    """Augmentation policy; byol is MoBY's and SynBY's."""
    batch: int = 32
    """Images in a batch."""
    threads: int = 0
    """Cores: the ordinary loader has a process for each, ours a thread for each and one to spare; 0 for all that this
    process may use."""
    rounds: int = 5
    """Times that each side is measured."""
    seconds: float = 4.0
    """Length of a measurement, seconds."""
    made: int = 256
    """Photographs to make where no folder is given."""
    device: str = "cpu"
    """Where our batches go: cpu, or cuda (decode, crops and colour then run there)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of our batches."""
    accuracy: bool = False
    """Print how far each colour operation is from torchvision's instead, as a Markdown table."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


class Side:
    """One loader under measurement: batches without end, made ahead in the background."""

    def __init__(self, step: Callable[[], int], ahead: int) -> None:
        """`step` takes one batch and returns its images; up to `ahead` batches are made without being asked for."""
        self._step, self._ahead = step, ahead
        self._batch_seconds = 0.0

    def measure(self, seconds: float) -> float:
        """Images a second in the steady state, over whole batches for at least so long."""
        for _ in range(self._ahead + 1):  # what was made while resting does not count
            self._step()
        images, batches, start = 0, 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or batches < 2:
            images += self._step()
            batches += 1
        self._batch_seconds = spent / batches
        return images / spent

    def rest(self) -> None:
        """Waits until the batches ahead are made, so that the next measurement has the cores."""
        time.sleep(self._batch_seconds * (self._ahead + 1))


class OurViews:
    """The real stream over real shards, each batch's rows written to a log as a training step does."""

    def __init__(self, config: ViewsBench, manifest: Manifest, reader: SampleReader, policy: Policy, log: Path) -> None:
        order = SampleOrder([manifest.counts], [1.0], SEED)
        self.stream = ViewStream(
            reader,
            order,
            policy,
            seed=SEED,
            batch=config.batch,
            device=config.device,
            dtype=getattr(torch, config.dtype),
            threads=config.threads or cores(),
            prefetch=AHEAD,
        )
        self.log = AugmentationLog(log, views=policy.views)
        self.log_seconds = 0.0
        self._steps = 0
        self._cuda = config.device.startswith("cuda")

    def step(self) -> int:
        """Takes one batch and logs it; returns its images."""
        batch = next(self.stream)
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.log.append(batch_rows(batch, self._steps, self.log.scored))
        self.log_seconds += time.perf_counter() - start
        self._steps += 1
        return len(batch)

    def seconds(self) -> dict[str, float]:
        """Thread-seconds so far by stage, the log's among them; `images`; `cpu`, the process's CPU time."""
        stages = {name: spent for name, spent in self.stream.profile().items() if name != "wait"}
        return {**stages, "log": self.log_seconds, "cpu": time.process_time()}

    def close(self) -> None:
        """Ends the stream and the log."""
        self.stream.close()
        self.log.close()


class Parts:
    """A part of the work alone, chunk by chunk in as many threads as the stream has, without a pause between chunks."""

    def __init__(self, config: ViewsBench, work: Callable[[int], int]) -> None:
        """`work` does the chunk at a position and returns its images."""
        self.ahead = AHEAD * -(-config.batch // CHUNK)
        self.pool = ThreadPoolExecutor((config.threads or cores()) + SPARE)
        self._work = work
        self._position = 0
        self._pending: deque[Future[int]] = deque()

    def step(self) -> int:
        """Finishes one chunk; returns its images."""
        while len(self._pending) <= self.ahead:
            self._pending.append(self.pool.submit(self._work, self._position))
            self._position += CHUNK
        return self._pending.popleft().result()


def decoding(reader: SampleReader, policy: Policy | None) -> Callable[[int], int]:
    """Decodes chunks of bytes that lie in memory and, with a policy, crops all views by boxes drawn before: what the
    decoder and the crops alone can do on this machine."""
    first = np.arange(min(KEPT, len(reader)))
    read = {number: item for number, item in enumerate(reader.read(first)) if not isinstance(item, SampleError)}
    ids, data = first[list(read)], list(read.values())
    params = draw(policy, ids, np.zeros_like(ids), SEED, reader.sizes(ids)) if policy else None
    local = threading.local()

    def work(position: int) -> int:
        places = [place % len(data) for place in range(position, position + CHUNK)]
        images = _decoder(local).decode([data[place] for place in places])
        if policy and params:
            crops = [torch.empty(group.count, group.size, group.size, 3, dtype=torch.uint8) for group in policy.groups]
            for place, image in zip(places, images, strict=True):
                if isinstance(image, torch.Tensor):
                    for span, crops_nSS3 in zip(policy.spans, crops, strict=True):
                        crop_views(image, params[place][span], crops_nSS3)
        return len(images)

    return work


def _decoder(local: threading.local) -> Decoder:
    """This thread's decoder."""
    if not hasattr(local, "decoder"):
        local.decoder = open_decoder(CHUNK)
    return local.decoder


def views_figures(config: ViewsBench) -> dict[str, object]:
    """Runs the measurements; every figure with its unit in its name.

    Raises:
        InputError: for a bad setting, or a folder without images.
    """
    if config.rounds < 1 or config.batch < 1 or config.made < 1:
        raise InputError("rounds, batch, made: give at least 1 of each")
    policy = build_policy(config.policy, config.size, config.views)
    threads = config.threads or cores()
    torch.set_num_threads(1)  # threads of ours run beside each other; torch's own would fight them
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = config.images or make_photographs(scratch / "images", config.made)
        manifest = make_shards(folder, scratch / "shards", threads)
        files = image_files(folder, manifest)
        reader = SampleReader([manifest])
        stack.callback(reader.close)
        ours = OurViews(config, manifest, reader, policy, scratch / "log.zarr")
        stack.callback(ours.close)
        decode, crops = (Parts(config, decoding(reader, cropped)) for cropped in (None, policy))
        for part in (decode, crops):
            stack.callback(part.pool.shutdown, cancel_futures=True)
        ordinary = ordinary_batches(files, policy, config.batch, threads)
        sides = {
            "ours": Side(ours.step, AHEAD),
            "ordinary": Side(partial(_take, ordinary), PREFETCH * threads),
            "decode": Side(decode.step, decode.ahead),
            "crops": Side(crops.step, crops.ahead),
        }
        rates, spent = _alternate(sides, ours, config)
        del ordinary  # ends its processes
        facts = {
            "images": len(manifest),
            "mean_kilobytes": sum(path.stat().st_size for path in files) / len(files) / 1e3,
            "views": policy.views,
            "size": config.size,
            "policy": config.policy,
            "batch": config.batch,
            "threads": threads,
            "device": config.device,
            "dtype": config.dtype,
        }
    return {**_figures(rates, spent, config), **facts}


def _take(batches: Iterator[list[torch.Tensor]]) -> int:
    return len(next(batches)[0])


def _alternate(
    sides: dict[str, Side], ours: OurViews, config: ViewsBench
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Rates of each side over the rounds, and what our stages took in our measurements alone."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    spent: dict[str, float] = {}
    with progress("measuring", config.rounds * len(sides), "measurements") as bar:
        for side in sides.values():  # starts processes and threads, fills caches
            side.measure(min(1.0, config.seconds))
            side.rest()
        for _ in range(config.rounds):
            for name, side in sides.items():
                before = ours.seconds()
                rates[name].append(side.measure(config.seconds))
                if name == "ours":
                    after = ours.seconds()
                    spent = {key: spent.get(key, 0.0) + after[key] - before[key] for key in after}
                side.rest()
                bar.advance()
    return rates, spent


def _figures(rates: dict[str, list[float]], spent: dict[str, float], config: ViewsBench) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    images = spent.pop("images")
    cpu = spent.pop("cpu")
    milliseconds = {stage: 1e3 * seconds / images for stage, seconds in spent.items()}
    busiest = max(milliseconds, key=lambda stage: milliseconds[stage])
    return {
        "images_per_second": medians["ours"],
        "baseline_images_per_second": medians["ordinary"],
        "ratio": medians["ours"] / medians["ordinary"],
        "ratios": [a / b for a, b in zip(rates["ours"], rates["ordinary"], strict=True)],
        "decode_images_per_second": medians["decode"],
        "decode_and_crop_images_per_second": medians["crops"],
        "profile": milliseconds,
        "bound_by": busiest,
        "cpu_milliseconds_per_image": 1e3 * cpu / images,
        # Against the shortest step there can be, one that waits for nothing but its data.
        "log_share_of_step": milliseconds["log"] * medians["ours"] / 1e3,
        "peak_memory_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def make_photographs(folder: Path, count: int) -> Path:
    """A folder of made JPEGs."""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress("making photographs", count, "images") as bar:
        for number, content in enumerate(pool.map(jpeg, range(count))):
            (folder / f"{number:05}.jpg").write_bytes(content)
            bar.advance()
    return folder


def make_shards(folder: Path, out: Path, workers: int) -> Manifest:
    """Shards of all images in the folder, made as `hardviews build` makes them."""
    run = partial(run_tasks, "local", workers=workers, address=None)
    build(plan(f"folder:{folder}", out, run, shard_samples=128, keep_order=True), "real", run)
    return open_manifest(out)


def image_files(folder: Path, manifest: Manifest) -> list[Path]:
    """The files of the images that the shards hold, so that both sides read the same.

    Raises:
        InputError: fewer files than samples carry a JPEG's, PNG's or WebP's name.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if len(files) != len(manifest):
        raise InputError(
            f"images: {folder}: {len(manifest)} of {len(files)} image files can be read; take the others out"
        )
    return files


def table(figures: dict[str, object]) -> Table:
    """The figures as people read them."""
    shown = Table(title="Views: {views} of {size} pixels an image, policy {policy}, {threads} cores".format(**figures))
    shown.add_column("")
    shown.add_column("value", justify="right")
    number = {key: value for key, value in figures.items() if isinstance(value, float)}
    shown.add_row("hardviews, whole pipeline", f"{number['images_per_second']:,.0f} images/s")
    shown.add_row("ordinary loader (torchvision, DataLoader)", f"{number['baseline_images_per_second']:,.0f} images/s")
    shown.add_row("ratio", f"{number['ratio']:.2f}")
    shown.add_row("decode alone", f"{number['decode_images_per_second']:,.0f} images/s")
    shown.add_row("decode and crops alone", f"{number['decode_and_crop_images_per_second']:,.0f} images/s")
    shown.add_section()
    profile = figures["profile"]
    assert isinstance(profile, dict)
    for stage, milliseconds in profile.items():
        shown.add_row(f"{stage}, over all threads", f"{milliseconds:.3f} ms/image")
    shown.add_row("CPU time of the process", f"{number['cpu_milliseconds_per_image']:.2f} ms/image")
    shown.add_row("bound by", str(figures["bound_by"]))
    shown.add_row("log, of the shortest possible step", f"{number['log_share_of_step']:.2%}")
    shown.add_row("peak memory", f"{number['peak_memory_gigabytes']:.1f} GB")
    return shown


def main(argv: list[str]) -> None:
    """Entry point of `hardviews bench views`."""
    config = parse(ViewsBench, argv, prog="hardviews bench views")
    if config.device == "cpu":
        keep_freed_memory()
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: {config.device} asked for, but torch sees no CUDA device; take --device cpu")
    if config.accuracy:
        rows = differences(config.size, device=config.device)
        print(json.dumps([vars(difference) for difference in rows]) if config.json else markdown(rows))
        return
    figures = views_figures(config)
    tables.print(table(figures))
    if config.json:
        print(json.dumps(figures))
