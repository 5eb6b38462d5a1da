"""Features of images as Parquet, a row an image: written in parts, which go on where they stopped, and read again.

    embeddings.json      the images, the backbone and how its features were made
    part-00000.parquet   key, shard, source, label, feature (fixed-size list of D), tokens (of T lists of D)
    quarantine.jsonl     images that could not be read, and why

Letters: n images of a part, D width, T patches, B images of a batch, S side in pixels, K views.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.evaluation.features import default_crop
from jobs.evaluation.frozen import Frozen, patch_tokens
from jobs.evaluation.images import ImageSet
from jobs.evaluation.loading import Loader, Transform, centre_crop, crop_and_flip
from jobs.run.folder import whole_file, write_json
from jobs.run.world import World
from shards.errors import InputError

FACTS = "embeddings.json"
QUARANTINE = "quarantine.jsonl"
VIEW_SCALE = (0.25, 1.0)  # area of the random crops beside the centre one


@dataclass(frozen=True)
class Layout:
    """How features are made and written."""

    views: int = 1
    """K: the centre crop and K − 1 random ones, whose features are averaged."""
    half: bool = False
    """float16 instead of float32."""
    tokens: bool = False
    """The centre crop's patch tokens too."""
    rows: int = 10_000
    """Images of a part."""


def facts_of(frozen: Frozen, model: dict[str, Any], images: ImageSet, layout: Layout) -> dict[str, Any]:
    """What embeddings.json says; parts belong together where it is the same."""
    return {
        "model": {**model, "sha256": frozen.identity()},
        "size": frozen.size,
        "pool": frozen.pool,
        "images": {"name": images.name, "source": images.source, "identity": images.identity},
        "count": len(images.labels),
        "classes": list(images.classes),
        "views": layout.views,
        "dtype": "float16" if layout.half else "float32",
        "tokens": layout.tokens,
        "rows": layout.rows,
    }


def open_folder(out: Path, facts: dict[str, Any], *, overwrite: bool) -> None:
    """Makes the folder ready for parts; those of the same images, backbone and layout stay.

    Raises:
        InputError: it holds something else, and is not to be replaced.
    """
    known = out / FACTS
    if out.is_dir() and any(out.iterdir()):
        if not known.is_file():
            raise InputError(f"out: {out} holds files and no {FACTS}; choose another --out")
        kept = json.loads(known.read_text())
        differing = [name for name in facts if kept.get(name) != facts[name]]
        if differing and not overwrite:
            raise InputError(
                f"out: {out} holds features of another {', '.join(differing)}, and one folder holds features of one "
                f"kind; choose another --out or give --overwrite"
            )
        if overwrite:
            for path in (*out.glob("part-*.parquet"), out / QUARANTINE):
                path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(known, facts)


