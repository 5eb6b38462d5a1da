"""What is watched while training: losses, choices, speed, health, kNN of the training stream and of held-out images.

Figures of losses, choices and contrastive tasks in `train/` and `selection/` are means over the images of all ranks and
all steps since the last line that have them. `health/` is about the newest step's features and embeddings of all ranks,
`contrast/`, `grad/`, `time/` and `system/` about the leading rank. docs/metrics.md names all.

Shape suffixes: B images of this rank, M rows of the memory bank, D width, P pairs, C classes.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.features import extract_features
from jobs.evaluation.images import label_table, open_images
from jobs.evaluation.knn import HEADLINE, TEMPERATURE, knn_scores
from jobs.run.config import PretrainConfig
from jobs.run.data import Data
from jobs.run.health import forward_flops, gradient_norms, peak_flops
from jobs.run.metrics import Loggers
from jobs.run.world import World
from models.backbones import feature_width
from models.distributed import gather
from models.objectives import Objective
from models.probes import by_source, contrast_report, feature_std, positives_report, rankme
from pipelines.batch import ViewBatch
from pipelines.params import pair_iou

if TYPE_CHECKING:  # these hold a monitor themselves
    from jobs.run.step import StepResult
    from jobs.run.training import Training

CURVE_POINTS = 64
# Parts of a step on the progress line; TensorBoard has all that the timer knows.
PHASES = ("data", "selection", "forward", "backward", "optimizer", "log")
Total = float | Tensor


class MemoryBank(nn.Module):
    """Features of training images, kept up to date by every step, and a kNN accuracy against them (MoCo v3, section 4).

    A sample's row is its id modulo M; with M at least the number of images every image has its own row, as published.
    An image's own row never votes for it.
    """

    features_MD: Tensor
    labels_M: Tensor

    def __init__(self, rows: int, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("features_MD", torch.zeros(rows, width, dtype=torch.float16))
        self.register_buffer("labels_M", torch.full((rows,), -1, dtype=torch.int64))

    @torch.no_grad()
    def score(self, ids_B: Tensor, features_BD: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B] each: which labelled images their neighbours in the bank classify rightly, which have any there."""
        similarity_BM = (self._unit(features_BD) @ self.features_MD.T).float()
        similarity_BM.masked_fill_(self.labels_M < 0, -torch.inf)
        own_B1 = (ids_B % len(self.labels_M))[:, None]
        similarity_BM.scatter_(1, own_B1, -torch.inf)
        top = similarity_BM.topk(min(HEADLINE, similarity_BM.shape[1]), dim=1)
        votes_BC = torch.zeros(len(ids_B), self.classes, device=ids_B.device)
        voters = self.labels_M[top.indices].clamp_min(0)
        votes_BC.scatter_add_(1, voters, (top.values / TEMPERATURE).exp())
        counted_B = (labels_B >= 0) & torch.isfinite(top.values[:, 0])
        right_B = (votes_BC.argmax(1) == labels_B) & counted_B
        return right_B, counted_B

    @torch.no_grad()
    def update(self, ids_B: Tensor, features_BD: Tensor, labels_B: Tensor) -> None:
        """Takes the images in."""
        rows_B = ids_B % len(self.labels_M)
        self.features_MD[rows_B] = self._unit(features_BD)
        self.labels_M[rows_B] = labels_B

    def _unit(self, features_BD: Tensor) -> Tensor:
        return F.normalize(features_BD.float(), dim=1).to(self.features_MD.dtype)


