"""`hardviews verify`: reads a data set again and names all that is not as it was written."""

import sys
from dataclasses import dataclass
from functools import partial

import tyro

from jobs.run.terminal import parse, progress
from shards.engines import run_tasks
from shards.manifest import open_manifest
from shards.verify import Damage, verify


@dataclass(frozen=True)
class VerifyConfig:
    """Compares every file with its hash and names damaged shards and samples; exit code 1 if there are any."""

    folder: tyro.conf.Positional[str]
    """Folder or address of shards."""
    workers: int | None = None
    """Processes; by default one per core."""


def run(config: VerifyConfig) -> list[Damage]:
    """Everything that is damaged, in the order of the files; printed as it is broken."""
    manifest = open_manifest(config.folder)
    broken: list[Damage] = []
    size = sum(entry.size for entry in manifest.entries)
    with progress("verifying", size / 1e6, "MB") as bar:
        for entry, damages in verify(manifest, partial(run_tasks, "local", workers=config.workers)):
            broken += damages
            bar.advance(entry.size / 1e6, f"{len(broken)} damaged" if broken else None)
    broken.sort(key=lambda damage: (damage.file, damage.key))
    for damage in broken:
        print(f"{damage.file}{f' {damage.key}' if damage.key else ''}: {damage.reason}")
    samples = sum(bool(damage.key) for damage in broken)
    verdict = (
        f"{len(broken) - samples} files and {samples} samples are damaged" if broken else "all is as it was written"
    )
    print(f"{manifest.root}: {len(manifest.entries)} shards, {len(manifest)} images: {verdict}")
    return broken


def main(argv: list[str]) -> None:
    """Entry point of `hardviews verify`."""
    if run(parse(VerifyConfig, argv, prog="hardviews verify")):
        sys.exit(1)
