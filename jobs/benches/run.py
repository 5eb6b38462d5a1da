"""`hardviews bench run`: what checkpoints and monitors add to the steps of a run.

Three runs of the same preset with the same weights live in one process and take every step by turns, in changing order,
on the same batches, while nothing is streamed. Two are bare (they select, learn and write the augmentation log); the
third besides has every monitor, both loggers, and checkpoints, whose writing in the background is waited for. It has a
line of metrics, a health check and a checkpoint more often than users would; each kind of step then counts as often as
it comes with a line every 10 steps, and the others every 100. What watching adds is the median difference of a kind's
pairs of steps; intervals are from resampling the pairs. The second bare run shows what the method finds where there is
nothing to find. Where others use the machine these two are noise, and the time that monitors and checkpoints take
themselves is the steadier figure; it leaves out what they do to the step around them.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from jobs.benches.digits import write_digits
from jobs.run.config import CheckpointConfig, DataConfig, MonitorConfig, PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.presets import preset
from jobs.run.process import keep_freed_memory
from jobs.run.terminal import parse, progress, tables
from jobs.run.world import World, pick_device
from jobs.training.opening import open_training
from jobs.training.state import Training, save
from jobs.training.step import train_step
from pipelines.batch import ViewBatch
from shards.build import build, plan
from shards.engines import run_tasks
from shards.errors import InputError

LINE, FULL = 5, 10  # steps between lines, and between health checks and checkpoints, while measuring
# Shares of plain steps, of those with a line, and of those with a health check and a checkpoint besides, in a run.
SHARES = (0.90, 0.09, 0.01)
WARM = FULL  # steps of each side that are not measured: the first of each kind have work that comes once
BATCHES = 4  # that all sides take in turn
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class RunBench:
    """Measures what checkpointing every 100 steps and all monitors add to a training step."""

    preset: str = "synby-vit-tiny"
    """Preset to train, on scanned digits scaled to its image size."""
    batch: int = 64
    """Images per step."""
    cycles: int = 12
    """Times that 10 steps of each side are measured."""
    threads: int = 0
    """CPU threads; 0 for torch's own choice."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("batch", "cycles"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be at least 1")


def configs(bench: RunBench, shards: Path) -> dict[str, PretrainConfig]:
    """The bare run, the watched one, and the bare one again."""
    base = replace(
        preset(bench.preset),
        data=DataConfig(real=(str(shards),), threads=bench.threads),
        checkpoint=CheckpointConfig(every=FULL),
        steps=100 * FULL * (bench.cycles + 1),  # no end comes near
        batch=bench.batch,
    )
    bare = replace(base, monitor=MonitorConfig(bank=0, health_every=0, loggers=()))
    return {"bare": bare, "watched": replace(base, monitor=MonitorConfig(every=LINE, health_every=FULL)), "again": bare}


def take_step(t: Training, batch: ViewBatch, watched: bool) -> np.ndarray:
    """[2, 2]: seconds that a step takes, and those of them for watching and saving; by the clock, and of all threads'
    CPU time."""
    start = clocks(t)
    result = train_step(t, batch := replace(batch, position=t.step * len(batch)))
    trained = clocks(t)
    if watched:
        t.monitor.after_step(t.step, batch, result)
        if t.step % FULL == 0:
            save(t)
            assert t.saver is not None
            t.saver.wait()
    end = clocks(t)
    return np.stack([end - start, end - trained])


def clocks(t: Training) -> np.ndarray:
    """The clock and this process's CPU time, seconds, when the device has done what it was given."""
    if t.world.device.type == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def kinds(steps: int) -> np.ndarray:
    """What each of the measured steps was, as an index into SHARES."""
    numbers = np.arange(WARM + 1, WARM + 1 + steps)
    return np.where(numbers % FULL == 0, 2, np.where(numbers % LINE == 0, 1, 0))


def overhead(bare: np.ndarray, other: np.ndarray, kind: np.ndarray) -> tuple[float, float, float]:
    """What the other side's steps take more than the bare one's, as a share, and its 95 % interval.

    `bare`, `other`: seconds of the same steps; `kind`: as `kinds` gives them.
    """
    chance = np.random.default_rng(0)

    def estimate(chosen: list[np.ndarray]) -> float:
        added = sum(share * np.median((other - bare)[rows]) for share, rows in zip(SHARES, chosen, strict=True))
        return float(added / np.median(bare[np.concatenate(chosen)]))

    rows = [np.flatnonzero(kind == number) for number in range(len(SHARES))]
    drawn = [estimate([chance.choice(group, len(group)) for group in rows]) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return estimate(rows), float(low), float(high)


def measure(bench: RunBench) -> dict[str, tuple[float, ...]]:
    """By CPU time and by the clock: `taken_*`, what monitors and checkpoints take themselves, `watched_*`, what they
    add, and `null_*`, what nothing adds, each as a share of a bare step with its interval; `bare_ms_*` of a step."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hardviews-bench-")))
        write_digits(folder / "images", preset(bench.preset).backbone.image_size)
        tasks = partial(run_tasks, "local", workers=1, address=None)
        shards = folder / "shards"
        build(plan(f"imagefolder:{folder / 'images' / 'train'}", shards, tasks), "real", tasks)
        world = World(0, 1, pick_device(bench.device))
        sides: dict[str, Training] = {}
        for name, config in configs(bench, shards).items():
            run = RunFolder(folder / name)
            sides[name] = open_training(config, run, world, stack, resume=False)
        batches = [next(sides["bare"].stream) for _ in range(BATCHES)]
        for t in sides.values():
            t.stream.close()
        steps = FULL * bench.cycles
        bar = stack.enter_context(progress("measuring", steps, "steps"))
        spent = {name: np.zeros((steps, 2, 2)) for name in sides}
        for number in range(-WARM, steps):
            turn = number % len(sides)
            for name in [*list(sides)[turn:], *list(sides)[:turn]]:
                taken = take_step(sides[name], batches[number % BATCHES], name == "watched")
                if number >= 0:
                    spent[name][number] = taken
            if number >= 0:
                bar.advance(1)
    figures: dict[str, tuple[float, ...]] = {}
    for column, clock in enumerate(("wall", "cpu")):
        bare, watched, again = (spent[side][:, :, column].T for side in ("bare", "watched", "again"))
        for name, other in (("taken", bare[0] + watched[1]), ("watched", watched[0]), ("null", again[0])):
            figures[f"{name}_{clock}"] = overhead(bare[0], other, kinds(steps))
        figures[f"bare_ms_{clock}"] = (1e3 * float(np.median(bare[0])),)
    return figures


def main(argv: Sequence[str]) -> None:
    bench = parse(RunBench, argv, prog="hardviews bench run")
    if bench.device == "cpu":
        keep_freed_memory()
    if bench.threads > 0:
        torch.set_num_threads(bench.threads)
    figures = measure(bench)
    title = f"{bench.preset}, batch {bench.batch}, {FULL * bench.cycles} steps of each side"
    table = Table("", "CPU time", "by the clock", title=title)
    table.add_row("bare", *("{:,.1f} ms".format(*figures[f"bare_ms_{clock}"]) for clock in ("cpu", "wall")))
    rows = {"taken": "monitors, checkpoints", "watched": "a run with them", "null": "bare again"}
    for name, text in rows.items():
        table.add_row(text, *("{:+.1%} ({:+.1%} to {:+.1%})".format(*figures[f"{name}_{c}"]) for c in ("cpu", "wall")))
    table.caption = "shares of a bare step, a checkpoint every 100 steps; 95 % intervals"
    tables.print(table)
    if bench.json:
        print(json.dumps(figures))
