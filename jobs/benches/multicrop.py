"""`hardviews bench multicrop`: DINO's exact choice among multi-crop views against a loop over sampled candidates.

Both sides are given what the encoders said of all views: targets' distributions and predicted log probabilities. A
candidate is a pair of global views with as many local views as train; the loop scores sampled ones as HVP does, one
after the other, and keeps each image's hardest. The outputs are random: what an image's views share, and up to as much
that is each view's own.

Shape suffixes: B images, G global views, V all views, K outputs, C candidates, L local views that train.
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from rich.table import Table
from torch import Tensor

from jobs.benches.negatives import milliseconds
from jobs.run.terminal import parse, tables
from models.objectives.dino import DINOConfig, best_locals, cross_entropies
from models.selection import pairs
from shards.errors import InputError

# Standard deviation of the cosines of random directions in DINO's bottleneck, which is what its outputs are.
SPREAD = DINOConfig().bottleneck ** -0.5


@dataclass(frozen=True)
class MulticropBench:
    """Measures the exact choice among multi-crop views against a loop over sampled candidates."""

    batch: int = 32
    """Images."""
    global_views: int = 4
    """Global views to choose a pair from."""
    local_views: int = 16
    """Local views to choose from."""
    trained: int = 8
    """Local views that train."""
    outputs: int = 65_536
    """K: width of the last layer."""
    candidates: int = 128
    """Candidates that the loop samples."""
    rounds: int = 3
    """Times that each side is measured."""
    threads: int = 0
    """CPU threads; 0 for torch's own choice."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


def distributions(bench: MulticropBench) -> tuple[Tensor, Tensor]:
    """Targets' distributions [B, G, K] and predicted log probabilities [B, V, K], at DINO's temperatures."""
    config = DINOConfig()
    generator = torch.Generator(bench.device).manual_seed(0)
    image_B1K, teacher_BGK, student_BVK = (
        torch.randn(bench.batch, count, bench.outputs, generator=generator, device=bench.device) * SPREAD
        for count in (1, bench.global_views, bench.global_views + bench.local_views)
    )
    for own in (teacher_BGK, student_BVK):
        own *= torch.rand(*own.shape[:2], 1, generator=generator, device=bench.device)
        own += image_B1K
    return (
        (teacher_BGK / config.teacher_temperature).softmax(-1),
        (student_BVK / config.student_temperature).log_softmax(-1),
    )


def exact_choice(teacher_BGK: Tensor, student_BVK: Tensor, trained: int) -> tuple[Tensor, Tensor]:
    """The largest loss [B] of all candidates, and the numbers [B, 2 + L] of its views."""
    table_BP, local_BPL = best_locals(cross_entropies(teacher_BGK, student_BVK), trained)
    assert local_BPL is not None
    best = table_BP.max(1)
    rows_B = torch.arange(len(table_BP), device=table_BP.device)
    global_views = teacher_BGK.shape[1]
    pair_B2 = torch.tensor(pairs(global_views), device=table_BP.device)[best.indices]
    return best.values, torch.cat([pair_B2, local_BPL[rows_B, best.indices] + global_views], 1)


def candidate_loss(teacher_BGK: Tensor, student_BVK: Tensor, views: Sequence[int]) -> Tensor:
    """[B]: DINO's loss (equation 3 there, as a mean) of the views given, of which the first two are global."""
    total = torch.zeros(len(teacher_BGK), device=teacher_BGK.device)
    terms = 0
    for target in views[:2]:
        for view in views:
            if view != target:
                total -= (teacher_BGK[:, target] * student_BVK[:, view]).sum(1)
                terms += 1
    return total / terms


def sampled(bench: MulticropBench, seed: int = 0) -> list[list[int]]:
    """Candidates, drawn uniformly: numbers of two global views and of the local ones."""
    random = Random(seed)
    first = bench.global_views
    everyone = range(first, first + bench.local_views)
    return [random.sample(range(first), 2) + random.sample(everyone, bench.trained) for _ in range(bench.candidates)]


