"""What is watched while training: losses, choices, speed, health, kNN of the training stream and of held-out images.

Figures of losses, choices and contrastive tasks in `train/` and `selection/` are means over the images of all ranks and
all steps since the last line that have them. `health/` is about the newest step's features and embeddings of all ranks,
`contrast/`, `grad/`, `time/` and `system/` about the leading rank. docs/metrics.md names all.

Shape suffixes: B images of this rank, D width, P pairs.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.evaluation.features import extract_features
from jobs.evaluation.images import align_labels, label_table, open_images, warn_unscored
from jobs.evaluation.knn import knn_scores
from jobs.run.config import PretrainConfig
from jobs.run.metrics import Loggers
from jobs.run.optim import Schedule
from jobs.run.world import World
from jobs.training.health import FiniteGuard, forward_flops, peak_flops
from jobs.training.memory_bank import MemoryBank
from jobs.training.timing import StepTimer
from jobs.training.verdict import DISTILLATION, Margins, Signs, Verdict, judge
from models.distributed import gather
from models.objectives import Length, Objective
from models.objectives.dino import DINO
from models.probes import by_source, contrast_report, feature_std, positives_report, rankme
from pipelines.batch import ViewBatch
from pipelines.params import pair_iou

CURVE_POINTS = 64
# Parts of a step on the progress line; TensorBoard has all that the timer knows.
PHASES = ("data", "selection", "forward", "backward", "optimizer", "log")
Total = float | Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the monitor."""

    loss: float
    """Mean over ranks."""
    norm: float
    """Of the gradient before clipping, mean over ranks."""
    choice_B: np.ndarray
    """The pairs that trained."""
    at_random_B: np.ndarray
    """bool: images that train on a random pair although their step chooses by the rule."""
    losses_BP: np.ndarray | None
    metrics: dict[str, Tensor]
    """The objective's."""
    layer_norms: dict[str, Tensor]
    """Gradient norms by layer before clipping; empty where the monitor does not watch the step."""
    stopping: bool = False
    """Whether any rank has been asked to stop: the same on all."""