class Monitor:
    """Collects what is watched and gives it to the loggers; only the leading rank has those."""

    def __init__(self, config: PretrainConfig, world: World, bank: MemoryBank | None) -> None:
        self.config, self.world, self.bank = config, world, bank
        self.loggers: Loggers | None = None
        self.note = ""
        self.images_per_second: float | None = None
        self.newest_knn: float | None = None
        self._flops: float | None = None
        self._sums: dict[str, tuple[Total, Total]] = {}

    def watches(self, step: int) -> bool:
        """Whether features, embeddings and contrastive tasks of step number `step` (from 1) are analysed."""
        return bool(self.config.monitor.health_every) and step % self.config.monitor.health_every == 0

    def after_step(self, t: Training, batch: ViewBatch, result: StepResult) -> None:
        """Takes in one step; every `monitor.every` steps, writes means since the last time."""
        self._add("train/loss", result.loss, 1)
        self._add("train/grad_norm", result.norm, 1)
        for name, value in t.metrics.items():
            self._add(name if "/" in name else f"train/{name}", value.detach(), 1)
        for name, (total, count) in choice_statistics(t, batch, result).items():
            self._add(name, total, count)
        settings, last = self.config.monitor, t.step == t.length.steps
        due = t.step % settings.every == 0 or last
        if self.bank is not None and t.objective.seen_features_BD is not None:
            self._use_bank(self.bank, t, batch, t.objective.seen_features_BD, due)
        if due:
            self._write(t)
        if self.watches(t.step):
            self._write_health(t, batch, result.norm)
        if last or (settings.knn_every and t.step % settings.knn_every == 0):
            self.evaluate(t)

    def evaluate(self, t: Training) -> None:
        """kNN top-1 of the held-out images, on the leading rank, where the configuration names some."""
        settings = self.config.monitor
        if settings.knn_train and self.loggers is not None:
            top1 = held_out_knn(t.objective.backbone, settings.knn_train, settings.knn_test, self.config, self.world)
            self.newest_knn = top1
            self.loggers.log(t.step, {"knn/top1": top1})
        self.world.barrier()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"bank": self.bank.state_dict() if self.bank else {}, "newest_knn": self.newest_knn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])
        self.newest_knn = state["newest_knn"]

    def _add(self, name: str, total: Total, count: Total) -> None:
        before, counted = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before + total, counted + count)

    def _use_bank(self, bank: MemoryBank, t: Training, batch: ViewBatch, features_BD: Tensor, due: bool) -> None:
        """Updates the bank with the images of all ranks; scores them where a line is due, before they are in it."""
        rows = (batch.ids_B, batch.labels_B)
        device = features_BD.device
        ids, labels = (torch.from_numpy(v.astype(np.int64)).to(device, non_blocking=True) for v in rows)
        gathered = (gather(ids), gather(features_BD), gather(labels))
        if due:
            right_B, counted_B = bank.score(*gathered)
            for suffix, own_B in by_source(gather(sources(batch, device)), t.data.sources).items():
                self._add(f"monitor/bank_knn{suffix}", (right_B & own_B).sum(), (counted_B & own_B).sum())
        bank.update(*gathered)

    def _means(self) -> dict[str, float]:
        """Means since the last time over the images of all ranks, and a new start. Ranks hold the same names."""
        names = sorted(self._sums)
        totals = torch.tensor([[float(v) for v in self._sums[n]] for n in names], dtype=torch.float64)
        totals = self.world.mean(totals.to(self.world.device)).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def _write(self, t: Training) -> None:
        scalars = self._means()
        scalars["train/lr"] = t.schedule.lr(t.step - 1)
        scalars["train/weight_decay"] = t.schedule.weight_decay(t.step - 1)
        scalars["train/epoch"] = t.step / t.length.steps_per_epoch
        scalars["train/skipped_steps"] = float(t.guard.skipped)
        scalars |= t.timer.report(self.config.batch)
        scalars["data/wait_share"] = scalars.get("time/data", 0.0) / scalars["time/step"]
        scalars["system/memory_gb"] = memory_gb(self.world.device)
        scalars["system/mfu"] = self._utilisation(t, scalars["train/images_per_second"])
        self.images_per_second = scalars["train/images_per_second"]
        self.note = note(scalars)
        if self.loggers is not None:
            self.loggers.log(t.step, scalars)

    def _write_health(self, t: Training, batch: ViewBatch, norm: float) -> None:
        """Gradient norms before clipping, the spread of the features, alignment and uniformity of the embeddings that
        the loss compared, and what the contrastive tasks were like."""
        objective, names = t.objective, t.data.sources
        clip = t.config.optimizer.clip_norm
        clipped = norm / clip if 0 < clip < norm else 1.0
        scalars = {f"grad/{layer}": clipped * float(own) for layer, own in gradient_norms(objective).items()}
        sources_B, curves = sources(batch, self.world.device), {}
        if objective.seen_features_BD is not None:
            scalars |= feature_health(gather(objective.seen_features_BD), gather(sources_B), names)
        if objective.positives:
            pairs = [(gather(first_BD), gather(second_BD)) for first_BD, second_BD in objective.positives]
            # With gradient accumulation, these and the tasks are of the last part.
            last_B = sources_B[-len(objective.positives[0][0]) :]
            scalars |= prefixed("health", positives_report(pairs, gather(last_B), names))
            if self.loggers is not None and objective.contrasts:
                means, curves = contrast_report(objective.contrasts, last_B, names)
                scalars |= prefixed("contrast", means)
        objective.positives.clear()
        objective.contrasts.clear()
        if self.loggers is not None:
            self.loggers.log(t.step, scalars)
            write_curves(t.folder.curves, t.step, curves)

    def _utilisation(self, t: Training, images_per_second: float) -> float:
        """Share of the device's peak FLOP/s that plain training's forwards and backwards of two views use.

        Counts 2 online views forward and backward (3 forwards each) and 2 target forwards, whatever selection adds.
        """
        if self._flops is None:
            size, device = self.config.backbone.image_size, self.world.device
            forward = forward_flops(t.objective.backbone, size, device)
            forwards = 8 if t.objective.target is not None else 6
            self._flops = forwards * forward / (peak_flops(device) * self.world.size)
        return self._flops * images_per_second