@torch.inference_mode()
def write_parts(
    frozen: Frozen,
    images: ImageSet,
    layout: Layout,
    out: Path,
    world: World,
    batch: int,
    advance: Callable[[int], object],
) -> int:
    """Writes this rank's parts that are not there yet, one at a time; returns the number of its images left out."""
    frozen.model.to(world.device).eval()
    count, left_out = len(images.labels), 0
    loader = Loader(images, frozen.size, batch, frozen.mean, frozen.std)
    try:
        for part in range(world.rank, -(-count // layout.rows), world.size):
            rows = np.arange(part * layout.rows, min((part + 1) * layout.rows, count))
            path = out / f"part-{part:05d}.parquet"
            if path.is_file():
                advance(len(rows))
                continue
            kept, features_nD, tokens_nTD, broken = _encode(frozen, loader, rows, layout, world, advance)
            left_out += len(broken)
            with (out / QUARANTINE).open("a") as file:
                file.writelines(
                    json.dumps({"image": images.where(row), "reason": why}) + "\n" for row, why in broken.items()
                )
            _write(path, _table(images, kept, features_nD, tokens_nTD, layout))
    finally:
        loader.close()
    return left_out


def _encode(
    frozen: Frozen, loader: Loader, rows: np.ndarray, layout: Layout, world: World, advance: Callable[[int], object]
) -> tuple[np.ndarray, Tensor, Tensor | None, dict[int, str]]:
    """Rows that could be read, their features and tokens, and why the others could not."""
    kept, total, tokens, broken = np.zeros(0, np.int64), torch.zeros(0), [], {}
    for number, transform in enumerate(_transforms(frozen.size, layout.views)):
        seen, features = [], []
        for got in loader.batches(rows, transform, world.device):
            broken |= got.broken
            if number == 0:
                advance(len(got.rows) + len(got.broken))
            if len(got.rows):
                features.append(frozen.features(got.crops_B3SS).cpu())
                seen.append(got.rows)
                if layout.tokens and number == 0:
                    tokens_BTD = patch_tokens(frozen.model, got.crops_B3SS).float().cpu()
                    tokens.append(tokens_BTD.half() if layout.half else tokens_BTD)
        if features:
            kept, view_nD = np.concatenate(seen), torch.cat(features)
            total = view_nD if number == 0 else total + view_nD
    features_nD = total / layout.views
    return kept, features_nD.half() if layout.half else features_nD, torch.cat(tokens) if tokens else None, broken


def _transforms(size: int, views: int) -> Iterator[Transform]:
    yield centre_crop(default_crop(size))
    for view in range(1, views):
        yield crop_and_flip(0, view, size, VIEW_SCALE)


def _table(
    images: ImageSet, rows: np.ndarray, features_nD: Tensor, tokens_nTD: Tensor | None, layout: Layout
) -> pa.Table:
    names = images.names(rows)
    labels = images.labels[rows]
    columns = {
        "key": pa.array([key for _, key in names], pa.string()),
        "shard": pa.array([shard or None for shard, _ in names], pa.string()),
        "source": pa.array([images.source] * len(rows), pa.string()),
        "label": pa.array(labels, mask=labels < 0),
    }
    if len(rows):
        columns["feature"] = fixed(features_nD.numpy())
        if tokens_nTD is not None:
            columns["tokens"] = fixed(tokens_nTD.numpy())
    return pa.table(columns).replace_schema_metadata({"classes": json.dumps(images.classes)})


def fixed(values: np.ndarray) -> pa.Array:
    """[n, …] as nested fixed-size lists."""
    column: pa.Array = pa.array(values.reshape(-1))
    for width in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, width)
    return column


def _write(path: Path, table: pa.Table) -> None:
    """Whole or not at all."""
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


@dataclass(frozen=True)
class Embeddings:
    """Features float32 [n, D] and what is known of their images."""

    features_nD: np.ndarray
    keys: list[str]
    shards: list[str | None]
    source: str
    labels: np.ndarray
    """int64 [n], −1 where unknown."""
    classes: tuple[str, ...]
    images: str
    """Name of the images."""


def read_embeddings(folder: Path) -> Embeddings:
    """All parts of a folder.

    Raises:
        InputError: there are none, some are missing, or their features are of different widths.
    """
    if not (folder / FACTS).is_file():
        raise InputError(f"features: {folder} holds no {FACTS}; give a folder of `hardviews embed`")
    facts = json.loads((folder / FACTS).read_text())
    parts = sorted(folder.glob("part-*.parquet"))
    if len(parts) != -(-facts["count"] // facts["rows"]):
        raise InputError(f"features: {folder} is not complete; run `hardviews embed` again, which goes on")
    tables = [table for path in parts if len(table := pq.read_table(path))]
    if not tables:
        raise InputError(f"features: {folder} holds no image; its {QUARANTINE} says why")
    widths = {table.schema.field("feature").type.list_size for table in tables}
    if len(widths) > 1:
        raise InputError(
            f"features: {folder} holds features of {len(widths)} widths; write them again with --overwrite"
        )
    table = pa.concat_tables(
        [table.drop_columns([n for n in ("tokens",) if n in table.column_names]) for table in tables]
    )
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table["feature"].chunks])
    return Embeddings(
        flat.reshape(len(table), widths.pop()).astype(np.float32),
        table["key"].to_pylist(),
        table["shard"].to_pylist(),
        facts["images"]["source"],
        table["label"].fill_null(-1).to_numpy(),
        tuple(facts["classes"]),
        facts["images"]["name"],
    )
