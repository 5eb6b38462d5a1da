"""`hardviews sweep`: a study of several runs; finished ones are skipped, unfinished ones resumed."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jobs.evaluation import linear, protocols
from jobs.evaluation.backbones import ModelConfig
from jobs.pretrain import pretrain
from jobs.run.command import console, parse
from jobs.run.folder import RunFolder, write_json
from jobs.run.presets import PRESETS, preset
from jobs.run.studies import STUDIES, Member, arms_of, changed, members
from shards.errors import InputError


@dataclass(frozen=True)
class SweepConfig:
    """Runs a study: arms × seeds, each into its own run folder, then kNN and a linear probe, a table and a plot."""

    study: tyro.conf.Positional[str]
    """A ready-made study (cifar10-study), or a preset that --axis varies."""
    real: str
    """Shards to pretrain on; kNN and linear probe learn from them too."""
    test: str
    """Held-out shards or ImageFolder to score on."""
    out: Path
    """Folder for the run folders, results.json, the table and the plot."""
    synthetic: str = ""
    """Shards of synthetic images to mix in; empty = none."""
    axis: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An axis as field=value,value (repeat the flag for more): every combination is an arm."""
    change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field=value that all arms share, such as backbone.width=64 (repeat the flag for more)."""
    seeds: int = 3
    """Runs per arm."""
    epochs: float | None = None
    """Length of every run (epochs); None = the study's own."""
    steps: int | None = None
    """Length of every run (steps); overrides epochs."""
    batch: int | None = None
    """Images per step; None = the study's own."""
    arms: tuple[str, ...] = ()
    """Only these arms; none = all."""
    minutes: float = 0.0
    """Stop with a checkpoint after so many minutes; the same command goes on from there. 0 = run to the end."""
    probe_epochs: int = 30
    """Epochs of the linear probe on frozen features; 0 = no probe."""


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Runs what is missing and returns the results so far.

    Raises:
        InputError: no such study, preset, arm or field.
    """
    planned = plan(config)
    config.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with time_limit(config.minutes) as spent:
        for number, member in enumerate(planned, 1):
            folder = config.out / member.name
            console.print(f"[bold]{number}/{len(planned)} {member.name}[/bold]", highlight=False)
            if spent.is_set() or not complete(member, folder):
                break
            results[member.name] = {"arm": member.arm, **scores(config, folder)}
            write_json(config.out / "results.json", results)
    if results:
        summary = summarise(results)
        write_json(config.out / "results.json", {**results, "summary": summary})
        plot(summary, config.out / "results.png")
    if len(results) < len(planned):
        console.print(f"{len(results)} of {len(planned)} runs are finished; the same command goes on with the rest")
    return results


def plan(config: SweepConfig) -> list[Member]:
    """The runs of the study."""
    if config.study in STUDIES:
        make, arms = STUDIES[config.study]
        base = make(config.real, config.test)
        if config.axis:
            raise InputError(f"axis: {config.study} has its own arms; give a preset to vary")
    elif config.study in PRESETS:
        base, arms = preset(config.study), arms_of(config.axis)
    else:
        raise InputError(f"study: {config.study!r} is not known; choose one of {', '.join([*STUDIES, *PRESETS])}")
    data = replace(base.data, real=config.real, synthetic=config.synthetic)
    monitor = replace(base.monitor, knn_train=config.real, knn_test=config.test)
    base = replace(base, data=data, monitor=monitor)
    lengths = {name: getattr(config, name) for name in ("epochs", "steps", "batch")}
    base = replace(base, **{name: value for name, value in lengths.items() if value is not None})
    for changes in arms_of(config.change).values():
        base = changed(base, changes)
    if unknown := set(config.arms) - set(arms):
        raise InputError(f"arms: {', '.join(sorted(unknown))} unknown; this study has {', '.join(arms)}")
    return members(base, {arm: c for arm, c in arms.items() if not config.arms or arm in config.arms}, config.seeds)


def complete(member: Member, folder: Path) -> bool:
    """Whether the run is finished, after running it or going on with it where it is not."""
    state = RunFolder(folder).read_state().get("state")
    if state == "finished":
        return True
    return pretrain(member.config, folder, resume=(folder / "config.json").is_file()) == "finished"


def scores(config: SweepConfig, folder: Path) -> dict[str, float]:
    """kNN and linear top-1 of a finished run; kept in the run folder and not computed twice."""
    kept = folder / "evaluation" / "sweep.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    common: dict[str, Any] = {"model": ModelConfig(run=folder), "train": config.real, "test": config.test}
    found = {"knn": protocols.evaluate_knn(protocols.KnnConfig(**common))["scores"]["top1"]}
    if config.probe_epochs:
        sgd = replace(linear.LinearConfig(), epochs=config.probe_epochs)
        probe = protocols.LinearProbeConfig(**common, sgd=sgd, augment=False)
        found["linear"] = protocols.evaluate_linear(probe)["scores"]["top1"]
    write_json(kept, found)
    return found


def summarise(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """arm → measure → mean, deviation over seeds, number of seeds."""
    summary: dict[str, dict[str, Any]] = {}
    for result in results.values():
        for measure, value in result.items():
            if measure != "arm":
                summary.setdefault(result["arm"], {}).setdefault(measure, []).append(value)
    return {
        arm: {
            measure: {
                "mean": float(np.mean(values)),
                "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "seeds": len(values),
            }
            for measure, values in measures.items()
        }
        for arm, measures in summary.items()
    }


def plot(summary: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean and deviation of each measure by arm, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = sorted({measure for arm in summary.values() for measure in arm})
    figure, axes = pyplot.subplots(
        1, len(measures), figsize=(4.5 * len(measures), 0.5 * len(summary) + 1.6), squeeze=False
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        arms = [arm for arm in summary if measure in summary[arm]]
        means = [100 * summary[arm][measure]["mean"] for arm in arms]
        spreads = [100 * (summary[arm][measure]["deviation"] or 0.0) for arm in arms]
        axis.errorbar(means, range(len(arms)), xerr=spreads, fmt="o", capsize=3)
        axis.set_yticks(range(len(arms)), arms)
        axis.invert_yaxis()
        axis.set_xlabel(f"{measure} top-1 (%)")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@contextmanager
def time_limit(minutes: float) -> Iterator[threading.Event]:
    """An event that is set when the time is up; training is then told to stop with a checkpoint, as by SIGTERM."""
    spent = threading.Event()

    def stop() -> None:
        spent.set()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: spent.set()) if minutes > 0 else None
    timer = threading.Timer(60 * minutes, stop) if minutes > 0 else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield spent
    finally:
        if timer is not None:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)


def show(results: dict[str, Any]) -> None:
    """The table of means and deviations, on stdout."""
    summary = summarise(results)
    measures = sorted({measure for arm in summary.values() for measure in arm})
    table = Table("arm", *(f"{measure} top-1" for measure in measures), "seeds")
    for arm, found in summary.items():
        cells = []
        for measure in measures:
            value = found.get(measure)
            spread = "" if value is None or value["deviation"] is None else f" ± {100 * value['deviation']:.1f}"
            cells.append("–" if value is None else f"{100 * value['mean']:.1f}{spread} %")
        table.add_row(arm, *cells, str(max(value["seeds"] for value in found.values())))
    Console().print(table)


def main(argv: Sequence[str]) -> None:
    """Entry point of `hardviews sweep`."""
    config = parse(SweepConfig, argv, prog="hardviews sweep")
    results = sweep(config)
    if results:
        show(results)
        print(config.out / "results.png")
