"""`hardviews bench negatives`: synthetic negatives in closed form against building every vector, by turns in one run.

Measured on both sides: the logits of all synthetic negatives and the gradient they give the queries, for the same
indices, coefficients and noise; besides, the whole loss with its draws. Figures are medians over the rounds.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from jobs.benches.obvious import naive_info_nce, naive_similarities
from jobs.run.terminal import parse, tables
from models.contrast import info_nce
from models.negatives import Draws, NegativesConfig, draw, synthetic_similarities
from shards.errors import InputError

TEMPERATURE = 0.2


@dataclass(frozen=True)
class NegativesBench:
    """Measures synthetic negatives in closed form against building every vector."""

    batch: int = 512
    """Queries."""
    queue: int = 4096
    """Negatives."""
    hardest: int = 256
    """N: negatives that synthetic ones are made from."""
    count: int = 128
    """Synthetic negatives of each of the six kinds."""
    width: int = 256
    """Width of the embedding."""
    rounds: int = 5
    """Times that each side is measured."""
    threads: int = 0
    """CPU threads; 0 for torch's own choice."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


def milliseconds(sides: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median time of each side; the sides take turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def gradient(x_BD: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """∂ value(unit rows of x) / ∂x, for values that are summed."""
    leaf = x_BD.clone().requires_grad_()
    value(F.normalize(leaf, dim=1)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def measure(bench: NegativesBench) -> dict[str, float]:
    """Figures by name; times in milliseconds."""
    count = bench.count
    config = NegativesConfig(bench.hardest, count, count, count, count, count, count)
    generator = torch.Generator(bench.device).manual_seed(0)
    shapes = ((bench.batch, bench.width), (bench.batch, bench.width), (bench.queue, bench.width))
    x_BD, k_BD, queue_KD = (torch.randn(s, generator=generator, device=bench.device) for s in shapes)
    k_BD, queue_KD = F.normalize(k_BD, dim=1), F.normalize(queue_KD, dim=1)
    drawn = draw(config, F.normalize(x_BD, dim=1) @ queue_KD.T, bench.width)

    def closed(kinds: NegativesConfig, draws: Draws) -> Tensor:
        return gradient(x_BD, lambda q: synthetic_similarities(kinds, q, queue_KD, q @ queue_KD.T, draws))

    def naive(kinds: NegativesConfig, draws: Draws) -> Tensor:
        return gradient(x_BD, lambda q: naive_similarities(kinds, q, queue_KD, draws))

    cosine = replace(config, gradient="cosine")
    sides: dict[str, Callable[[], object]] = {
        "closed": lambda: closed(config, drawn),
        "naive": lambda: naive(config, drawn),
        "closed_cosine": lambda: closed(cosine, drawn),
        "naive_cosine": lambda: naive(cosine, drawn),
        "loss_plain": lambda: gradient(x_BD, lambda q: info_nce(q, k_BD, queue_KD, TEMPERATURE)[0]),
        "loss_closed": lambda: gradient(x_BD, lambda q: info_nce(q, k_BD, queue_KD, TEMPERATURE, config)[0]),
        "loss_naive": lambda: gradient(x_BD, lambda q: naive_info_nce(q, k_BD, queue_KD, TEMPERATURE, config)),
    }
    medians = milliseconds(sides, bench.rounds, bench.device)

    def difference(kinds: NegativesConfig) -> float:
        reference = naive(kinds, drawn)
        return float((closed(kinds, drawn) - reference).norm() / reference.norm())

    return {
        "speedup": medians["naive"] / medians["closed"],
        "speedup_cosine": medians["naive_cosine"] / medians["closed_cosine"],
        "speedup_loss": medians["loss_naive"] / medians["loss_closed"],
        "gradient_difference": difference(config),
        "gradient_difference_cosine": difference(cosine),
        **{f"{name}_ms": value for name, value in medians.items()},
    }


def main(argv: Sequence[str]) -> None:
    bench = parse(NegativesBench, argv, prog="hardviews bench negatives")
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda asked for, but torch sees no CUDA device; take --device cpu")
    for name in ("batch", "queue", "hardest", "count", "width", "rounds"):
        if getattr(bench, name) < 1:
            raise InputError(f"{name}: {getattr(bench, name)} must be at least 1")
    if bench.hardest > bench.queue:
        raise InputError(f"hardest: {bench.hardest} is more than the queue's {bench.queue}; lower it")
    if bench.threads > 0:
        torch.set_num_threads(bench.threads)
    figures = measure(bench)
    tables.print(table(bench, figures))
    if bench.json:
        print(json.dumps(figures))


def table(bench: NegativesBench, figures: dict[str, float]) -> Table:
    """Rows: what is measured; columns: both sides and their ratio."""
    title = f"{bench.batch} queries, {bench.queue} negatives, N {bench.hardest}, 6 × {bench.count}, width {bench.width}"
    result = Table("forward and backward", "closed form", "every vector built", "faster by", title=title)
    rows = {"synthetic negatives": "", "… by cosine gradient": "_cosine"}
    for text, suffix in rows.items():
        sides = figures[f"closed{suffix}_ms"], figures[f"naive{suffix}_ms"]
        result.add_row(text, *(f"{ms:,.1f} ms" for ms in sides), f"{figures[f'speedup{suffix}']:.1f}×")
    sides = figures["loss_closed_ms"], figures["loss_naive_ms"]
    result.add_row("whole loss, with draws", *(f"{ms:,.1f} ms" for ms in sides), f"{figures['speedup_loss']:.1f}×")
    result.add_row("whole loss without any", f"{figures['loss_plain_ms']:,.1f} ms", "", "")
    differences = (figures[f"gradient_difference{suffix}"] for suffix in rows.values())
    result.caption = f"gradients differ by {', '.join(f'{d:.1e}' for d in differences)} of their norm"
    return result
