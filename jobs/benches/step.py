"""`hardviews bench step`: what hard views and synthetic negatives add to a plain MoBY step, by turns in one run.

Every side is a whole optimizer step: selection, loss, backward, AdamW, momentum and queues. `plain` is the `moby`
preset, the others are `synby` with hard views, with the drop paths of these presets; `obvious` is the plain composition
of `jobs.benches.obvious`. Then short trainings of a small ViT measure how far the choices agree with the full one in
fp32, and their regret, after the first tenth of the steps. Regret depends on the pairs that were trained on, so each
kind of choice is judged in a training on its own choices.

Shape suffixes: B images, N views, P pairs.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor

from jobs.benches.obvious import loop_pair_losses, naive_loss
from jobs.run.optim import warmup_cosine
from jobs.run.presets import moby, synby
from jobs.run.process import keep_freed_memory
from jobs.run.terminal import parse, tables
from models.backbones import BackboneConfig
from models.negatives import NegativesConfig
from models.objectives import Length, build_objective
from models.objectives.moby import MoBY, MoBYConfig
from models.precision import resolved
from models.selection import SelectionConfig, pairs, select
from pipelines.colour_host import fused
from pipelines.crop import crop_views
from pipelines.draw import draw
from pipelines.policies import build_policy
from shards.errors import InputError

RATE, JUDGED_RATE = 5e-4, 1e-3
ALWAYS = NegativesConfig(start_epoch=0, last_epochs_without=0)
LONG = Length(100_000, 1000)  # the length of the runs whose steps are timed


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
    steps: int = 1600
    """Length of the two trainings that agreement and regret are measured in (steps), half an hour of a core; 0 = leave
    them out. The shorter, the more of a training passes while the target still lags behind its start."""
    audit_every: int = 20
    """Steps between two comparisons."""
    threads: int = 0
    """CPU threads; 0 for torch's own choice."""
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""

    @property
    def shape(self) -> BackboneConfig:
        """The encoder whose steps are timed, without drop path."""
        return BackboneConfig(self.backbone, self.size, self.patch, depth=self.depth)


JUDGES = ("full", "target")
# What is trained to judge choices: narrow, with a queue that the first tenth of a short training fills.
JUDGED = synby(BackboneConfig("vit_tiny_patch16_224", 32, 8, width=64, depth=6, heads=2)).backbone
JUDGED_OBJECTIVE = MoBYConfig(ALWAYS, queue=1024, hidden=256)


def selections(bench: StepBench) -> dict[str, SelectionConfig]:
    """Side → how its pairs are scored. `precise` in the number format of training, the others in bf16 where the device
    has units for it."""
    fast = SelectionConfig(bench.views, precision="auto")
    return {"precise": SelectionConfig(bench.views), "full": fast, "target": replace(fast, encoder="target")}


class Learner:
    """An objective with its optimizer."""

    def __init__(self, bench: StepBench, config: MoBYConfig, backbone: BackboneConfig, length: Length) -> None:
        torch.manual_seed(0)
        objective = build_objective(config, backbone, length)
        assert isinstance(objective, MoBY)
        self.moby = objective.to(bench.device).train()
        learned = [p for p in self.moby.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.05)

    def step(self, views_BNCHW: Tensor, selection: SelectionConfig | None) -> None:
        """One step; on random pairs where there is no selection."""
        moby, device = self.moby, views_BNCHW.device
        images = len(views_BNCHW)
        choice_B = torch.randint(len(pairs(views_BNCHW.shape[1])), (images,), device=device)
        scores = None
        if selection is not None:
            scores = moby.pair_losses((views_BNCHW,), selection)
            at_random_B = torch.rand(images, device=device) < selection.share_at_random
            choice_B = torch.where(at_random_B, choice_B, select(scores.losses_BP, selection.rule))
        loss, _ = moby.loss(moby.take((views_BNCHW,), choice_B, scores))
        self._descend(loss)
        moby.after_step()

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


PATCH = 64  # side of the images, pixels


@cache
def photographs() -> Tensor:
    """uint8 [M, 64, 64, 3]: overlapping patches of the two photographs that scikit-learn carries."""
    images = [torch.tensor(image) for image in load_sample_images().images]
    rows = [image.unfold(0, PATCH, 8).unfold(1, PATCH, 8) for image in images]
    return torch.cat([patches.flatten(0, 1) for patches in rows]).permute(0, 2, 3, 1).contiguous()


