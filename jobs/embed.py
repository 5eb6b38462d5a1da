"""`hardviews embed`: features of every image, as Parquet that polars, DuckDB, datasets and FAISS read."""

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.evaluation.backbones import ModelConfig, load_frozen
from jobs.evaluation.embeddings import Layout, facts_of, open_folder, write_parts
from jobs.evaluation.images import open_images
from jobs.run.terminal import Bar, check_least, parse, progress, warn
from jobs.run.world import open_world
from shards.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Writes a row an image: key, shard, source, label, feature. Run again, it goes on; under torchrun, every process
    takes a share."""

    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    backbone: Path | None = None
    """Instead of a run or a timm name: a folder of `export-backbone`."""
    data: str
    """Images: a folder of shards, an fsspec address, or an ImageFolder."""
    out: Path
    """Folder to write: Parquet files and embeddings.json."""
    views: int = 1
    """Crops whose features are averaged: the centre one, and random ones with flips."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the features."""
    tokens: bool = False
    """Write the patch tokens of the centre crop too, which costs a second forward."""
    rows: int = 10_000
    """Images of a file: what is in memory at a time, and is done again after a kill."""
    forward_batch: int = 256
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbone runs; auto = cuda where there is one."""
    overwrite: bool = False
    """Replace features of other images or another backbone."""


def embed(config: EmbedConfig) -> None:
    """
    Raises:
        InputError: no such backbone or images; the folder holds features of another kind; no image could be read.
    """
    check_least(config, views=1, rows=1, forward_batch=1)
    model = config.model
    if config.backbone is not None:
        if not (config.backbone / "model.safetensors").is_file():
            raise InputError(f"backbone: {config.backbone} holds no model.safetensors; give an export-backbone folder")
        if model.run is not None or model.timm:
            raise InputError("backbone: it is given beside --run or --timm; give one of them")
        model = replace(model, timm=f"local-dir:{config.backbone}")
    layout = Layout(config.views, config.dtype == "float16", config.tokens, config.rows)
    began = time.monotonic()
    with ExitStack() as stack:
        images = stack.enter_context(closing(open_images(config.data)))
        frozen, facts = load_frozen(model)
        world = stack.enter_context(open_world(config.device))
        if world.leads:
            open_folder(config.out, facts_of(frozen, facts, images, layout), overwrite=config.overwrite)
        world.barrier()
        parts = range(world.rank, -(-len(images.labels) // layout.rows), world.size)
        share = sum(min(layout.rows, len(images.labels) - part * layout.rows) for part in parts)
        bar = stack.enter_context(progress("embedding", share, "images")) if world.leads else Bar.silent()
        left_out = write_parts(frozen, images, layout, config.out, world, config.forward_batch, bar.advance)
        world.barrier()
        if left_out:
            warn(f"{left_out} images cannot be read and are left out; {config.out / 'quarantine.jsonl'} says why")
        if world.leads:
            size = sum(path.stat().st_size for path in config.out.glob("part-*.parquet"))
            seconds = time.monotonic() - began
            print(f"{config.out}: {len(images.labels):,} images, {size / 1e6:,.1f} MB, in {seconds:,.1f} s")


def main(argv: list[str]) -> None:
    """Entry point of `hardviews embed`."""
    embed(parse(EmbedConfig, argv, prog="hardviews embed"))
