"""`hardviews info`: what folders of shards hold."""

from dataclasses import dataclass

import numpy as np
import tyro
from rich.table import Table

from jobs.run.summary import COUNTED, summary_table
from jobs.run.terminal import parse, tables
from shards.manifest import Manifest, open_manifest

SAMPLED_SHARDS = 64  # column files read for the image sizes of a large data set


@dataclass(frozen=True)
class InfoConfig:
    """Prints images per class and source, sizes and provenance of shards."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders or addresses of shards."""
    classes: int = 20
    """Number of classes to list, the largest first; 0 lists none."""


def facts(manifest: Manifest) -> dict[str, str]:
    """Facts about a data set, but for its summary: name → text."""
    shards = np.unique(np.linspace(0, len(manifest.entries) - 1, SAMPLED_SHARDS).round().astype(int))
    columns = [manifest.shard_columns(int(shard)) for shard in shards]
    heights = np.concatenate([one.height for one in columns])
    widths = np.concatenate([one.width for one in columns])
    scope = "" if len(shards) == len(manifest.entries) else f" (in {len(shards)} of the shards)"
    shown = {name: value for name, value in manifest.provenance.items() if name not in COUNTED and value is not None}
    return {
        "source": manifest.source,
        f"width{scope}": f"{widths.min()} to {widths.max()} px, median {np.median(widths):.0f}",
        f"height{scope}": f"{heights.min()} to {heights.max()} px, median {np.median(heights):.0f}",
        **{f"provenance: {name}": str(value) for name, value in shown.items()},
    }


def class_table(manifests: list[Manifest], limit: int) -> Table:
    """Images by class and source, the largest classes first."""
    names = sorted({name for manifest in manifests for name in manifest.classes})
    counts = {name: [0] * len(manifests) for name in names}
    for place, manifest in enumerate(manifests):
        for name, count in zip(manifest.classes, manifest.class_counts, strict=True):
            counts[name][place] += int(count)
    shown = sorted(names, key=lambda name: (-sum(counts[name]), name))[:limit]
    table = Table("class", *(manifest.source for manifest in manifests), title=f"{len(shown)} of {len(names)} classes")
    for name in shown:
        table.add_row(name, *(f"{count:,}" for count in counts[name]))
    return table


def run(config: InfoConfig) -> None:
    """Prints the tables."""
    manifests = [open_manifest(folder) for folder in config.folders]
    for manifest in manifests:
        tables.print(summary_table(manifest, facts(manifest)))
    if config.classes and any(manifest.classes for manifest in manifests):
        tables.print(class_table(manifests, config.classes))


def main(argv: list[str]) -> None:
    """Entry point of `hardviews info`."""
    run(parse(InfoConfig, argv, prog="hardviews info"))