def photograph_views(bench: StepBench, size: int, step: int) -> Tensor:
    """[B, N, 3, S, S] of S = `size` pixels: views of BYOL's policy of patches of photographs."""
    images, policy = photographs(), build_policy("byol", size, bench.views)
    sample_B = np.random.default_rng(step).choice(len(images), bench.batch, replace=False)
    params = draw(policy, sample_B, np.full(bench.batch, step), 0, np.full((bench.batch, 2), PATCH))
    crops_BNSS3 = torch.empty(bench.batch, bench.views, size, size, 3, dtype=torch.uint8)
    for row, number in enumerate(sample_B):
        crop_views(images[number], params[row], crops_BNSS3[row])
    views_BN3SS = torch.empty(bench.batch, bench.views, 3, size, size)
    fused(crops_BNSS3.flatten(0, 1).numpy(), params, views_BN3SS.flatten(0, 1))
    return views_BN3SS.to(bench.device)


def step_times(bench: StepBench) -> dict[str, float]:
    """Median milliseconds of each side's step; the sides take turns."""
    views_BNCHW = photograph_views(bench, bench.size, 0)
    scored, plain, hard = selections(bench), moby(bench.shape), synby(bench.shape)
    assert isinstance(plain.objective, MoBYConfig)
    sides: dict[str, Callable[[], object]] = {}
    for name in ("plain", "obvious", *scored):
        objective = plain.objective if name == "plain" else MoBYConfig(ALWAYS)
        backbone = plain.backbone if name == "plain" else hard.backbone
        learner = Learner(bench, objective, backbone, LONG)
        run = learner.obvious_step if name == "obvious" else partial(learner.step, selection=scored.get(name))
        sides[name] = partial(run, views_BNCHW)
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
    """Agreement and regret of the choices that train, `trained_by` of JUDGES: means over a whole short training without
    its first tenth. The learning rate rises in that tenth and falls by a cosine after it, the target's momentum goes
    from 0.99 to 1."""
    selection = selections(bench)[trained_by]
    learner = Learner(bench, JUDGED_OBJECTIVE, JUDGED, Length(bench.steps, bench.steps))
    warm = max(1, bench.steps // 10)
    values_by_name: dict[str, list[float]] = {}
    for step in range(bench.steps):
        views_BNCHW = photograph_views(bench, JUDGED.image_size, step)
        if step >= warm and (step - warm) % bench.audit_every == 0:
            choice_B = select(learner.moby.pair_losses((views_BNCHW,), selection).losses_BP, "hardest")
            for key, value in learner.moby.audit((views_BNCHW,), choice_B, selection).items():
                values_by_name.setdefault(f"{key.removeprefix('selection/')}_{trained_by}", []).append(float(value))
        for group in learner.optimizer.param_groups:
            group["lr"] = warmup_cosine(step, bench.steps, warm, JUDGED_RATE)
        learner.step(views_BNCHW, selection)
    return {name: statistics.fmean(values) for name, values in values_by_name.items()}


def measure(bench: StepBench) -> dict[str, float | str]:
    """Figures by name: ratios to the plain step, times in milliseconds, agreement and regret as shares; the number
    format of the fast scores."""
    times = step_times(bench)
    judged: dict[str, float] = {}
    for trained_by in JUDGES if bench.steps else ():
        judged |= choices(bench, trained_by)
    return {
        "overhead": times["full"] / times["plain"],
        "overhead_precise": times["precise"] / times["plain"],
        "overhead_target": times["target"] / times["plain"],
        "baseline_overhead": times["obvious"] / times["plain"],
        **judged,
        **{f"{name}_ms": value for name, value in times.items()},
        "precision": "bf16" if resolved("auto", torch.device(bench.device)) == "bf16" else "fp32",
    }


def main(argv: Sequence[str]) -> None:
    bench = parse(StepBench, argv, prog="hardviews bench step")
    if bench.device == "cpu":
        keep_freed_memory()
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
    tables.print(table(bench, figures))
    if bench.json:
        print(json.dumps(figures))


def table(bench: StepBench, figures: dict[str, float | str]) -> Table:
    """A row per kind of step; agreement and regret in a training on its own choices."""
    title = f"{bench.backbone}, {(bench.size // bench.patch) ** 2} tokens, depth {bench.depth}, batch {bench.batch}"
    result = Table("step", "ms", "of plain", "same choice", "regret", title=title)
    texts = {
        "plain": ("plain MoBY", ""),
        "obvious": ("obvious", "baseline_overhead"),
        "precise": ("scored in fp32", "overhead_precise"),
        "full": (f"scored in {figures['precision']}", "overhead"),
        "target": ("by the target alone, the same", "overhead_target"),
    }
    for name, (text, ratio) in texts.items():
        shares = [figures.get(f"{key}_{name}") for key in ("agreement", "regret")]
        judged = ["" if share is None else f"{share:.1%}" for share in shares]
        result.add_row(text, f"{figures[f'{name}_ms']:,.0f}", f"{figures[ratio]:.2f}×" if ratio else "1", *judged)
    result.caption = f"{bench.views} views; a quarter of the images that the target chooses for train on a random pair"
    return result
