"""`hardviews bench run`: what checkpoints and monitors add to the steps of a run.

Two runs of the same preset live in one process and train by turns, a step each: one is bare (it streams, selects,
learns and writes the augmentation log), the other besides has every monitor, both loggers, and a checkpoint every 100
steps, whose writing in the background is waited for. Figures are medians over cycles of 100 steps: the time that
monitors and checkpoints took, and, as a check that nothing else got slower, the ratio of the two runs' times. On a
machine that is shared the ratio needs many cycles; the time taken is small and steady.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from jobs.run.command import Bar, parse, progress
from jobs.run.config import CheckpointConfig, DataConfig, MonitorConfig, PretrainConfig
from jobs.run.digits import write_digits
from jobs.run.folder import RunFolder
from jobs.run.presets import preset
from jobs.run.step import train_step
from jobs.run.training import Training, open_training, save
from jobs.run.world import World, pick_device
from shards.build import build, plan
from shards.engines import run_tasks
from shards.errors import InputError

CYCLE = 100  # steps between checkpoints and between health checks
WARM = 10  # steps of each side that are not measured


@dataclass(frozen=True)
class RunBench:
    """Measures what checkpointing every 100 steps and all monitors add to a training step."""

    preset: str = "synby-vit-tiny"
    """Preset to train, on scanned digits scaled to its image size."""
    batch: int = 64
    """Images per step."""
    cycles: int = 3
    """Times that 100 steps of each side are measured."""
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
    """The bare run and the watched one."""
    base = replace(
        preset(bench.preset),
        data=DataConfig(real=str(shards), threads=bench.threads),
        checkpoint=CheckpointConfig(every=CYCLE),
        steps=100 * CYCLE * (bench.cycles + 1),  # no end comes near
        batch=bench.batch,
    )
    bare = replace(base, monitor=MonitorConfig(bank=0, health_every=0, loggers=()))
    return {"bare": bare, "watched": replace(base, monitor=MonitorConfig(health_every=CYCLE))}


def take_step(t: Training, watched: bool) -> tuple[float, float]:
    """Seconds that the next step takes, as in `jobs.run.trainer.loop`; and those among them for watching and saving."""
    start = time.perf_counter()
    result = train_step(t, batch := next(t.stream))
    if t.world.device.type == "cuda":
        torch.cuda.synchronize()
    trained = time.perf_counter()
    if watched:
        t.monitor.after_step(t, batch, result)
        if t.step % CYCLE == 0:
            save(t)
            assert t.saver is not None
            t.saver.wait()
    end = time.perf_counter()
    return end - start, end - trained


def measure(bench: RunBench) -> dict[str, float]:
    """`overhead`: time for monitors and checkpoints as a share of the bare steps'; `ratio`: of the two runs' times;
    `bare_ms`, `watched_ms`, `added_ms`: of a step."""
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
            run.create(resume=False, overwrite=False)
            sides[name] = open_training(config, run, world, stack, resume=False)
            for _ in range(WARM):
                take_step(sides[name], name == "watched")
        bar = stack.enter_context(progress("measuring", 2 * CYCLE * bench.cycles, "steps"))
        cycles = [cycle(sides, bar) for _ in range(bench.cycles)]
    middle = {f"{name}_ms": 1e3 * statistics.median(c[name] for c in cycles) / CYCLE for name in cycles[0]}
    return {
        "overhead": statistics.median(c["added"] / c["bare"] for c in cycles),
        "ratio": statistics.median(c["watched"] / c["bare"] for c in cycles),
        **middle,
    }


def cycle(sides: dict[str, Training], bar: Bar) -> dict[str, float]:
    """Seconds of 100 steps of each side by turns, and those of the watched one for watching and saving (`added`)."""
    spent = dict.fromkeys([*sides, "added"], 0.0)
    for number in range(CYCLE):
        for name in sides if number % 2 else reversed(sides):
            whole, added = take_step(sides[name], name == "watched")
            spent[name] += whole
            spent["added"] += added
            bar.advance(1)
    return spent


def main(argv: Sequence[str]) -> None:
    bench = parse(RunBench, argv, prog="hardviews bench run")
    if bench.threads > 0:
        torch.set_num_threads(bench.threads)
    figures = measure(bench)
    table = Table("run", "ms a step", title=f"{bench.preset}, batch {bench.batch}, {bench.cycles} × {CYCLE} steps")
    table.add_row("bare", f"{figures['bare_ms']:,.1f}")
    table.add_row("with monitors and a checkpoint every 100 steps", f"{figures['watched_ms']:,.1f}")
    table.add_row("  of it monitors and checkpoints", f"{figures['added_ms']:,.1f}")
    table.caption = f"overhead {figures['overhead']:.1%}; ratio of the two runs {figures['ratio']:.3f}"
    Console().print(table)
    if bench.json:
        print(json.dumps(figures))
