"""`hardviews bench step`: what hard views and synthetic negatives add to a plain MoBY step, by turns in one run.

Every side is a whole optimizer step: selection, loss, backward, AdamW, momentum and queues. `obvious` is the plain
composition of `jobs.benches.obvious`. Then three short trainings measure how far cheaper choices agree with the full
one, and their regret, after the first tenth of the steps: on random pairs, on pairs chosen in bf16, on pairs that the
target chose. They are apart because regret depends on what is learned from: the target, about 100 steps behind, is a
good judge of plain training and a poor one, at first, of a training that follows its own choices.

Shape suffixes: B images, N views, P pairs.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from jobs.benches.obvious import loop_pair_losses, naive_loss
from jobs.run.command import parse
from models.backbones import BackboneConfig
from models.negatives import NONE, NegativesConfig
from models.objectives import Length, build_objective
from models.objectives.moby import MoBY, MoBYConfig
from models.selection import SelectionConfig, audit, select
from shards.errors import InputError

RATE = 5e-4
ALWAYS = NegativesConfig(start_epoch=0, last_epochs_without=0)
LONG = Length(100_000, 1000)  # what is measured is the beginning of a long run: the target's momentum stays near 0.99


@dataclass(frozen=True)
class StepBench:
    """Measures a step with hard views and synthetic negatives against a plain MoBY step."""

    backbone: str = "vit_tiny_patch16_224"
    """timm name of a ViT."""
    size: int = 32
    """Side of the views, pixels."""
    patch: int = 4
    """Side of a patch, pixels."""
    depth: int = 6
    """Blocks."""
    batch: int = 64
    """Images in a step."""
    views: int = 4
    """Views that pairs are chosen from."""
    rounds: int = 5
    """Times that each step is measured."""
    steps: int = 40
    """Length of the trainings that agreement and regret are measured in (steps); 0 = leave them out."""
    audit_every: int = 4
    """Steps between two comparisons."""
    threads: int = 0
    """CPU threads; 0 for torch's own choice."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


# Side → how its pairs are scored. `precise` has no savings but the shared forwards; `full` scores in bf16.
SELECTIONS = {
    "precise": SelectionConfig(),
    "full": SelectionConfig(precision="auto"),
    "target": SelectionConfig(encoder="target", precision="auto"),
}


class Learner:
    """An objective with its optimizer."""

    def __init__(self, bench: StepBench, negatives: NegativesConfig, *, target_bf16: bool = False) -> None:
        torch.manual_seed(0)
        shape = BackboneConfig(bench.backbone, bench.size, bench.patch, depth=bench.depth)
        backbone = replace(shape, target_precision="auto" if target_bf16 else "same")
        objective = build_objective(MoBYConfig(negatives), backbone, LONG)
        assert isinstance(objective, MoBY)
        self.moby = objective.to(bench.device).train()
        learned = [p for p in self.moby.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.05)

    def step(self, views_BNCHW: Tensor, selection: SelectionConfig | None) -> Tensor | None:
        """One step; of the first pair where there is no selection. Returns the choice."""
        moby = self.moby
        choice_B, scores = torch.zeros(len(views_BNCHW), dtype=torch.int64, device=views_BNCHW.device), None
        if selection is not None:
            scores = moby.pair_losses((views_BNCHW,), selection)
            choice_B = select(scores.losses_BP, selection.rule)
        loss, _ = moby.loss(moby.take((views_BNCHW,), choice_B, scores))
        self._descend(loss)
        moby.after_step()
        return choice_B

    def obvious_step(self, views_BNCHW: Tensor) -> None:
        """One step of the obvious composition."""
        moby, selection = self.moby, SelectionConfig(views=views_BNCHW.shape[1])
        choice_B = loop_pair_losses(moby, views_BNCHW, selection).argmax(1)
        pair_B2CHW = moby.take((views_BNCHW,), choice_B, None).crops[0]
        loss, k1, k2 = naive_loss(moby, pair_B2CHW)
        self._descend(loss)
        moby.keep_keys(k1, k2)
        moby.after_step()

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def digit_views(bench: StepBench, step: int) -> Tensor:
    """[B, N, 3, S, S]: crops of 20 to 100 % of the area of scikit-learn's digits, in varied brightness and contrast."""
    generator = torch.Generator().manual_seed(step)
    digits = torch.from_numpy(load_digits(return_X_y=True)[0]).float().view(-1, 8, 8) / 16
    picked = torch.randint(len(digits), (bench.batch,), generator=generator)
    images = digits[picked].repeat_interleave(bench.views, 0)[:, None].expand(-1, 3, -1, -1)
    count = len(images)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    side = between(0.2, 1.0).sqrt()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = between(-1, 1, 2) * (1 - side)[:, None]
    grid = F.affine_grid(theta, [count, 3, bench.size, bench.size], align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False)
    views = (views - 0.5) * between(0.4, 1.6, 3, 1, 1) + between(-0.4, 0.4, 1, 1, 1)
    return views.unflatten(0, (bench.batch, bench.views)).to(bench.device)


