"""`hardviews bench training`: what the data, hard views and synthetic negatives cost of real training steps.

Each side is a run as `hardviews pretrain` opens it, with stream, log and optimizer, in bf16 and compiled where the
device is a GPU. Its steps are timed twice, by turns: fed by the stream, and fed one batch that lies ready on the device
while the stream rests. The difference is what the views cost. Monitors and checkpoints are off: `bench run` has those.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from jobs.benches.views import make_photographs, make_shards
from jobs.run.config import DataConfig, MonitorConfig, PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.presets import hard, moby, synby
from jobs.run.process import keep_freed_memory
from jobs.run.terminal import Bar, parse, progress, tables
from jobs.run.world import World, pick_device
from jobs.training.health import forward_flops, peak_flops
from jobs.training.opening import open_training
from jobs.training.state import Training
from jobs.training.step import autocast, train_step
from models.backbones import BackboneConfig
from models.negatives import NegativesConfig
from models.objectives import MoBYConfig
from pipelines.batch import ViewBatch
from pipelines.stream import cores
from shards.errors import InputError

SIDES = ("plain", "negatives", "hard", "both", "target")
PLAIN_UNITS = 8  # of MoBY on two views: both forward and backward online (3 each), both by the target
NEVER = 1 << 40
KERNELS = 12


@dataclass(frozen=True)
class TrainingBench:
    """Measures what the data, hard views and synthetic negatives cost of a training step."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("vit_small_patch16_224"))
    """Encoder."""
    sides: tuple[str, ...] = SIDES
    """plain: MoBY on two random views; negatives: with synthetic negatives; hard: on the hardest pair of four views;
    both: with both; target: the same, scored by the target alone."""
    batch: int = 256
    """Images per step."""
    steps: int = 20
    """Steps of a measurement."""
    rounds: int = 3
    """Times that each way of feeding is measured."""
    images: Path | None = None
    """Folder of images to use; by default photographs of about 470×400 pixels and 110 KB are made."""
    made: int = 1024
    """Photographs to make where no folder is given."""
    threads: int = 0
    """CPU threads of the stream; 0 for all cores."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the encoders; auto = bf16 on cuda, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto = on for cuda."""
    decode_mb_s: float = 0.0
    """JPEG that the device decodes in a second (10⁶ bytes), for the roofline; 0 leaves decoding out of it."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "rounds", "made"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.decode_mb_s < 0:
            raise InputError(f"decode_mb_s: {self.decode_mb_s} must be 0 or above")
        if unknown := set(self.sides) - set(SIDES):
            raise InputError(f"sides: {', '.join(sorted(unknown))} unknown; choose among {', '.join(SIDES)}")


def config_of(side: str, bench: TrainingBench, shards: Path) -> PretrainConfig:
    """The run of a side, with synthetic negatives from the first step on where it has any."""
    always = MoBYConfig(NegativesConfig(start_epoch=0, last_epochs_without=0))
    synthetic = side in ("negatives", "both", "target")
    config = replace(synby(bench.backbone), objective=always) if synthetic else moby(bench.backbone)
    if side in ("hard", "both", "target"):
        config = hard(config)
    if side == "target":
        config = replace(config, selection=replace(config.selection, encoder="target"))
    return replace(
        config,
        data=DataConfig(real=(str(shards),), threads=bench.threads),
        monitor=MonitorConfig(every=NEVER, bank=0, health_every=0, loggers=()),
        steps=NEVER,
        batch=bench.batch,
        precision=bench.precision,
        compile=bench.compile,
    )


class Side:
    """A run under measurement."""

    def __init__(self, t: Training) -> None:
        self.t = t
        self._position = 0
        self._resident = self.next_batch()

    def seconds(self, steps: int, streamed: bool) -> float:
        """Mean seconds of a step, fed by the stream or by the resident batch."""
        for _ in range(DataConfig().prefetch + 1 if streamed else 0):  # what was made while resting does not count
            self.next_batch()
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            with self.t.timer.phase("data", host=True):
                batch = self.next_batch() if streamed else self._resident
            self._position += len(batch)
            train_step(self.t, replace(batch, position=self._position))  # the log takes rising positions alone
        self._synchronize()
        return (time.perf_counter() - start) / steps

    def rest(self) -> None:
        """Waits until the stream has made what it makes ahead."""
        while not all(promise.done() for promise in self.t.stream._pending):  # pyright: ignore[reportPrivateUsage]
            time.sleep(0.01)

    def next_batch(self) -> ViewBatch:
        """The stream's next one."""
        return next(self.t.stream)

    def _synchronize(self) -> None:
        if self.t.world.device.type == "cuda":
            torch.cuda.synchronize()


