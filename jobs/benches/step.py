"""`hardviews bench step`: what hard views and synthetic negatives add to a plain MoBY step, by turns in one run.

Every side is a whole optimizer step: selection, loss, backward, AdamW, momentum and queues. `obvious` is the plain
composition of `jobs.benches.obvious`. Then short trainings of a small ViT measure how far cheaper choices agree with
the full one, and their regret, after the first tenth of the steps. Regret depends on what is learned from, so each kind
of step is judged by a training on pairs that it chose itself, and where it needs no teaching, on those of the full one.

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
from jobs.run.command import parse, tables
from jobs.run.memory import keep_freed_memory
from jobs.run.schedule import warmup_cosine
from models.backbones import BackboneConfig
from models.blocks import half_depth
from models.candidates import RandomPairs
from models.negatives import NONE, NegativesConfig
from models.objectives import Length, build_objective
from models.objectives.moby import MoBY, MoBYConfig
from models.precision import Precision, has_units, resolved
from models.selection import SelectionConfig, audit, pairs
from pipelines.crop import crop_views
from pipelines.draw import draw
from pipelines.photometric import fused
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
    """Length of the four trainings that agreement and regret are measured in (steps), an hour of a core;
    0 = leave them out. The shorter, the more of a training passes while the target still lags behind its start."""
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
        """The encoder whose steps are timed."""
        return BackboneConfig(self.backbone, self.size, self.patch, depth=self.depth)


JUDGES = ("full", "alone", "target", "early")
UNTAUGHT = ("full", "alone")  # of these; the others learn from what they choose, and are judged by nothing else
# What is trained to judge choices: narrow, but as deep as what is timed, which decides what a first half knows; with a
# queue that the first tenth of a short training fills.
JUDGED = BackboneConfig("vit_tiny_patch16_224", 32, 8, width=64, depth=6, heads=2)
JUDGED_OBJECTIVE = MoBYConfig(ALWAYS, queue=1024, hidden=256)


def target_precision(device: str) -> Precision:
    """What the target computes in where it scores: bf16, or int8 where a device has no units for bf16 but for that."""
    if has_units(torch.device(device), "bf16"):
        return "bf16"
    return "int8" if has_units(torch.device(device), "int8") else "same"


def selections(bench: StepBench, backbone: BackboneConfig) -> dict[str, SelectionConfig]:
    """Side → how its pairs are scored. `precise` computes as training does; the others in bf16 where the device can,
    and the target in what is fastest there, because it asks for no more than a guess."""
    fast = SelectionConfig(bench.views, precision="auto")
    target = replace(fast, encoder="target", precision=target_precision(bench.device))
    return {
        "precise": SelectionConfig(bench.views),
        "full": fast,
        "alone": replace(fast, encoder="online-alone"),
        "target": target,
        "early": replace(target, layer=half_depth(backbone)),
    }


def as_scored(backbone: BackboneConfig, selection: SelectionConfig) -> BackboneConfig:
    """With the target in the number format of scoring, so that the loss uses what was scored again."""
    return replace(backbone, target_precision=selection.precision)


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
            order_B = torch.randperm(images, device=device)
            random = RandomPairs.drawn(order_B, choice_B, selection.share_at_random)
            scores = moby.pair_losses((views_BNCHW,), selection, random)
            choice_B = random.put(scores.best(selection.rule))
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
    ids_B = np.random.default_rng(step).choice(len(images), bench.batch, replace=False)
    params = draw(policy, ids_B, np.full(bench.batch, step), 0, np.full((bench.batch, 2), PATCH))
    crops_BNSS3 = torch.empty(bench.batch, bench.views, size, size, 3, dtype=torch.uint8)
    for row, number in enumerate(ids_B):
        crop_views(images[number], params[row], crops_BNSS3[row])
    views_BN3SS = torch.empty(bench.batch, bench.views, 3, size, size)
    fused(crops_BNSS3.flatten(0, 1).numpy(), params, views_BN3SS.flatten(0, 1))
    return views_BN3SS.to(bench.device)


def step_times(bench: StepBench) -> dict[str, float]:
    """Median milliseconds of each side's step; the sides take turns."""
    views_BNCHW = photograph_views(bench, bench.size, 0)
    scored = selections(bench, bench.shape)
    sides: dict[str, Callable[[], object]] = {}
    for name, backbone, negatives in (
        ("plain", bench.shape, NONE),
        ("obvious", bench.shape, ALWAYS),
        ("precise", bench.shape, ALWAYS),
        *((name, as_scored(bench.shape, scored[name]), ALWAYS) for name in JUDGES),
    ):
        learner = Learner(bench, MoBYConfig(negatives), backbone, LONG)
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
    """Agreement and regret of UNTAUGHT and of what trains, which is `trained_by` of JUDGES: means over a whole short
    training without its first tenth. The learning rate rises in that tenth and falls by a cosine after it, the target's
    momentum goes from 0.99 to 1."""
    scored = selections(bench, JUDGED)
    learner = Learner(bench, JUDGED_OBJECTIVE, as_scored(JUDGED, scored[trained_by]), Length(bench.steps, bench.steps))
    warm = max(1, bench.steps // 10)
    found: dict[str, list[float]] = {}
    for step in range(bench.steps):
        views_BNCHW = photograph_views(bench, JUDGED.image_size, step)
        if step >= warm and (step - warm) % bench.audit_every == 0:
            precise_BP = learner.moby.pair_losses((views_BNCHW,), scored["precise"].full).losses_BP
            for name in dict.fromkeys((*UNTAUGHT, trained_by)):
                choice_B = learner.moby.pair_losses((views_BNCHW,), scored[name]).best("hardest")
                for key, value in audit(precise_BP, choice_B, scored[name]).items():
                    found.setdefault(f"{key.removeprefix('selection/')}_{name}", []).append(float(value))
        for group in learner.optimizer.param_groups:
            group["lr"] = warmup_cosine(step, bench.steps, warm, JUDGED_RATE)
        learner.step(views_BNCHW, scored[trained_by])
    return {f"{name}_{trained_by}": statistics.fmean(values) for name, values in found.items()}


def measure(bench: StepBench) -> dict[str, float | str]:
    """Figures by name: ratios to the plain step, times in milliseconds, agreement and regret as shares; the number
    formats of the fast scores and of the target where it scores."""
    times = step_times(bench)
    ratios = {
        "overhead": times["full"] / times["plain"],
        "overhead_precise": times["precise"] / times["plain"],
        "overhead_alone": times["alone"] / times["plain"],
        "overhead_target": times["target"] / times["plain"],
        "overhead_early": times["early"] / times["plain"],
        "baseline_overhead": times["obvious"] / times["plain"],
    }
    judged: dict[str, float] = {}
    for trained_by in JUDGES if bench.steps else ():
        judged |= choices(bench, trained_by)
    if judged:  # by what each kind of step itself trains on
        ratios |= {"agreement": judged["agreement_full_full"], "regret": judged["regret_full_full"]}
        ratios |= {f"regret_{name}": judged[f"regret_{name}_{name}"] for name in ("alone", "target", "early")}
    return {
        **ratios,
        **judged,
        **{f"{name}_ms": value for name, value in times.items()},
        "precision": format_name(resolved("auto", torch.device(bench.device))),
        "target_precision": format_name(target_precision(bench.device)),
    }


def format_name(precision: Precision) -> str:
    """What a number format is called beside training in fp32."""
    return "fp32" if precision == "same" else precision


def main(argv: Sequence[str]) -> None:
    keep_freed_memory()
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
    tables.print(table(bench, figures))
    if bench.json:
        print(json.dumps(figures))


def table(bench: StepBench, figures: dict[str, float | str]) -> Table:
    """A row per kind of step; agreement and regret by what the training learned from."""
    title = f"{bench.backbone}, {(bench.size // bench.patch) ** 2} tokens, depth {bench.depth}, batch {bench.batch}"
    learned = ("full choice", "its own choice") if "agreement" in figures else ()
    shares = [f"same choice, regret\nlearning from {name}" for name in learned]
    result = Table("step", "ms", "of plain", *shares, title=title)
    texts = {
        "plain": ("plain MoBY", ""),
        "obvious": ("obvious", "baseline_overhead"),
        "precise": ("scored in fp32", "overhead_precise"),
        "full": (f"full: in {figures['precision']}", "overhead"),
        "alone": ("online alone, the same", "overhead_alone"),
        "target": (f"target alone, in {figures['target_precision']}", "overhead_target"),
        "early": ("half of the target, the same", "overhead_early"),
    }
    for name, (text, ratio) in texts.items():
        judged = []
        for trained_by in ("full", name) if learned and name in JUDGES else ():
            keys = [f"{what}_{name}_{trained_by}" for what in ("agreement", "regret")]
            judged.append(", ".join(f"{figures[key]:.1%}" for key in keys if key in figures))
        result.add_row(text, f"{figures[f'{name}_ms']:,.0f}", f"{figures[ratio]:.2f}×" if ratio else "1", *judged)
    result.caption = f"{bench.views} views; a quarter of the images that the target chooses for train on a random pair"
    return result
