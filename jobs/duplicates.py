"""`hardviews duplicates`: images that are there twice, within and across data sets."""

import csv
import itertools
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jobs.evaluation.duplicates import BITS, Sets, exact_pairs, groups, hashes, near_pairs, thumbnails
from jobs.evaluation.images import ShardImages
from jobs.run.folder import write_json
from jobs.run.terminal import check_within, parse, progress, warn
from shards.errors import InputError

SHOWN = (12, 6)  # groups, and images of each, in the picture


@dataclass(frozen=True)
class DuplicatesConfig:
    """Finds the same images by their checksums, and nearly the same ones (recompressed, resized, mirrored) by a
    perceptual hash. `hardviews build --exclude OUT/duplicates.csv` leaves out all of a group but the first."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Folders or addresses of shards, searched together: train and test, real and synthetic. Of a group, the image of
    the earliest one is kept."""
    out: Path
    """Folder to write: duplicates.csv, duplicates.json, duplicates.png."""
    near: bool = True
    """Decode the images to find nearly the same ones too."""
    distance: int = 4
    """Bits of 64 in which the hashes of nearly the same images may differ (0 to 16)."""


def duplicates(config: DuplicatesConfig) -> dict[str, Any]:
    """Writes the files and returns what duplicates.json holds.

    Raises:
        InputError: no shards, or a value out of range.
    """
    if not config.shards:
        raise InputError("shards: none given; name one or more folders of shards")
    check_within(config, 0, 16, "distance")
    if config.out.exists() and not config.out.is_dir():
        raise InputError(f"out: {config.out} is a file; give a folder")
    began = time.monotonic()
    with ExitStack() as stack:
        sets = Sets(tuple(stack.enter_context(closing(ShardImages(address))) for address in config.shards))
        starts = sets.starts
        exact = exact_pairs(sets)
        pairs, facts = exact, {}
        if config.near:
            with progress("hashing", int(starts[-1]), "images") as bar:
                plain, mirrored, known = hashes(sets, bar.advance)
            if not known.all():
                warn(f"{int((~known).sum())} images cannot be decoded; `hardviews verify` says why")
            near = near_pairs(plain, mirrored, known, starts, config.distance)
            pairs = np.concatenate([exact, near.pairs])
            facts = {"nearest": _nearest(sets, near.nearest)}
        grouped = groups(int(starts[-1]), pairs)
        config.out.mkdir(parents=True, exist_ok=True)
        _write_csv(config.out / "duplicates.csv", sets, grouped, exact)
        places = [{sets.place(int(row))[0] for row in group} for group in grouped]
        facts |= {
            "sets": [{"name": one.name, "source": one.source, "images": len(one.labels)} for one in sets.images],
            "groups": len(grouped),
            "exact_copies": len(exact),
            "left_out": sum(len(group) - 1 for group in grouped),
            "groups_across_sets": sum(len(one) > 1 for one in places),
            "distance": config.distance if config.near else None,
            "seconds": round(time.monotonic() - began, 2),
        }
        write_json(config.out / "duplicates.json", facts)
        if grouped:
            _draw(config.out / "duplicates.png", sets, grouped)
    return facts


def _nearest(sets: Sets, nearest: np.ndarray) -> list[dict[str, Any]]:
    """Of each set's images, how far the nearest other image of each set is: counts by bits (0 to 64), and median."""
    lines = []
    for number, (start, end) in enumerate(itertools.pairwise(sets.starts)):
        for other in range(len(sets.images)):
            bits = nearest[start:end, other]
            bits = bits[bits <= BITS]
            if len(bits):
                counts = np.bincount(bits, minlength=BITS + 1).tolist()
                names = {"from": sets.images[number].name, "to": sets.images[other].name}
                lines.append({**names, "median": float(np.median(bits)), "counts": counts})
    return lines


def _write_csv(path: Path, sets: Sets, grouped: list[np.ndarray], exact: np.ndarray) -> None:
    copies = {*exact[:, 1].tolist()}
    columns = [one.columns() for one in sets.images]
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["group", "keep", "same_bytes", "set", "source", "shard", "key", "crc32", "class"])
        for number, group in enumerate(grouped):
            for row in group.tolist():
                place, own = sets.place(row)
                images, facts = sets.images[place], columns[place]
                shard, key = images.names(np.array([own]))[0]
                label = int(images.labels[own])
                name = images.classes[label] if label >= 0 else ""
                keep = "yes" if row == group[0] else "no"
                same = "yes" if row in copies else ""
                lines.writerow(
                    [number, keep, same, images.name, images.source, shard, key, f"{facts.crc32[own]:08x}", name]
                )


def _draw(path: Path, sets: Sets, grouped: list[np.ndarray]) -> None:
    """The largest groups, a row each."""
    from matplotlib.figure import Figure

    shown = sorted(grouped, key=len, reverse=True)[: SHOWN[0]]
    figure = Figure(figsize=(1.5 * SHOWN[1], 1.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), SHOWN[1], squeeze=False)
    cut = [group[: SHOWN[1]] for group in shown]
    for line, images, group in zip(axes, thumbnails(sets, cut), cut, strict=True):
        for place, axis in enumerate(line):
            axis.axis("off")
            if place < len(images):
                axis.imshow(images[place])
                axis.set_title(sets.images[sets.place(int(group[place]))[0]].name, fontsize=7)
    figure.savefig(path, dpi=100)


def main(argv: list[str]) -> None:
    """Entry point of `hardviews duplicates`."""
    config = parse(DuplicatesConfig, argv, prog="hardviews duplicates")
    facts = duplicates(config)
    print(
        f"{config.out}: {facts['groups']:,} groups, {facts['groups_across_sets']:,} of them across sets; "
        f"{facts['exact_copies']:,} exact copies; {facts['left_out']:,} images would be left out"
    )
    for one in facts.get("nearest", []):
        print(f"nearest image: {one['from']} → {one['to']}: median {one['median']:g} of {BITS} bits")
