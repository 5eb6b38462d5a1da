"""What became of the images of a data set, as the jobs that make one and `info` show it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from shards.manifest import QUARANTINE_NAME, Manifest

FEW_IMAGES = 10  # a class with fewer is named: too small to learn from, or a folder that is no class
NAMED = 5  # of them
COUNTED = ("quarantined", "duplicates", "reasons", "converted", "unlabelled")  # what it takes from the provenance


def summary(manifest: Manifest) -> dict[str, str]:
    """Rows of a table: images in and out, converted, quarantined, duplicates, without label, small classes."""
    facts = manifest.provenance
    quarantined = int(facts.get("quarantined", 0))
    size = sum(entry.size for entry in manifest.entries)
    shards = f"{len(manifest.entries):,} shards, {size / 1e6:,.1f} MB, {size / len(manifest) / 1e3:,.1f} kB an image"
    converted = facts.get("converted", {})
    rows = {
        "images in": f"{len(manifest) + quarantined:,}",
        "images out": f"{len(manifest):,} in {shards}",
        "converted": f"{sum(converted.values()):,}{by_kind(converted)}",
        f"quarantined ({QUARANTINE_NAME})": f"{quarantined:,}{by_kind(facts.get('reasons', {}))}",
        "duplicates (kept)": f"{facts['duplicates']:,}" if "duplicates" in facts else "not counted when it was made",
        "without label": f"{manifest.unlabelled:,}{by_kind(facts.get('unlabelled', {}))}",
    }
    if manifest.classes:
        counts = manifest.class_counts
        few = np.flatnonzero(counts < FEW_IMAGES)
        names = [f"{manifest.classes[label]} {counts[label]}" for label in few[:NAMED]]
        listed = f": {', '.join(names)}{', …' if len(few) > NAMED else ''}" if names else ""
        rows["classes"] = f"{len(counts):,}"
        rows[f"classes of fewer than {FEW_IMAGES} images"] = f"{len(few):,}{listed}"
    return rows


def by_kind(counts: Mapping[str, int]) -> str:
    """A line for each kind, behind the total."""
    return "".join(f"\n{count:,}: {kind}" for kind, count in counts.items())


def summary_table(manifest: Manifest, facts: Mapping[str, Any] | None = None) -> Table:
    """The summary as a table, with other facts below it."""
    table = Table("", manifest.root)
    for name, text in {**summary(manifest), **(facts or {})}.items():
        table.add_row(name, text)
    return table