def step_times(bench: StepBench) -> dict[str, float]:
    """Median milliseconds of each side's step; the sides take turns."""
    views_BNCHW = digit_views(bench, 0)
    plain, obvious, precise = (Learner(bench, negatives) for negatives in (NONE, ALWAYS, ALWAYS))
    full, target = (Learner(bench, ALWAYS, target_bf16=True) for _ in range(2))
    scored = {name: replace(s, views=bench.views) for name, s in SELECTIONS.items()}
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.step(views_BNCHW, None),
        "obvious": lambda: obvious.obvious_step(views_BNCHW),
        "precise": lambda: precise.step(views_BNCHW, scored["precise"]),
        "full": lambda: full.step(views_BNCHW, scored["full"]),
        "target": lambda: target.step(views_BNCHW, scored["target"]),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(bench.rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if bench.device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def choices(bench: StepBench, trained_by: str) -> dict[str, float]:
    """Agreement and regret of the bf16 and the target choice: means over a training without its first tenth, in which
    the learning rate rises. It learns from the pairs chosen by `trained_by` of SELECTIONS, or from random ones."""
    learner = Learner(bench, ALWAYS, target_bf16=True)
    scored = {name: replace(s, views=bench.views) for name, s in SELECTIONS.items()}
    warm = max(1, bench.steps // 10)
    found: dict[str, list[float]] = {}
    for step in range(bench.steps):
        views_BNCHW = digit_views(bench, step)
        if step >= warm and (step - warm) % bench.audit_every == 0:
            precise_BP = learner.moby.pair_losses((views_BNCHW,), scored["precise"]).losses_BP
            for name in ("full", "target"):
                losses_BP = learner.moby.pair_losses((views_BNCHW,), scored[name]).losses_BP
                for key, value in audit(precise_BP, losses_BP.argmax(1), scored[name]).items():
                    found.setdefault(f"{key.removeprefix('selection/')}_{name}", []).append(float(value))
        for group in learner.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / warm)
        learner.step(views_BNCHW, scored.get(trained_by))
    return {f"{name}_{trained_by}": statistics.fmean(values) for name, values in found.items()}


def measure(bench: StepBench) -> dict[str, float]:
    """Figures by name: ratios to the plain step, times in milliseconds, agreement and regret as shares."""
    times = step_times(bench)
    ratios = {
        "overhead": times["full"] / times["plain"],
        "overhead_precise": times["precise"] / times["plain"],
        "overhead_target": times["target"] / times["plain"],
        "baseline_overhead": times["obvious"] / times["plain"],
    }
    judged: dict[str, float] = {}
    for trained_by in ("random", "full", "target") if bench.steps else ():
        judged |= choices(bench, trained_by)
    if judged:  # by what each kind of step itself trains on
        own = {
            "agreement": "agreement_full_full",
            "regret": "regret_full_full",
            "regret_target": "regret_target_target",
        }
        ratios |= {name: judged[key] for name, key in own.items()}
    return {**ratios, **judged, **{f"{name}_ms": value for name, value in times.items()}}


def main(argv: Sequence[str]) -> None:
    bench = parse(StepBench, argv, prog="hardviews bench step")
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda asked for, but torch sees no CUDA device; take --device cpu")
    for name in ("batch", "depth", "rounds", "audit_every"):
        if getattr(bench, name) < 1:
            raise InputError(f"{name}: {getattr(bench, name)} must be at least 1")
    if bench.threads > 0:
        torch.set_num_threads(bench.threads)
    try:
        figures = measure(bench)
    except ValueError as error:
        raise InputError(str(error)) from error
    Console().print(table(bench, figures))
    if bench.json:
        print(json.dumps(figures))


def table(bench: StepBench, figures: dict[str, float]) -> Table:
    """A row per kind of step; agreement and regret by what the training learned from."""
    title = f"{bench.backbone}, {(bench.size // bench.patch) ** 2} tokens, depth {bench.depth}, batch {bench.batch}"
    learned = [name for name in ("random", "full", "target") if f"regret_full_{name}" in figures]
    shares = [f"same choice, regret\nlearning from {name}" for name in learned]
    result = Table("step", "ms", "of plain", *shares, title=title)
    texts = {
        "plain": ("plain MoBY", ""),
        "obvious": ("obvious", "baseline_overhead"),
        "precise": ("scored in fp32", "overhead_precise"),
        "full": ("full: in bf16", "overhead"),
        "target": ("target alone, bf16", "overhead_target"),
    }
    for name, (text, ratio) in texts.items():
        keys = [(f"agreement_{name}_{by}", f"regret_{name}_{by}") for by in learned]
        judged = [f"{figures[a]:.1%}, {figures[r]:.1%}" if a in figures else "" for a, r in keys]
        result.add_row(text, f"{figures[f'{name}_ms']:,.0f}", f"{figures[ratio]:.2f}×" if ratio else "1", *judged)
    result.caption = f"{bench.views} views; with bf16 scores the target is in bf16 in the loss too"
    return result
