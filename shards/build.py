"""Images of any source → shards: one idempotent task per output shard, the same on every engine."""

import csv
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.images import BadImageError, Rules, prepare
from shards.manifest import MANIFEST_NAME, Manifest
from shards.sources.base import Options, Part, Record, Runner
from shards.sources.kinds import open_source
from shards.writer import (
    Rejected,
    Sample,
    ShardResult,
    finish,
    output_folder,
    remove_shards,
    sample_key,
    shard_name,
    shards_in,
    split_done,
    write_shard,
)


@dataclass(frozen=True)
class Task:
    """What a worker needs to write one shard."""

    folder: str
    number: int
    first: int
    """Number of the part's first image in the data set."""
    part: Part
    rules: Rules
    shard_samples: int
    excluded: frozenset[tuple[str, int]] = frozenset()
    """Key and CRC-32 of images of this shard that are left out."""

    @property
    def name(self) -> str:
        """File name of the tar."""
        return shard_name(self.number)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the shard's content."""
        return {
            **asdict(self.rules),
            "shard_samples": self.shard_samples,
            "first": self.first,
            "list of images": self.part.fingerprint(),
            **({"excluded": sorted(key for key, _ in self.excluded)} if self.excluded else {}),
        }


def build_shard(task: Task) -> ShardResult:
    """Writes the shard of one task; running it again gives the same bytes.

    Raises:
        InputError: the disk is full, or a source cannot be reached.
    """
    numbered = enumerate(task.part.records(), task.first)
    samples = (sample_of(number, record, task.rules, task.excluded) for number, record in numbered)
    try:
        return write_shard(Path(task.folder), task.name, samples, task.settings)
    except OSError as error:
        remedy = "mend that and run the build again: finished shards are kept"
        raise InputError(f"{task.folder}/{task.name}: {error}; {remedy}") from error


def sample_of(
    number: int, record: Record, rules: Rules, excluded: frozenset[tuple[str, int]] = frozenset()
) -> Sample | Rejected:
    """A record as it is written, or the reason why it is not."""
    key = sample_key(number, record.name)
    if record.problem:
        return Rejected(key, record.name, record.problem)
    try:
        picture = prepare(record.content, rules)
    except BadImageError as error:
        return Rejected(key, record.name, str(error))
    if (key, zlib.crc32(picture.content)) in excluded:
        return Rejected(key, record.name, "excluded by --exclude")
    return Sample(
        key,
        picture.content,
        picture.extension,
        picture.height,
        picture.width,
        record.label,
        unlabelled=record.unlabelled,
        converted=picture.converted,
    )


@dataclass(frozen=True)
class Plan:
    """A listed source, cut into tasks."""

    out: Path
    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def images(self) -> int:
        """Number of images listed."""
        return sum(len(task.part) for task in self.tasks)


def plan(
    address: str,
    out: Path,
    run: Runner,
    *,
    rules: Rules | None = None,
    shard_samples: int = 1000,
    keep_order: bool = False,
    image: str | None = None,
    label: str | None = None,
    label_from: str | None = None,
    labels: str | None = None,
    split: str | None = None,
    exclude: Path | None = None,
) -> Plan:
    """Lists a source.

    Args:
        address: KIND:PATH, see `shards.sources.kinds`.
        out: folder for the shards.
        run: `run_tasks` of an engine.
        rules: how images are checked and written.
        shard_samples: images per shard.
        keep_order: the files of a folder in the order of their names rather than spread.
        image, label, label_from, labels, split: see `Options`.
        exclude: CSV file of `hardviews duplicates`; its images with keep = no are left out.

    Raises:
        InputError: wrong source or settings.
    """
    rules = rules or Rules()
    check_settings(rules, shard_samples)
    given = {"image": image, "label": label, "label_from": label_from, "labels": labels, "split": split}
    chosen = {name: value for name, value in given.items() if value is not None}
    listed = open_source(address, Options(shard_samples, keep_order, **chosen), run)
    starts = np.cumsum([0, *map(len, listed.parts)]).tolist()
    excluded = exclusions(exclude) if exclude else {}
    tasks = [
        Task(
            str(out.resolve()),
            i,
            starts[i],
            part,
            rules,
            shard_samples,
            frozenset(one for n in range(starts[i], starts[i + 1]) for one in excluded.get(n, ())),
        )
        for i, part in enumerate(listed.parts)
    ]
    if exclude and not any(task.excluded for task in tasks):
        raise InputError(
            f"--exclude {exclude}: names none of these images; give the file made from shards of this source"
        )
    provenance = {
        "images": address,
        **asdict(rules),
        "shard_samples": shard_samples,
        "keep_order": keep_order,
        **chosen,
        **({"exclude": str(exclude)} if exclude else {}),
    }
    return Plan(out, tuple(tasks), listed.classes, provenance)


