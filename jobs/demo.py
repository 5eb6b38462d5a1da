"""`hardviews demo`: the whole system on real images, in minutes on two cores, by the jobs that users run one by one."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jobs.analyse import analyse
from jobs.benches.digits import split_folder, write_digits
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.evaluation.backbones import ModelConfig
from jobs.export import export
from jobs.generate import GenerateConfig
from jobs.generate import run as generate
from jobs.pretrain import pretrain
from jobs.report import write_report
from jobs.run.config import CheckpointConfig, DataConfig, MonitorConfig, PretrainConfig, ViewsConfig, load_config
from jobs.run.folder import RunFolder, write_json
from jobs.run.metrics import read_metrics
from jobs.run.presets import HARDEST_OF_4, RANDOM_PAIR, preset
from jobs.run.terminal import check_least, console, note, parse, tables
from jobs.studies.plan import differences
from jobs.studies.ready import DIGIT_VIEWS
from jobs.sweep import VALIDATION, scores_of
from jobs.training.verdict import ADVICE
from models.backbones import BackboneConfig
from models.negatives import NONE
from models.objectives import MoBYConfig
from models.selection import SelectionConfig
from shards.errors import InputError
from shards.generation.pixels import confirmed, read_images
from shards.generation.request import TrainSettings
from shards.manifest import Manifest, open_manifest

MINUTES = 6 / 960  # a step, on two cores with bf16 units
SHARD_SAMPLES = 200  # several shards even of a small data set, so that shuffling has something to shuffle
CONFIRMED = 2 / 3  # share of a clone's classes that a kNN has to confirm before it is trained on
SMALL = 40  # pixels a side up to which images get views of 32
CLONED = 16  # pixels a side up to which minutes of diffusion training draw more than mush
PRETRAINED = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DIFFUSION = TrainSettings(seconds=None)
# A step with hard views scores four views before it trains on two: about the time of two plain ones. The number is
# fixed, so that what is learned does not depend on the machine.
SAME_TIME = 2
GRAY_VIEWS = ViewsConfig("small", saturation=0, hue=0, gray=0)
COLOUR_VIEWS = ViewsConfig("small")
NAMES = {
    "raw": "raw pixels",
    "untrained": "untrained",
    "random": "random pairs",
    "hard": "hard views, as many steps",
    "random_same_time": "random pairs, as much time",
}


@dataclass(frozen=True)
class DemoConfig:
    """Builds shards of real images, clones them with a diffusion model, pretrains a small ViT with random pairs and
    with hard views, and reports what each learned. Run again, it goes on where it was stopped."""

    images: Path | None = None
    """ImageFolder to use (a folder of images per class); by default the scanned digits that ship in scikit-learn."""
    out: Path = Path("runs/demo")
    """Folder for everything the demo makes."""
    steps: int = 240
    """Pretraining steps of 128 images with random pairs and with hard views; random pairs are trained for twice as many
    steps besides, about the time that hard views take."""
    diffusion_steps: int = 400
    """Training steps of the diffusion model, of 128 images."""
    seed: int = 0
    """Seed of the clone and of all training; the same seed gives the same figures on the same kind of machine."""


@dataclass(frozen=True)
class Arm:
    """One of the runs that are compared."""

    selection: SelectionConfig
    steps: int


@dataclass(frozen=True)
class Setting:
    """What suits the images: the views, their side and a ViT's patches (pixels), a clone, and why."""

    views: ViewsConfig
    side: int
    patch: int
    cloned: int
    """Pixels a side at which a clone is drawn, as many as the images have; 0 = none is."""
    reason: str


