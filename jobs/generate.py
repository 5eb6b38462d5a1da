"""`hardviews generate`: a synthetic clone of a data set from a diffusion pipeline, with the same count per class."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.run.terminal import console, parse, progress, warn
from shards.engines import run_tasks
from shards.errors import InputError
from shards.generation.pixels import read_images
from shards.generation.request import Request, TrainSettings
from shards.generation.synthetic import Runner, Task, generate, match_counts, plan
from shards.manifest import QUARANTINE_NAME, Manifest, open_manifest
from shards.writer import ShardResult


@dataclass(frozen=True)
class GenerateConfig:
    """Draws images from a diffusers pipeline into the shards that --out does not hold yet.

    A generation that was stopped goes on when it is run again. Each image has its own recorded seed. On a CPU the same
    flags give the same images whatever the engine, the workers, --shard-samples and the number of reruns; on a GPU they
    do on the same kind of GPU with the same versions. Another --batch changes results in the last bits.
    """

    pipeline: str
    """Folder that diffusers saved, or a hub name (owner/name or owner/name@revision, downloaded): class-conditional
    (DiT, and what --train-on writes) or text-to-image. Only safetensors are read; code from a hub is never run."""
    like: str
    """Shards to clone: the result has the same classes and counts. Folder or address."""
    out: Path
    """Folder for the shards."""
    train_on: str | None = None
    """Train a small class-conditional pipeline on these shards first and save it in the folder --pipeline. One that is
    there from an earlier run is used as it is."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Settings of the training that --train-on asks for."""
    count: int | None = None
    """Images in all, in the proportions of --like; by default as many as --like has."""
    per_class: int | None = None
    """Images of each class, instead of --count."""
    steps: int = 25
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale: higher follows the class or prompt more closely, with less variety. By default the pipeline's own
    (1.5 for one from --train-on)."""
    prompt: str = "a photo of a {class}"
    """Prompt for text-to-image pipelines; {class} is replaced by the class name (WordNet ids of ImageNet by words)."""
    class_names: Path | None = None
    """JSON object that maps class names of --like to names that the pipeline or the prompt knows; names that are not in
    it stay as they are."""
    size: int | None = None
    """Resize images to this side, in pixels; by default they keep the pipeline's size."""
    seed: int = 0
    """Each image's own seed follows from this one and the image's number."""
    batch: int = 32
    """Images drawn at a time."""
    format: Literal["png", "jpg", "webp"] = "png"
    """File format of the images."""
    quality: int | None = None
    """Quality of JPEG and WebP, 1 to 100 (default 95)."""
    source: str = "synthetic"
    """Tag of these images in manifests, logs and reports."""
    shard_samples: int = 1000
    """Images per shard."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the pipeline runs; auto takes cuda where this machine has it, also when Ray's workers differ from it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights; auto is bf16 on cuda and fp32 on the CPU."""
    engine: Literal["local", "ray"] = "local"
    """This process, or tasks of a Ray cluster that sees the same folders: one per shard, on cuda with a GPU each."""
    workers: int | None = None
    """Ray tasks at a time; by default as many as the cluster has room for."""
    address: str | None = None
    """Address of the Ray cluster; by default Ray is started on this machine."""
    overwrite: bool = False
    """Replace shards in --out that another request made, and remove surplus ones."""


def run(config: GenerateConfig) -> Manifest:
    """Trains if asked to, then generates, with progress bars; prints the result."""
    like = open_manifest(config.like)
    counts = match_counts(like, config.count, config.per_class)
    names = class_names(config.class_names, like.classes)
    check_engine(config)

    # Below this line only: it takes seconds to import.
    from shards.generation.diffusion import class_of, default_device, default_precision, fingerprint, locate

    device = default_device() if config.device == "auto" else config.device
    if config.train_on is not None:
        train_into(Path(config.pipeline), config.train_on, config.train, device)
    folder = locate(config.pipeline)
    request = Request(
        pipeline=str(folder.resolve()) if Path(config.pipeline).is_dir() else config.pipeline,
        fingerprint=fingerprint(folder),
        names=names,
        prompt=config.prompt,
        steps=config.steps,
        guidance=config.guidance,
        size=config.size,
        seed=config.seed,
        batch=config.batch,
        format=config.format,
        quality=config.quality,
        device=device,
        precision=default_precision(device) if config.precision == "auto" else config.precision,
    )
    tasks = plan(request, config.out, counts, config.shard_samples)
    with progress("generating", sum(counts), "images") as bar:

        def on_finished(result: ShardResult) -> None:
            bar.advance(result.entry.count + len(result.rejected))

        manifest = generate(
            tasks,
            config.out,
            runner(config, device, bar.advance),
            source=config.source,
            classes=like.classes,
            provenance=provenance(request, config, class_of(folder), like),
            overwrite=config.overwrite,
            on_finished=on_finished,
        )
    left_out = manifest.provenance["quarantined"]
    if left_out:
        warn(f"{left_out} images left out; the reasons are in {config.out / QUARANTINE_NAME}")
    console.print(f"{len(manifest)} images of {len(like.classes)} classes in {len(tasks)} shards, in {config.out}")
    return manifest