@dataclass
class Monitor:
    """Collects what is watched and gives it to the loggers."""

    config: PretrainConfig
    world: World
    objective: Objective
    length: Length
    schedule: Schedule
    guard: FiniteGuard
    timer: StepTimer
    sources: Sequence[str]
    """Names of the images' sources."""
    curves: Path
    """File of the contrastive tasks' curves."""
    bank: MemoryBank | None
    loggers: Loggers | None = None
    """On the leading rank."""
    note: str = ""
    """For the progress line."""
    images_per_second: float | None = None
    newest_knn: float | None = None
    verdict: Verdict | None = None
    """How the run stands, since the first line of metrics."""
    signs: Signs = field(default_factory=Signs)
    _flops: float | None = None
    _sums: dict[str, tuple[Total, Total]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.objective.target is not None:
            self.signs.first_target_norm = parameters_norm(self.objective.target)

    def watches(self, step: int) -> bool:
        """Whether features, embeddings and contrastive tasks of step number `step` (from 1) are analysed."""
        return bool(self.config.monitor.health_every) and step % self.config.monitor.health_every == 0

    def after_step(self, step: int, batch: ViewBatch, result: StepResult) -> None:
        """Takes in step number `step` (from 1); every `monitor.every` steps, writes means since the last time."""
        self._add("train/loss", result.loss, 1)
        self._add("train/grad_norm", result.norm, 1)
        for name, value in result.metrics.items():
            self._add(name if "/" in name else f"train/{name}", value.detach(), 1)
        if result.losses_BP is not None:
            self._add("train/loss_random_pair", random_pair_loss(result, result.losses_BP), 1)
        for name, (total, count) in choice_statistics(batch, result, self.config.selection.views, self.sources).items():
            self._add(name, total, count)
        settings, last = self.config.monitor, step == self.length.steps
        due = step % settings.every == 0 or last
        if self.bank is not None and self.objective.seen_features_BD is not None:
            self._use_bank(self.bank, batch, self.objective.seen_features_BD, due)
        if due:
            self._write(step)
        if self.watches(step):
            self._write_health(step, batch, result.layer_norms)
        if due:
            self.judge(step)
        if last or (settings.knn_every and step % settings.knn_every == 0):
            self.evaluate(step)

    def judge(self, step: int) -> None:
        """Judges the run after step number `step`, where a line of metrics was written."""
        if self.signs.lost or math.isfinite(self.signs.loss):
            margins = DISTILLATION if isinstance(self.objective, DINO) else Margins()
            self.verdict = judge(self.signs, step, self.length.steps, margins)
            self.signs.learned |= self.verdict.name == "learning"

    def evaluate(self, step: int) -> None:
        """kNN top-1 of the held-out images, where the configuration names some; the leading rank measures it."""
        settings = self.config.monitor
        if settings.knn_train:
            top1 = 0.0
            if self.loggers is not None:
                backbone, names = self.objective.backbone, (settings.knn_train, settings.knn_test)
                top1 = held_out_knn(backbone, *names, self.config, self.world)
                self.loggers.log(step, {"knn/top1": top1})
            shared = self.world.mean(torch.tensor([top1], dtype=torch.float64, device=self.world.device))
            self.newest_knn = float(shared) * self.world.size  # the other ranks gave 0
            if self.config.origin is not None:
                self.signs.take_knn(self.newest_knn)
                self.judge(step)
        self.world.barrier()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        bank = self.bank.state_dict() if self.bank else {}
        return {"bank": bank, "newest_knn": self.newest_knn, "signs": self.signs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])
        self.newest_knn = state["newest_knn"]
        self.signs.load_state_dict(state["signs"])

    def _add(self, name: str, total: Total, count: Total) -> None:
        before, counted = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before + total, counted + count)

    def _use_bank(self, bank: MemoryBank, batch: ViewBatch, features_BD: Tensor, due: bool) -> None:
        """Updates the bank with the images of all ranks; scores them where a line is due, before they are in it."""
        rows = (batch.sample_B, batch.label_B)
        device = features_BD.device
        ids, labels = (torch.from_numpy(v.astype(np.int64)).to(device, non_blocking=True) for v in rows)
        gathered = (gather(ids), gather(features_BD), gather(labels))
        if due:
            right_B, counted_B = bank.score(*gathered)
            for suffix, own_B in by_source(gather(sources(batch, device)), self.sources).items():
                self._add(f"monitor/bank_knn{suffix}", (right_B & own_B).sum(), (counted_B & own_B).sum())
        bank.update(*gathered)

    def _means(self) -> dict[str, float]:
        """Means since the last time over the images of all ranks, and a new start. Ranks hold the same names."""
        names = sorted(self._sums)
        totals = torch.tensor([[float(v) for v in self._sums[n]] for n in names], dtype=torch.float64)
        totals = self.world.mean(totals.to(self.world.device)).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def _write(self, step: int) -> None:
        scalars = self._means()
        scalars["train/lr"] = self.schedule.lr(step - 1)
        scalars["train/weight_decay"] = self.schedule.weight_decay(step - 1)
        scalars["train/epoch"] = step / self.length.steps_per_epoch
        scalars["train/skipped_steps"] = float(self.guard.skipped)
        scalars |= self.timer.report(self.config.batch)
        scalars["data/wait_share"] = scalars.get("time/data", 0.0) / scalars["time/step"]
        scalars["system/memory_gb"] = memory_gb(self.world.device)
        scalars["system/mfu"] = self._utilisation(scalars["train/images_per_second"])
        self.images_per_second = scalars["train/images_per_second"]
        chance = self.objective.chance(self.config.batch // self.config.accumulate, real=True)
        self.signs.filled = step * self.config.batch >= getattr(self.config.objective, "queue", 0)
        real = scalars.get("train/loss_real", scalars["train/loss"])
        self.signs.take_loss(scalars.get("train/loss_random_pair", real), chance)
        self.note = note(scalars)
        if self.loggers is not None:
            self.loggers.log(step, scalars)

    def _write_health(self, step: int, batch: ViewBatch, layer_norms: dict[str, Tensor]) -> None:
        """Gradient norms before clipping, the spread of the features, alignment and uniformity of the embeddings that
        the loss compared, and what the contrastive tasks were like."""
        objective, names = self.objective, self.sources
        scalars = {f"grad/{layer}": float(own) for layer, own in layer_norms.items()}
        source_B, curves = sources(batch, self.world.device), {}
        if objective.seen_features_BD is not None:
            scalars |= feature_health(gather(objective.seen_features_BD), gather(source_B), names)
        if objective.positives:
            pairs = [(gather(first_BD), gather(second_BD)) for first_BD, second_BD in objective.positives]
            # With gradient accumulation, these and the tasks are of the last part.
            last_B = source_B[-len(objective.positives[0][0]) :]
            scalars |= prefixed("health", positives_report(pairs, gather(last_B), names))
            if self.loggers is not None and objective.contrasts:
                means, curves = contrast_report(objective.contrasts, last_B, names)
                scalars |= prefixed("contrast", means)
        if objective.target is not None:
            scalars["health/target_norm"] = parameters_norm(objective.target)
        objective.positives.clear()
        objective.contrasts.clear()
        self.signs.take_health(scalars)
        if self.loggers is not None:
            self.loggers.log(step, scalars)
            write_curves(self.curves, step, curves)

    def _utilisation(self, images_per_second: float) -> float:
        """Share of the device's peak FLOP/s that plain training's forwards and backwards of two views use.

        Counts 2 online views forward and backward (3 forwards each) and 2 target forwards, whatever selection adds.
        """
        if self._flops is None:
            size, device = self.config.backbone.image_size, self.world.device
            forward = forward_flops(self.objective.backbone, size, device)
            forwards = 8 if self.objective.target is not None else 6
            self._flops = forwards * forward / (peak_flops(device) * self.world.size)
        return self._flops * images_per_second


def note(scalars: dict[str, float]) -> str:
    """What the progress line says: loss, speed, each phase's share of the time of a step, memory, utilisation."""
    shares = {name: scalars.get(f"time/{name}", 0.0) / scalars["time/step"] for name in PHASES}
    split = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return (
        f"loss {scalars['train/loss']:.2f}, {scalars['train/images_per_second']:,.0f} images/s ({split}), "
        f"{scalars['system/memory_gb']:.1f} GB, MFU {scalars['system/mfu']:.0%}"
    )


def random_pair_loss(result: StepResult, losses_BP: np.ndarray) -> Total:
    """A scored step's loss, against real negatives alone, less what the chosen pairs' losses are above the mean pair's:
    what random pairs would have. Easy pairs' own loss is low whatever is learned."""
    chosen_B = losses_BP[np.arange(len(losses_BP)), result.choice_B]
    return result.metrics.get("loss_real", result.loss) - float((chosen_B - losses_BP.mean(1)).mean())


def choice_statistics(
    batch: ViewBatch, result: StepResult, views: int, names: Sequence[str]
) -> dict[str, tuple[float, int]]:
    """Sum and count over images, all and of each source, of: whether the pair of least overlap was chosen, the chosen
    pair's overlap, its loss, and what that is above the mean pair's; the last two of images that were scored, the last
    without those on random pairs, whose pairs the rule did not choose."""
    if views == 2:
        return {}
    iou_BP = pair_iou(batch.params[:, :views])
    rows = np.arange(len(result.choice_B))
    chosen_iou_B = iou_BP[rows, result.choice_B]
    values = {"lowest_iou_share": chosen_iou_B <= iou_BP.min(1), "chosen_iou": chosen_iou_B}
    if result.losses_BP is not None:
        chosen_loss_B = result.losses_BP[rows, result.choice_B]
        gain_B = np.where(result.at_random_B, np.nan, chosen_loss_B - result.losses_BP.mean(1))
        values |= {"chosen_loss": chosen_loss_B, "gain": gain_B}
    groups = {"": np.ones(len(rows), np.bool_)}
    groups |= {f"/{source}": batch.source_B == number for number, source in enumerate(names)}
    return {
        f"selection/{name}{suffix}": (float(values_B[own_B & known_B].sum()), int((own_B & known_B).sum()))
        for name, values_B in values.items()
        for known_B in (~np.isnan(values_B),)
        for suffix, own_B in groups.items()
    }


def sources(batch: ViewBatch, device: torch.device) -> Tensor:
    """int64 [B]: each image's source."""
    return torch.from_numpy(batch.source_B.astype(np.int64)).to(device, non_blocking=True)


def prefixed(group: str, scalars: dict[str, Tensor]) -> dict[str, float]:
    """The scalars on the host, under `group/name`, without those that nothing is known about."""
    return {f"{group}/{name}": float(value) for name, value in scalars.items() if not value.isnan()}


def feature_health(features_BD: Tensor, source_B: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Standard deviation and RankMe of features, over all and by source; nothing where they are not finite."""
    if not bool(torch.isfinite(features_BD).all()):
        return {}
    scalars = {}
    for suffix, own_B in by_source(source_B, names).items():
        rows_BD = features_BD[own_B]
        if len(rows_BD) > 1:
            scalars[f"health/feature_std{suffix}"] = float(feature_std(rows_BD))
            scalars[f"health/rankme{suffix}"] = float(rankme(rows_BD))
    return scalars


def parameters_norm(model: nn.Module) -> float:
    """ℓ2 norm of all parameters together."""
    norms = torch._foreach_norm(list(model.parameters()))  # pyright: ignore[reportPrivateImportUsage]
    return float(torch.linalg.vector_norm(torch.stack(norms).double()))


def write_curves(path: Path, step: int, curves: dict[str, Tensor]) -> None:
    """Appends curves to `curves.jsonl`: step, ranks (from 1, evenly spaced in their logarithm) and values by name, up
    to the last value above 0, behind which there are no negatives."""
    line: dict[str, Any] = {"step": step}
    for name, values in curves.items():
        if not values.isnan().any():
            values = values[: int((values > 0).sum())]
            ranks = np.unique(np.geomspace(1, len(values), CURVE_POINTS).round().astype(int))
            line[name] = {"rank": ranks.tolist(), "value": values.cpu().numpy()[ranks - 1].tolist()}
    if len(line) > 1:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def check_held_out(train: str, test: str, leads: bool) -> None:
    """Says, on the leading rank, which images the held-out kNN leaves out.

    Raises:
        InputError: it could not be measured: images that are not there or have no labels.
    """
    with closing(open_images(train)) as known, closing(open_images(test)) as held_out:
        align_labels(known, held_out)
        if leads:
            warn_unscored(known, held_out)


def held_out_knn(backbone: nn.Module, train: str, test: str, config: PretrainConfig, world: World) -> float:
    """kNN top-1 (0 to 1, k = 20) on the images of `test` from those of `train`, by frozen features."""
    size, batch = config.backbone.image_size, min(256, max(32, config.batch))
    known, held_out = open_images(train), open_images(test)
    try:
        table = torch.from_numpy(label_table(known, held_out))  # a held-out image's own label → the training label
        train_nD, labels_n, _ = extract_features(backbone, known, size, world.device, batch)
        test_qD, own_q, _ = extract_features(backbone, held_out, size, world.device, batch)
        return float(knn_scores(train_nD, labels_n, test_qD, table[own_q], known.classes)["top1"])
    finally:
        known.close()
        held_out.close()


def memory_gb(device: torch.device) -> float:
    """Largest memory use so far: of the device on CUDA, else of this process (10⁹ bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