def exclusions(path: Path) -> dict[int, list[tuple[str, int]]]:
    """Number of an image in its source → keys and CRC-32s that a file of `hardviews duplicates` leaves out.

    Raises:
        InputError: it cannot be read, or is no such file.
    """
    try:
        with path.open(newline="") as file:
            rows = [(row["key"], int(row["crc32"], 16)) for row in csv.DictReader(file) if row["keep"] == "no"]
            numbers = [int(key.split("-")[0]) for key, _ in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise InputError(f"--exclude {path}: {error}; give a duplicates.csv of `hardviews duplicates`") from error
    numbered: dict[int, list[tuple[str, int]]] = {}
    for number, row in zip(numbers, rows, strict=True):
        numbered.setdefault(number, []).append(row)
    return numbered


def build(
    planned: Plan,
    source: str,
    run: Runner,
    *,
    overwrite: bool = False,
    on_shard: Callable[[ShardResult], None] = lambda result: None,
) -> Manifest:
    """Writes the shards that the folder does not hold yet, then the manifest.

    Args:
        source: tag for the manifest, e.g. "real".
        run: `run_tasks` of an engine.
        overwrite: write shards anew that the folder holds with other images or settings, and remove surplus ones.
        on_shard: called for each shard, those that stood already first.

    Raises:
        InputError: the folder holds other shards, or no image can be read.
    """
    with output_folder(planned.out):
        results, missing = split_done(planned.out, planned.tasks, overwrite)
        clear_surplus(planned.out, {task.name for task in planned.tasks}, overwrite)
        if missing:
            (planned.out / MANIFEST_NAME).unlink(missing_ok=True)  # it would speak of shards that are about to change
        for result in results:
            on_shard(result)
        for result in run(build_shard, missing):
            results.append(result)
            on_shard(result)
        labels = planned.provenance.get("labels")
        if labels is not None and not any(label >= 0 for result in results for label in result.labels):
            raise InputError(f"--labels {labels}: names none of the images; compare its names with those of the source")
        return finish(planned.out, results, source=source, classes=planned.classes, provenance=planned.provenance)


def clear_surplus(folder: Path, names: set[str], overwrite: bool) -> None:
    """Removes tars of other names.

    Raises:
        InputError: there are some, and they are not to be removed.
    """
    surplus = sorted(set(shards_in(folder)) - names)
    if surplus and not overwrite:
        raise InputError(f"--out {folder}: holds other shards too ({surplus[0]}); pass --overwrite or another --out")
    if surplus:
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        remove_shards(folder, surplus)


def check_settings(rules: Rules, shard_samples: int) -> None:
    """Raises InputError for a setting that is out of range."""
    if shard_samples < 1:
        raise InputError(f"--shard-samples {shard_samples}: at least 1 is needed")
    if rules.resize_short is not None and rules.resize_short < 1:
        raise InputError(f"--resize-short {rules.resize_short}: at least 1 pixel is needed")
    if rules.quality is not None and not 1 <= rules.quality <= 100:
        raise InputError(f"--quality {rules.quality}: it goes from 1 to 100")
    if rules.quality is not None and rules.format == "png":
        raise InputError(f"--quality {rules.quality}: PNG has none; leave it out or pass --format jpg")
    if rules.max_pixels < 1:
        raise InputError(f"--max-pixels {rules.max_pixels}: at least 1 is needed")
