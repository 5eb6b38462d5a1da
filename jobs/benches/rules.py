"""`hardviews bench rules`: what a step costs by each rule of choice of the study `cost-small`, by turns in one run.

Every rule trains on the digits in a run of its own; the runs take turns of eight steps, in which those that score every
k-th step score as often as in a long run. A step is all of it: making the views, choosing, learning, the log. Where
others use the machine, the CPU time of this process is steadier than the clock.
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
from rich.table import Table

from jobs.benches.digits import write_digits
from jobs.run.config import DataConfig, MonitorConfig, PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.process import keep_freed_memory
from jobs.run.terminal import parse, progress, tables
from jobs.run.world import World, pick_device
from jobs.studies.plan import changed
from jobs.studies.ready import RULES, digits
from jobs.training.opening import open_training
from jobs.training.state import Training
from jobs.training.step import train_step
from shards.build import build, plan
from shards.engines import run_tasks
from shards.errors import InputError

TURN = 8  # steps
VIEWS = 2  # that train


@dataclass(frozen=True)
class RulesBench:
    """Measures a step by each rule of choice against one on random pairs."""

    width: int = 64
    """Of the ViT."""
    depth: int = 2
    """Blocks of the ViT."""
    batch: int = 128
    """Images per step."""
    rounds: int = 5
    """Turns of eight steps of each rule."""
    threads: int = 1
    """CPU threads of torch."""
    precision: str = "fp32"
    """fp32 or bf16."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "batch", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be at least 1")


def configs(bench: RulesBench, shards: Path) -> dict[str, PretrainConfig]:
    """A run for each rule; no end comes near."""
    base = digits()
    backbone = replace(base.backbone, width=bench.width, depth=bench.depth, heads=max(1, bench.width // 32))
    base = replace(
        base,
        data=DataConfig(real=(str(shards),), threads=1, prefetch=1),
        backbone=backbone,
        monitor=MonitorConfig(bank=0, health_every=0, loggers=()),
        steps=100 * TURN * (bench.rounds + 1),
        batch=bench.batch,
    )
    return {rule: changed(base, {**changes, "precision": bench.precision}) for rule, changes in RULES.items()}


def forward_units(t: Training) -> float:
    """Forward passes of a step beside those of a step on random pairs, a backward pass counting as two: the online
    encoder's over the pair with their backward passes, the target's, and what scoring adds, by its area in pixels."""
    selection, target = t.config.selection, t.objective.target is not None
    plain = VIEWS * (3 + target)
    if selection.rule in ("random", "lowest-iou"):
        return 1.0
    area = ((selection.resolution or t.config.backbone.image_size) / t.config.backbone.image_size) ** 2
    scored = selection.views * area * ((selection.encoder == "online") + target)
    reused = VIEWS * t.objective.reuses_features(selection, t.world.device)
    return 1 + (scored - reused) / selection.every / plain


def take_turn(t: Training) -> tuple[float, float]:
    """Milliseconds of a step: of the CPU time of all threads, and by the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    for _ in range(TURN):
        train_step(t, next(t.stream))
    if t.world.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.process_time() - cpu) / TURN, 1e3 * (time.perf_counter() - clock) / TURN


def measure(bench: RulesBench) -> dict[str, dict[str, float]]:
    """Figures by rule: `cpu_ms` and `clock_ms` of a step, medians over turns; `cpu` and `clock`, medians of the ratios
    to the random pairs' turn of the same round, with `cpu_low` and `cpu_high`, the least and the greatest; `units`,
    forward passes beside those of a step on random pairs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hardviews-bench-")))
        write_digits(folder / "images")
        tasks = partial(run_tasks, "local", workers=1, address=None)
        shards = folder / "shards"
        build(plan(f"imagefolder:{folder / 'images' / 'train'}", shards, tasks), "real", tasks)
        world = World(0, 1, pick_device(bench.device))
        sides = {
            rule: open_training(config, RunFolder(folder / rule), world, stack, resume=False)
            for rule, config in configs(bench, shards).items()
        }
        bar = stack.enter_context(progress("measuring", bench.rounds, "rounds"))
        turns: dict[str, list[tuple[float, float]]] = {rule: [] for rule in sides}
        for number in range(-1, bench.rounds):  # the first turns have work that comes once
            for rule, t in sides.items():
                taken = take_turn(t)
                if number >= 0:
                    turns[rule].append(taken)
            if number >= 0:
                bar.advance(1)
        units = {rule: forward_units(t) for rule, t in sides.items()}
    figures: dict[str, dict[str, float]] = {}
    for rule, own in turns.items():
        pairs = list(zip(own, turns["random"], strict=True))
        cpu, clock = ([mine[c] / plain[c] for mine, plain in pairs] for c in (0, 1))
        figures[rule] = {
            "cpu_ms": statistics.median(mine[0] for mine in own),
            "clock_ms": statistics.median(mine[1] for mine in own),
            "cpu": statistics.median(cpu),
            "cpu_low": min(cpu),
            "cpu_high": max(cpu),
            "clock": statistics.median(clock),
            "units": units[rule],
        }
    return figures


def main(argv: Sequence[str]) -> None:
    bench = parse(RulesBench, argv, prog="hardviews bench rules")
    if bench.device == "cpu":
        keep_freed_memory()
    torch.set_num_threads(bench.threads)
    figures = measure(bench)
    title = f"ViT of width {bench.width}, depth {bench.depth}, batch {bench.batch}, {bench.precision}"
    table = Table("rule", "CPU time", "of random pairs", "by the clock", "forward units", title=title)
    for rule, own in figures.items():
        spread = f"{own['cpu']:.2f} ({own['cpu_low']:.2f} to {own['cpu_high']:.2f})"
        table.add_row(rule, f"{own['cpu_ms']:,.0f} ms", spread, f"{own['clock']:.2f}", f"{own['units']:.2f}")
    table.caption = f"medians of {bench.rounds} turns of {TURN} steps, with the least and the greatest"
    tables.print(table)
    if bench.json:
        print(json.dumps(figures))