def check_engine(config: GenerateConfig) -> None:
    """Raises InputError for flags that the engine has no use for."""
    if config.engine == "local" and (config.workers is not None or config.address is not None):
        flag = "--workers" if config.workers is not None else "--address"
        raise InputError(f"{flag}: the local engine draws in this one process; pass --engine ray too")


def class_names(file: Path | None, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Class names as the pipeline or the prompt takes them.

    Raises:
        InputError: the file is no JSON object from class names to texts.
    """
    if file is None:
        return classes
    try:
        mapping = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--class-names {file}: cannot be read as JSON ({error})") from error
    if not isinstance(mapping, dict) or not all(isinstance(text, str) for text in mapping.values()):
        raise InputError(f"--class-names {file}: has to be one object from class names to texts")
    unknown = sorted(set(mapping) - set(classes))
    if unknown:
        raise InputError(f"--class-names {file}: --like has no class {unknown[0]!r}; it has {', '.join(classes)}")
    return tuple(mapping.get(name, name) for name in classes)


def train_into(folder: Path, shards: str, settings: TrainSettings, device: str) -> None:
    """Trains a small pipeline on shards and saves it in `folder`, unless an earlier run did so with the same settings.

    Raises:
        InputError: the folder holds something else.
    """
    from shards.generation.diffusion import save
    from shards.generation.diffusion_training import train

    manifest = open_manifest(shards)
    data = hashlib.sha256("".join(entry.sha256 for entry in manifest.entries).encode()).hexdigest()
    facts = {"trained_on": data, **dataclasses.asdict(settings)}
    if folder.exists():
        check_trained(folder, facts)
        console.print(f"{folder} holds the pipeline of an earlier training with these settings")
        return
    with progress("reading images", min(len(manifest), settings.images), "images") as bar:
        images, labels = read_images(manifest, settings.side, settings.images, bar.advance)
    sizes = manifest.columns(np.arange(min(len(manifest), 1000)))
    size = int(np.median(np.minimum(sizes.height, sizes.width)))
    with progress("training the pipeline", 100, "%") as bar:
        shown = 0.0

        def report(done: float, step: int, loss: float) -> None:
            nonlocal shown
            bar.advance(100 * done - shown, f"step {step}, loss {loss:.3f}")
            shown = 100 * done

        trained = train(images, labels, manifest.classes, settings, size=size, device=device, report=report)
    save(trained, folder, facts)


def check_trained(folder: Path, facts: dict[str, Any]) -> None:
    """Raises InputError where a folder is not the result of a training with these facts."""
    try:
        old = json.loads((folder / "training.json").read_text())
    except (OSError, ValueError) as error:
        remedy = "leave out --train-on to use it, or choose another folder"
        raise InputError(f"--pipeline {folder}: exists and was not trained here; {remedy}") from error
    for name, value in facts.items():
        if old.get(name) != value:
            remedy = "leave out --train-on to use it as it is, or choose another folder"
            raise InputError(f"--pipeline {folder}: was trained with {name} {old.get(name)}, not {value}; {remedy}")


def runner(config: GenerateConfig, device: str, on_images: Callable[[int], None]) -> Runner:
    """Runs tasks on the engine and moves the bar, by batches here and by shards on Ray."""

    def run_here(function: Callable[..., ShardResult], tasks: list[Task]) -> Iterator[ShardResult]:
        return (function(task, on_images) for task in tasks)

    def run_on_ray(function: Callable[..., ShardResult], tasks: list[Task]) -> Iterator[ShardResult]:
        gpus = 1 if device == "cuda" else 0
        for result in run_tasks("ray", function, tasks, config.workers, config.address, gpus_per_task=gpus):
            on_images(result.entry.count + len(result.rejected))
            yield result

    return run_on_ray if config.engine == "ray" else run_here


def provenance(request: Request, config: GenerateConfig, kind: str, like: Manifest) -> dict[str, Any]:
    """Provenance of the images, for the manifest."""
    facts = dataclasses.asdict(request)
    generator = {"name": config.pipeline, "class": kind, "sha256": facts.pop("fingerprint")}
    del facts["pipeline"]
    return {"generator": generator, **facts, "like": like.root, "shard_samples": config.shard_samples}


def main(argv: list[str]) -> None:
    """Entry point of `hardviews generate`."""
    run(parse(GenerateConfig, argv, prog="hardviews generate"))