def peak_bytes(side: Callable[[], object], device: str) -> int:
    """The most memory that a call takes beyond what is taken already; on a CPU, what Linux says of this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = process_memory("VmRSS")
    side()
    return max(0, process_memory("VmHWM") - before)


def process_memory(field: str) -> int:
    """Bytes, as /proc/self/status has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@torch.no_grad()
def measure(bench: MulticropBench) -> dict[str, float]:
    """Figures by name: times in milliseconds, memory in megabytes, losses in nats, the rest as shares."""
    teacher_BGK, student_BVK = distributions(bench)
    candidates = sampled(bench)

    def exact() -> tuple[Tensor, Tensor]:
        return exact_choice(teacher_BGK, student_BVK, bench.trained)

    def loop() -> Tensor:
        return torch.stack([candidate_loss(teacher_BGK, student_BVK, views) for views in candidates], 1)

    sides: dict[str, Callable[[], object]] = {"exact": exact, "loop": loop}
    memory = {name: peak_bytes(side, bench.device) / 1e6 for name, side in sides.items()}
    times = milliseconds(sides, bench.rounds, bench.device)
    largest_B, views_BM = exact()
    losses_BC = loop()
    again_B = torch.stack(
        [
            candidate_loss(teacher_BGK[row, None], student_BVK[row, None], views)[0]
            for row, views in enumerate(views_BM.tolist())
        ]
    )
    sampled_B, random_B = losses_BC.max(1).values, losses_BC.mean(1)
    return {
        "speedup": times["loop"] / times["exact"],
        "exact_ms": times["exact"],
        "loop_ms": times["loop"],
        "exact_memory_mb": memory["exact"],
        "loop_memory_mb": memory["loop"],
        "exact_difference": float((again_B - largest_B).abs().max()),
        "sampled_agreement": float((sampled_B >= largest_B - 1e-6 * largest_B.abs()).float().mean()),
        "sampled_regret": float((largest_B - sampled_B).mean() / (largest_B - random_B).mean()),
        "largest_loss": float(largest_B.mean()),
        "sampled_loss": float(sampled_B.mean()),
        "random_loss": float(random_B.mean()),
    }


def main(argv: Sequence[str]) -> None:
    bench = parse(MulticropBench, argv, prog="hardviews bench multicrop")
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda asked for, but torch sees no CUDA device; take --device cpu")
    for name in ("batch", "local_views", "trained", "outputs", "candidates", "rounds"):
        if getattr(bench, name) < 1:
            raise InputError(f"{name}: {getattr(bench, name)} must be at least 1")
    if bench.global_views < 2:
        raise InputError(f"global_views: {bench.global_views} leave no pair; give 2 or more")
    if bench.trained > bench.local_views:
        raise InputError(f"trained: {bench.trained} is more than the {bench.local_views} local views; lower it")
    if bench.threads > 0:
        torch.set_num_threads(bench.threads)
    figures = measure(bench)
    tables.print(table(bench, figures))
    if bench.json:
        print(json.dumps(figures))


def table(bench: MulticropBench, figures: dict[str, float]) -> Table:
    """A row per side."""
    crops = f"{bench.global_views} + {bench.local_views} views, 2 + {bench.trained} of them train"
    result = Table("choice", "ms", "MB", "loss", title=f"batch {bench.batch}, {crops}, {bench.outputs:,} outputs")
    rows = {
        "exact, of all candidates": ("exact", "largest_loss"),
        f"loop over {bench.candidates} candidates": ("loop", "sampled_loss"),
    }
    for text, (side, loss) in rows.items():
        numbers = f"{figures[f'{side}_ms']:,.1f}", f"{figures[f'{side}_memory_mb']:,.0f}", f"{figures[loss]:.4f}"
        result.add_row(text, *numbers)
    result.add_row("random", "", "", f"{figures['random_loss']:.4f}")
    result.caption = (
        f"exact is {figures['speedup']:,.0f}× faster; sampling finds the largest loss in "
        f"{figures['sampled_agreement']:.0%} of images and loses {figures['sampled_regret']:.0%} of what it gains"
    )
    return result
