"""`hardviews demo`: the whole system on real images, in minutes on two cores, by the jobs that users run one by one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jobs.analyse import analyse
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.export import export
from jobs.generate import GenerateConfig
from jobs.generate import run as generate
from jobs.pretrain import pretrain
from jobs.report import write_report
from jobs.run.command import console, parse, tables
from jobs.run.config import CheckpointConfig, DataConfig, MonitorConfig, PretrainConfig
from jobs.run.digits import split_folder, write_digits
from jobs.run.metrics import read_metrics
from jobs.run.presets import preset
from shards.errors import InputError
from shards.manifest import Manifest, open_manifest
from shards.pixels import confirmed, read_images
from shards.synthetic import TrainSettings

SHARD_SAMPLES = 200  # several shards even of a small data set, so that shuffling has something to shuffle


@dataclass(frozen=True)
class DemoConfig:
    """Builds shards of real images, clones them with a diffusion model, pretrains a small ViT on both with hard views,
    analyses the choices and writes a report. Run again, it goes on where it was stopped."""

    images: Path | None = None
    """ImageFolder to use (a folder of images per class); by default the scanned digits that ship in scikit-learn."""
    out: Path = Path("runs/demo")
    """Folder for everything the demo makes."""
    steps: int = 240
    """Pretraining steps of 128 images."""
    diffusion_steps: int = 500
    """Training steps of the diffusion model, of 128 images, within 90 seconds."""


def demo(config: DemoConfig) -> Path:
    """Runs all jobs in turn and returns the report's path.

    Raises:
        InputError: no such folder, or images that cannot be used.
    """
    start = time.perf_counter()
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    heading(1, "real images")
    if config.images is None:
        write_digits(out / "images")
    else:
        split_folder(config.images, out / "images")
    heading(2, "shards")
    real, test = (
        build(BuildConfig(f"imagefolder:{out / 'images' / part}", out / "shards" / name, shard_samples=SHARD_SAMPLES))
        for part, name in (("train", "real"), ("test", "test"))
    )
    heading(3, "a synthetic clone from a diffusion model")
    clone, confirmation = make_clone(config)
    console.print(f"a kNN on the real images confirms the class of {confirmation:.1%} of the clone")
    heading(4, "pretraining with hard views and synthetic negatives, kNN before and after")
    run = out / "run"
    resume = (run / "config.json").is_file()
    if pretrain(pretrain_config(config), run, resume=resume) != "finished":
        raise KeyboardInterrupt
    heading(5, "export and analysis of the augmentation log")
    export(run)
    analysis = analyse(run, pairs=30_000)
    heading(6, "report")
    report = write_report([run], out / "report.html")
    facts = summary(run, analysis)
    facts |= {
        "real images": f"{len(real):,} to train, {len(test):,} held out",
        "synthetic images": f"{len(clone):,}, class confirmed by kNN in {confirmation:.1%}",
        "shards": f"{len(real.entries)} real, {len(clone.entries)} synthetic, {len(test.entries)} held out",
        "report": str(report),
        "time": f"{time.perf_counter() - start:.0f} s",
    }
    table(facts)
    return report


def make_clone(config: DemoConfig) -> tuple[Manifest, float]:
    """Trains the diffusion model, samples a clone with the same count per class, and has a kNN judge its classes."""
    shards = config.out / "shards"
    settings = TrainSettings(side=8, seconds=90.0, steps=config.diffusion_steps)
    generate(
        GenerateConfig(
            pipeline=str(config.out / "diffusion"),
            like=str(shards / "real"),
            out=shards / "synthetic",
            train_on=str(shards / "real"),
            train=settings,
            batch=200,
            shard_samples=SHARD_SAMPLES,
        )
    )
    clone = open_manifest(shards / "synthetic")
    judged = confirmed(*read_images(clone, settings.side), *read_images(open_manifest(shards / "real"), settings.side))
    return clone, judged


def pretrain_config(config: DemoConfig) -> PretrainConfig:
    """SynBY with the hardest of four views' pairs, half real and half synthetic, on a small ViT."""
    shards = config.out / "shards"
    every = max(1, config.steps // 6)
    return replace(
        preset("synby-vit-tiny"),
        data=DataConfig(real=str(shards / "real"), synthetic=str(shards / "synthetic"), synthetic_share=0.5),
        monitor=MonitorConfig(
            every=5, health_every=40, knn_every=every, knn_train=str(shards / "real"), knn_test=str(shards / "test")
        ),
        checkpoint=CheckpointConfig(every=every),
        steps=config.steps,
    )


def summary(run: Path, analysis: dict) -> dict[str, str]:
    """What the run's own files say: speed, kNN at both ends, choices beside chance."""
    metrics = read_metrics(run / "metrics.jsonl")
    knn = [line["knn/top1"] for line in metrics if "knn/top1" in line]
    speeds = sorted(line["train/images_per_second"] for line in metrics if "train/images_per_second" in line)
    return {
        "images/s": f"{speeds[len(speeds) // 2]:,.0f} (4 views each, median)",
        "kNN before → after": f"{knn[0]:.1%} → {knn[-1]:.1%}",
        "chosen pair has lowest IoU": f"{analysis['lowest_iou_share']:.1%}, chance {analysis['chance']:.1%}",
    }


def heading(number: int, text: str) -> None:
    console.print(Text(f"\n{number}/6 {text}", style="bold"))


def table(facts: dict[str, str]) -> None:
    """The closing table, on stdout."""
    order = (
        "real images",
        "synthetic images",
        "shards",
        "images/s",
        "kNN before → after",
        "chosen pair has lowest IoU",
    )
    grid = Table(show_header=False)
    for name in (*order, "time", "report"):
        grid.add_row(name, facts[name])
    tables.print(grid)


def main(argv: Sequence[str]) -> None:
    """Entry point of `hardviews demo`."""
    config = parse(DemoConfig, argv, prog="hardviews demo")
    if config.steps < 1:
        raise InputError(f"steps: {config.steps} must be at least 1")
    demo(config)