def demo(config: DemoConfig) -> Path:
    """Runs all jobs in turn and returns the report's path.

    Raises:
        InputError: no such folder, images that cannot be used, or a folder that holds a demo with other settings.
    """
    start = time.perf_counter()
    out, arms = config.out, arms_of(config.steps)
    out.mkdir(parents=True, exist_ok=True)
    steps = sum(arm.steps for arm in arms.values())
    note(
        f"Builds shards and, of small images, a synthetic clone; trains a small ViT without labels three times, with "
        f"random pairs of views and with hard ones, {steps:,} steps of 128 images in all; then measures and reports. "
        f"About {1 + MINUTES * steps:.0f} min on two free cores."
    )
    heading(1, "real images, as shards")
    if config.images is None:
        write_digits(out / "images")
    else:
        split_folder(config.images, out / "images")
    real, test = (
        build(BuildConfig(f"imagefolder:{out / 'images' / part}", out / "shards" / name, shard_samples=SHARD_SAMPLES))
        for part, name in (("train", "real"), ("test", "test"))
    )
    setting = digits_setting() if config.images is None else folder_setting(real)
    note(f"{len(real):,} images to learn from, {len(test):,} held out. {setting.reason}")
    heading(2, "a synthetic clone from a diffusion model")
    cloned = make_clone(config, real, setting)
    configs = {name: arm_config(config, arm, setting, cloned) for name, arm in arms.items()}
    for number, (name, arm_settings) in enumerate(configs.items(), 3):
        heading(number, f"pretraining: {NAMES[name]}, {arm_settings.steps} steps")
        train_arm(arm_settings, out / name)
    heading(6, "kNN and linear accuracy, analysis of the choices, report")
    results = measure(out, configs)
    export(out / "hard")
    analysis = analyse(out / "hard", pairs=30_000)
    report = write_report([out / name for name in configs], out / "report.html")
    results["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "demo.json", results)
    tables.print(table(results))
    for line in in_words(results, analysis):
        note(line)
    note(f"The report is {report}, the figures are in {out / 'demo.json'}; {results['seconds']:.0f} s in all.")
    return report


def arms_of(steps: int) -> dict[str, Arm]:
    """The arms by their key in demo.json."""
    return {
        "random": Arm(RANDOM_PAIR, steps),
        "hard": Arm(HARDEST_OF_4, steps),
        "random_same_time": Arm(RANDOM_PAIR, SAME_TIME * steps),
    }


def digits_setting() -> Setting:
    """For the scanned digits."""
    return Setting(
        DIGIT_VIEWS,
        32,
        8,
        8,
        "Views for digits: crops from half of the area, brightness and contrast; no mirror images.",
    )


def folder_setting(real: Manifest) -> Setting:
    """For a folder of one's own, by the size and the colours of its images."""
    columns = real.columns(np.arange(min(len(real), 1000)))
    short = int(np.median(np.minimum(columns.height, columns.width)))
    sample, _ = read_images(real, 32, 200)
    gray = bool((sample == sample[..., :1]).all())
    side, patch = (32, 8) if short <= SMALL else (64, 16)
    cloned = 4 * max(2, math.ceil(short / 4)) if short <= CLONED else 0
    colours = "gray: no jitter of colours" if gray else "in colour: jitter of colours, some views gray"
    reason = (
        f"They are about {short} pixels a side and {colours}. Views of {side} pixels by policy `small`: crops from a "
        f"fifth of the area, mirror images, no blur."
    )
    return Setting(GRAY_VIEWS if gray else COLOUR_VIEWS, side, patch, cloned, reason)


def make_clone(config: DemoConfig, real: Manifest, setting: Setting) -> bool:
    """Trains the diffusion model and samples a clone with the same count per class; returns whether it may be trained
    on: where a kNN on the real images confirms its classes."""
    shards = config.out / "shards"
    other = (
        f"A pretrained text-to-image pipeline draws a better one, for `hardviews pretrain --data.synthetic`: hardviews "
        f"generate --pipeline {PRETRAINED} --like {shards / 'real'} --out {shards / 'pretrained'}"
    )
    if not setting.cloned:
        note(f"None: minutes of training draw no images of this size, so only real ones are trained on. {other}")
        return False
    generate(
        GenerateConfig(
            pipeline=str(config.out / "diffusion"),
            like=str(shards / "real"),
            out=shards / "synthetic",
            train_on=str(shards / "real"),
            train=replace(DIFFUSION, side=setting.cloned, steps=config.diffusion_steps, seed=config.seed),
            seed=config.seed,
            batch=200,
            shard_samples=SHARD_SAMPLES,
        )
    )
    clone = open_manifest(shards / "synthetic")
    share = confirmed(*read_images(clone, setting.cloned), *read_images(real, setting.cloned))
    good = share >= CONFIRMED
    note(
        f"A kNN on the real images confirms the class of {share:.1%} of {len(clone):,} synthetic images; "
        + ("half of what is trained on is synthetic." if good else f"too few, so they are not trained on. {other}")
    )
    return good


def arm_config(config: DemoConfig, arm: Arm, setting: Setting, cloned: bool) -> PretrainConfig:
    """MoBY on a small ViT, with the arm's pairs and steps; half of the images synthetic where there is a clone."""
    shards = config.out / "shards"
    base = preset("synby-vit-tiny")
    assert isinstance(base.objective, MoBYConfig)
    every = max(1, arm.steps // 6)
    return replace(
        base,
        data=DataConfig(
            real=(str(shards / "real"),),
            synthetic=(str(shards / "synthetic"),) if cloned else (),
            synthetic_share=0.5,
        ),
        views=setting.views,
        selection=arm.selection,
        # Synthetic negatives are mixed from embeddings, which so short a run has only towards its end.
        objective=replace(base.objective, negatives=NONE),
        backbone=backbone(base.backbone, setting),
        monitor=MonitorConfig(
            every=5,
            health_every=min(40, every),
            knn_every=every,
            knn_train=str(shards / "real"),
            knn_test=str(shards / "test"),
        ),
        checkpoint=CheckpointConfig(every=every),
        steps=arm.steps,
        seed=config.seed,
    )


def backbone(base: BackboneConfig, setting: Setting) -> BackboneConfig:
    """The preset's ViT for views of the setting's side: 16 tokens at either size."""
    return replace(base, image_size=setting.side, patch_size=setting.patch)


def train_arm(config: PretrainConfig, run: Path) -> None:
    """Trains, or goes on where an earlier demo was stopped.

    Raises:
        InputError: the folder holds a run with other settings.
        KeyboardInterrupt: it was interrupted.
    """
    kept = RunFolder(run).config
    if kept.is_file() and (other := differences(config, load_config(kept))):
        raise InputError(
            f"out: {run} was begun with other settings ({', '.join(other)}); give them again, or another --out"
        )
    if pretrain(config, run, resume=kept.is_file()) != "finished":
        raise KeyboardInterrupt


def measure(out: Path, configs: dict[str, PretrainConfig]) -> dict[str, Any]:
    """kNN and linear accuracy (0 to 1) of pixels, untrained features and each arm; loss, verdict, steps and seconds of
    training of each arm."""
    first = out / next(iter(configs))
    models = {
        "raw": ModelConfig(run=first, pixels=True, size=32),
        "untrained": ModelConfig(run=first, untrained=True),
        **{name: ModelConfig(run=out / name) for name in configs},
    }
    train, test = (str(out / "shards" / part) for part in ("real", "test"))
    settings = {"train": train, "test": test, "probe_epochs": 50, "validation": VALIDATION}
    scores = {name: scores_of(model, settings) for name, model in models.items()}
    results: dict[str, Any] = {
        measure: {name: own[measure] for name, own in scores.items()} for measure in ("knn", "linear")
    }
    folders = {name: RunFolder(out / name) for name in configs}
    metrics = {name: read_metrics(folder.metrics) for name, folder in folders.items()}
    results["loss"] = {name: losses(metrics[name]) for name in configs}
    results["verdict"] = {name: folder.read_state()["verdict"] for name, folder in folders.items()}
    results["arms"] = {
        name: {"steps": config.steps, "seconds": training_seconds(metrics[name])} for name, config in configs.items()
    }
    return results


def losses(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """First and last logged loss, and its chance level."""
    logged = [line for line in metrics if "train/loss" in line]
    first, last = logged[0], logged[-1]
    return {"start": first["train/loss"], "end": last["train/loss"], "chance": last["train/chance"]}


def training_seconds(metrics: Sequence[dict[str, Any]]) -> float:
    """Seconds of training steps, also of a run that was stopped in between."""
    seconds, before = 0.0, 0
    for line in metrics:
        if "time/step" in line:
            seconds += line["time/step"] * (line["step"] - before)
            before = line["step"]
    return round(seconds, 1)


def table(results: dict[str, Any]) -> Table:
    """The closing table."""
    grid = Table("", "kNN", "linear", "steps", "training", "loss (chance)", "verdict")
    for name in results["knn"]:
        cells = [NAMES[name], f"{results['knn'][name]:.1%}", f"{results['linear'][name]:.1%}"]
        if name in results["arms"]:
            arm, loss = results["arms"][name], results["loss"][name]
            cells += [f"{arm['steps']:,}", f"{arm['seconds']:.0f} s"]
            cells += [f"{loss['start']:.1f} → {loss['end']:.1f} ({loss['chance']:.1f})"]
            cells.append(results["verdict"][name])
        grid.add_row(*cells)
    return grid


def in_words(results: dict[str, Any], analysis: dict[str, Any]) -> list[str]:
    """What the table shows, for someone who sees such figures for the first time."""
    knn, arms = results["knn"], results["arms"]
    cost = (arms["hard"]["seconds"] / arms["hard"]["steps"]) / (arms["random"]["seconds"] / arms["random"]["steps"])
    lines = [
        "kNN and linear: share of held-out images whose class is found from the features, by the most similar training "
        "images and by a linear layer. The pretraining itself saw no class.",
        f"Hard views: of four views the pair with the largest loss trains. It is the pair that overlaps least in "
        f"{analysis['lowest_iou_share']:.1%} of images, by chance {analysis['chance']:.1%}.",
        f"In as many steps, hard views are {points(knn['hard'] - knn['random'])} random pairs (kNN). A step costs "
        f"{cost:.1f} plain ones: in about as much time, they are "
        f"{points(knn['hard'] - knn['random_same_time'])} random pairs.",
    ]
    if knn["raw"] > max(knn[name] for name in arms):
        lines.append(
            "Raw pixels are better still: these classes differ in their pixels already, and the runs are short."
        )
    for name, verdict in results["verdict"].items():
        if advice := ADVICE.get(verdict):
            lines.append(f"The run with {NAMES[name]} is {verdict}: {advice}.")
    lines.append(what_helps(results))
    return lines


def what_helps(results: dict[str, Any]) -> str:
    """What to do next, by the verdicts."""
    steps = results["arms"]["random"]["steps"]
    if all(verdict == "learning" for verdict in results["verdict"].values()):
        return f"What would help: more steps (--steps {4 * steps:,}), as all runs were learning when they ended."
    return (
        f"What would help: more steps (--steps {4 * steps:,}; a small ViT needs some hundreds before it learns), other "
        f"views for these images, or weights to start from (`hardviews pretrain --init NAME`)."
    )


def points(difference: float) -> str:
    """A difference of two shares in words."""
    return f"{abs(100 * difference):.1f} points {'above' if difference >= 0 else 'below'}"


def heading(number: int, text: str) -> None:
    console.print(f"\n{number}/6 {text}", style="bold", highlight=False)


def main(argv: Sequence[str]) -> None:
    """Entry point of `hardviews demo`."""
    config = parse(DemoConfig, argv, prog="hardviews demo")
    check_least(config, steps=1, diffusion_steps=1)
    demo(config)
