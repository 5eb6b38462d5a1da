"""`hardviews bench colour`: colour of the views in torch, compiled and not, beside a copy of the same pixels."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from jobs.run.terminal import parse, tables
from jobs.run.world import pick_device
from pipelines.colour_device import fused_on_device
from pipelines.draw import draw
from pipelines.policies import build_policy
from shards.errors import InputError


@dataclass(frozen=True)
class ColourBench:
    """Measures the colour of views as it runs on a GPU."""

    batch: int = 256
    """Images."""
    views: int = 4
    """Views of an image."""
    size: int = 224
    """Side of a view, pixels."""
    policy: str = "byol"
    """Augmentation policy."""
    rounds: int = 10
    """Times that each way is measured."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("batch", "views", "size", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be at least 1")


def measure(bench: ColourBench) -> dict[str, float]:
    """Median milliseconds of a batch: `compiled_ms`, `eager_ms`, and `copy_ms` of reading the crops and writing the
    views, which nothing can be faster than; `views_per_second` of the compiled way."""
    device = pick_device(bench.device)
    ids = np.arange(bench.batch)
    sizes = np.full((bench.batch, 2), bench.size)
    params = draw(build_policy(bench.policy, bench.size, bench.views), ids, np.zeros_like(ids), 0, sizes).flat()
    side = bench.size
    crops = torch.randint(256, (len(params), side, side, 3), dtype=torch.uint8, device=device)
    out = torch.empty(len(params), 3, side, side, dtype=torch.bfloat16, device=device)
    ways: dict[str, Callable[[], object]] = {
        "compiled": lambda: fused_on_device(crops, params, out, compiled=True),
        "eager": lambda: fused_on_device(crops, params, out),
        "copy": lambda: out.copy_(crops.permute(0, 3, 1, 2)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(bench.rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 1:  # compiles, and fills caches
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {"views_per_second": 1e3 * len(params) / medians["compiled_ms"], **medians}


def main(argv: Sequence[str]) -> None:
    bench = parse(ColourBench, argv, prog="hardviews bench colour")
    figures = measure(bench)
    table = Table(
        "way", "ms", title=f"{bench.batch} × {bench.views} views of {bench.size} pixels, policy {bench.policy}"
    )
    for name in ("compiled", "eager", "copy"):
        table.add_row(name, f"{figures[f'{name}_ms']:,.2f}")
    tables.print(table)
    if bench.json:
        print(json.dumps(figures))