def measure_side(t: Training, bench: TrainingBench, image_bytes: float, bar: Bar) -> dict[str, object]:
    """Milliseconds of a step either way, the data's share, and where the time of both goes, beside the least that the
    device's peak and its decoder allow for images of so many bytes on average."""
    side = Side(t)
    for streamed in (True, False):  # compiles, and fills caches and buffers
        side.seconds(max(3, bench.steps // 4), streamed)
    times: dict[str, list[float]] = {"streamed": [], "resident": []}
    phases: dict[str, dict[str, float]] = {}
    before = t.stream.profile()
    for _ in range(bench.rounds):
        for name, seconds in times.items():
            side.rest()
            t.timer.report(bench.batch)
            seconds.append(side.seconds(bench.steps, name == "streamed"))
            phases[name] = {key: 1e3 * value for key, value in t.timer.report(bench.batch).items() if "time/" in key}
            bar.advance()
    after = t.stream.profile()
    streamed, resident = (1e3 * statistics.median(values) for values in times.values())
    images = after["images"] - before["images"]
    size, device = bench.backbone.image_size, t.world.device
    forward_ms = 1e3 * bench.batch * forward_flops(t.objective.backbone, size, device) / peak_flops(device)
    return {
        "streamed_ms": streamed,
        "resident_ms": resident,
        "streamed_ms_rounds": [1e3 * seconds for seconds in times["streamed"]],
        "resident_ms_rounds": [1e3 * seconds for seconds in times["resident"]],
        "data_share": (streamed - resident) / resident,
        "images_per_second": 1e3 * bench.batch / streamed,
        # Of plain MoBY's forwards and backwards, whatever selection adds.
        "mfu": PLAIN_UNITS * forward_ms / resident,
        "forward_units": forward_units(t),
        "roofline_ms": {
            "compute": forward_units(t) * forward_ms,
            "decode": 1e-3 * bench.batch * image_bytes / bench.decode_mb_s if bench.decode_mb_s else None,
        },
        "phases_ms": phases,
        "stream_ms_per_image": {key: 1e3 * (after[key] - before[key]) / images for key in after if key != "images"},
        "peak_gigabytes": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "kernels_ms_per_batch": kernels(side) if device.type == "cuda" else None,
        "kernels_per_step": kernels_per_step(side) if device.type == "cuda" else None,
    }


def forward_units(t: Training) -> int:
    """Forwards of one view of an image in a step, a backward as two: plain training's and what scoring adds."""
    selection, objective = t.config.selection, t.objective
    if not selection.scores(t.step):
        return PLAIN_UNITS
    with autocast(t):
        again = 2 if objective.reuses_features(selection, t.world.device) else 0
    return PLAIN_UNITS + selection.views * (2 if selection.encoder == "online" else 1) - again


def kernels_per_step(side: Side, steps: int = 3) -> float:
    """Kernels and copies that the device runs in a step on a batch that lies ready, while the stream rests."""
    from torch.profiler import ProfilerActivity, profile

    side.rest()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        side.seconds(steps, False)
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total) / steps


def kernels(side: Side, batches: int = 5) -> dict[str, float]:
    """GPU milliseconds that the stream spends on a batch, by kernel (DALI's too): the longest ones, and `all`."""
    from torch.profiler import ProfilerActivity, profile

    side.rest()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(batches):  # each that is taken lets another one be made
            side.next_batch()
        side.rest()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / 1e3 / batches for event in profiler.key_averages()}
    longest = sorted(spent, key=lambda name: -spent[name])[:KERNELS]
    return {"all": sum(spent.values()), **{name: spent[name] for name in longest}}


def measure(bench: TrainingBench) -> dict[str, object]:
    """Figures by side, and what each part makes of the plain step's time."""
    device = pick_device(bench.device)
    if device.type == "cpu":
        keep_freed_memory()
    by_side: dict[str, dict[str, object]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hardviews-bench-")))
        images = bench.images or make_photographs(folder / "images", bench.made)
        make_shards(images, folder / "shards", bench.threads or cores())
        sizes = [path.stat().st_size for path in images.rglob("*") if path.is_file()]
        bar = stack.enter_context(progress("measuring", 2 * bench.rounds * len(bench.sides), "measurements"))
        for side in bench.sides:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with ExitStack() as run:
                place = RunFolder(folder / side)
                config = config_of(side, bench, folder / "shards")
                t = open_training(config, place, World(0, 1, device), run, False)
                by_side[side] = measure_side(t, bench, statistics.mean(sizes), bar)
            if bench.json:  # what a benchmark that is stopped has said
                print(json.dumps({side: by_side[side]}), flush=True)
    return {"sides": by_side, **compared(by_side)}


def compared(by_side: dict[str, dict[str, object]]) -> dict[str, float]:
    """Ratios of the other sides' steps to the plain one's, where that was measured."""
    times = {side: float(str(one["resident_ms"])) for side, one in by_side.items()}
    names = {side: f"overhead_{side}" for side in SIDES[1:]}
    return {names[side]: times[side] / times["plain"] for side in times if side in names and "plain" in times}


def main(argv: Sequence[str]) -> None:
    bench = parse(TrainingBench, argv, prog="hardviews bench training")
    figures = measure(bench)
    sides = figures["sides"]
    assert isinstance(sides, dict)
    table = Table("step", "fed by the stream, ms", "from memory, ms", "data", "images/s", "MFU", "roofline, ms")
    table.title = f"{bench.backbone.name}, batch {bench.batch}, {bench.backbone.image_size} pixels"
    for name, one in sides.items():
        row = (f"{one['streamed_ms']:,.1f}", f"{one['resident_ms']:,.1f}", f"{one['data_share']:+.1%}")
        bounds = ", ".join(f"{part} {ms:,.1f}" for part, ms in one["roofline_ms"].items() if ms is not None)
        table.add_row(name, *row, f"{one['images_per_second']:,.0f}", f"{one['mfu']:.0%}", bounds)
    table.caption = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float))
    tables.print(table)
    if bench.json:
        print(json.dumps(figures))