def open_monitor(config: PretrainConfig, world: World, data: Data, objective: Objective) -> Monitor:
    """The monitor of a run; its memory bank where the images have labels."""
    classes = max(len(manifest.classes) for manifest in data.manifests)
    bank = None
    if config.monitor.bank and classes:
        rows = min(config.monitor.bank, len(data.reader))
        bank = MemoryBank(rows, feature_width(objective.backbone), classes).to(world.device)
    return Monitor(config, world, bank)


def note(scalars: dict[str, float]) -> str:
    """What the progress line says: loss, speed, each phase's share of the time of a step, memory, utilisation."""
    shares = {name: scalars.get(f"time/{name}", 0.0) / scalars["time/step"] for name in PHASES}
    split = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return (
        f"loss {scalars['train/loss']:.2f}, {scalars['train/images_per_second']:,.0f} images/s ({split}), "
        f"{scalars['system/memory_gb']:.1f} GB, MFU {scalars['system/mfu']:.0%}"
    )


def choice_statistics(t: Training, batch: ViewBatch, result: StepResult) -> dict[str, tuple[float, int]]:
    """Sum and count over images, all and of each source, of: whether the pair of least overlap was chosen, the chosen
    pair's overlap, its loss, and what that is above the mean pair's; the last two of images that were scored."""
    views = t.config.selection.views
    if views == 2:
        return {}
    iou_BP = pair_iou(batch.params[:, :views])
    rows = np.arange(len(result.choice_B))
    chosen_iou_B = iou_BP[rows, result.choice_B]
    values = {"lowest_iou_share": chosen_iou_B <= iou_BP.min(1), "chosen_iou": chosen_iou_B}
    if result.losses_BP is not None:
        chosen_loss_B = result.losses_BP[rows, result.choice_B]
        values |= {"chosen_loss": chosen_loss_B, "gain": chosen_loss_B - result.losses_BP.mean(1)}
    groups = {"": np.ones(len(rows), np.bool_)}
    groups |= {f"/{source}": batch.sources_B == number for number, source in enumerate(t.data.sources)}
    return {
        f"selection/{name}{suffix}": (float(values_B[own_B & known_B].sum()), int((own_B & known_B).sum()))
        for name, values_B in values.items()
        for known_B in (~np.isnan(values_B),)
        for suffix, own_B in groups.items()
    }


def sources(batch: ViewBatch, device: torch.device) -> Tensor:
    """int64 [B]: each image's source."""
    return torch.from_numpy(batch.sources_B.astype(np.int64)).to(device, non_blocking=True)


def prefixed(group: str, scalars: dict[str, Tensor]) -> dict[str, float]:
    """The scalars on the host, under `group/name`, without those that nothing is known about."""
    return {f"{group}/{name}": float(value) for name, value in scalars.items() if not value.isnan()}


def feature_health(features_BD: Tensor, sources_B: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Standard deviation and RankMe of features, over all and by source; nothing where they are not finite."""
    if not bool(torch.isfinite(features_BD).all()):
        return {}
    scalars = {}
    for suffix, own_B in by_source(sources_B, names).items():
        rows_BD = features_BD[own_B]
        if len(rows_BD) > 1:
            scalars[f"health/feature_std{suffix}"] = float(feature_std(rows_BD))
            scalars[f"health/rankme{suffix}"] = float(rankme(rows_BD))
    return scalars


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
