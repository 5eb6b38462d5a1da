"""What is watched while training: losses, choices, speed, health, kNN of the training stream and of held-out images.

Shape suffixes: B images of this rank, M rows of the memory bank, D width, P pairs, C classes.
"""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.features import extract_features
from jobs.evaluation.images import label_table, open_images
from jobs.evaluation.knn import knn_scores
from jobs.run.config import PretrainConfig
from jobs.run.data import Data
from jobs.run.health import forward_flops, gradient_norms, peak_flops
from jobs.run.metrics import Loggers
from jobs.run.world import World
from models.backbones import feature_width
from models.distributed import gather
from models.objectives import Objective
from models.probes import feature_std, rankme
from pipelines.batch import ViewBatch
from pipelines.params import pair_iou

if TYPE_CHECKING:  # these hold a monitor themselves
    from jobs.run.step import StepResult
    from jobs.run.training import Training

TEMPERATURE = 0.07
NEIGHBOURS = 20


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
    def update(self, ids_B: Tensor, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Share of the labelled images that their neighbours in the bank classify rightly, then takes the images in.

        NaN while the bank or the batch has no labels.
        """
        rows_B = ids_B % len(self.labels_M)
        features_BD = F.normalize(features_BD.float(), dim=1).to(self.features_MD.dtype)
        similarity_BM = (features_BD @ self.features_MD.T).float()
        similarity_BM[:, self.labels_M < 0] = -torch.inf
        similarity_BM[torch.arange(len(rows_B), device=rows_B.device), rows_B] = -torch.inf
        top = similarity_BM.topk(min(NEIGHBOURS, similarity_BM.shape[1]), dim=1)
        votes_BC = torch.zeros(len(rows_B), self.classes, device=rows_B.device)
        voters = self.labels_M[top.indices].clamp_min(0)
        votes_BC.scatter_add_(1, voters, (top.values / TEMPERATURE).exp())
        counted_B = (labels_B >= 0) & torch.isfinite(top.values[:, 0])
        right_B = (votes_BC.argmax(1) == labels_B) & counted_B
        self.features_MD[rows_B] = features_BD
        self.labels_M[rows_B] = labels_B
        return right_B.sum() / counted_B.sum()


class Monitor:
    """Collects what is watched and gives it to the loggers; only the leading rank has those."""

    def __init__(self, config: PretrainConfig, world: World, bank: MemoryBank | None) -> None:
        self.config, self.world, self.bank = config, world, bank
        self.loggers: Loggers | None = None
        self.note = ""
        self.images_per_second: float | None = None
        self.newest_knn: float | None = None
        self._flops: float | None = None
        self._sums: dict[str, list[float]] = {}

    def after_step(self, t: Training, batch: ViewBatch, result: StepResult) -> None:
        """Takes in one step; every `monitor.every` steps, writes means since the last time."""
        self._add("train/loss", result.loss)
        self._add("train/grad_norm", result.norm)
        for name, value in choice_statistics(t, batch, result).items():
            self._add(name, value)
        settings = self.config.monitor
        due, health = t.step % settings.every == 0, settings.health_every and t.step % settings.health_every == 0
        if self.bank is not None and t.objective.seen_features_BD is not None:
            self._add("monitor/bank_knn", self._update_bank(t, batch, t.objective.seen_features_BD))
        if due or t.step == t.length.steps:
            self._write(t)
        if health and self.loggers is not None:
            self.loggers.log(t.step, self._health(t))
        if settings.knn_every and t.step % settings.knn_every == 0 and t.step != t.length.steps:
            self.evaluate(t)
        if t.step == t.length.steps:
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

    def _add(self, name: str, value: float) -> None:
        self._sums.setdefault(name, []).append(value)

    def _update_bank(self, t: Training, batch: ViewBatch, features_BD: Tensor) -> float:
        assert self.bank is not None
        device = features_BD.device
        count = len(features_BD)  # with gradient accumulation, the images of the step's last part
        ids, labels = (torch.from_numpy(v.astype(np.int64)).to(device)[-count:] for v in (batch.ids_B, batch.labels_B))
        gathered = (gather(ids), gather(features_BD), gather(labels))
        return float(self.bank.update(*gathered))

    def _write(self, t: Training) -> None:
        scalars = {name: float(np.nanmean(v)) for name, v in self._sums.items() if not np.isnan(v).all()}
        self._sums.clear()
        scalars["train/lr"] = t.schedule.lr(t.step - 1)
        scalars["train/weight_decay"] = t.schedule.weight_decay(t.step - 1)
        scalars["train/epoch"] = t.step / t.length.steps_per_epoch
        scalars |= {n if "/" in n else f"train/{n}": float(value) for n, value in t.metrics.items()}
        scalars["train/skipped_steps"] = float(t.guard.skipped)
        scalars |= t.timer.report(self.config.batch)
        scalars["data/wait_share"] = scalars.get("time/data", 0.0) / scalars["time/step"]
        scalars["system/memory_gb"] = memory_gb(self.world.device)
        scalars["system/mfu"] = self._utilisation(t, scalars["train/images_per_second"])
        self.images_per_second = scalars["train/images_per_second"]
        wait, select = (scalars.get(f"time/{phase}", 0.0) / scalars["time/step"] for phase in ("data", "selection"))
        self.note = (
            f"loss {scalars['train/loss']:.2f}, {self.images_per_second:,.0f} images/s, "
            f"data wait {wait:.0%}, selection {select:.0%}"
        )
        if self.loggers is not None:
            self.loggers.log(t.step, scalars)

    def _health(self, t: Training) -> dict[str, float]:
        scalars = {f"grad/{layer}": float(norm) for layer, norm in gradient_norms(t.objective).items()}
        features_BD = t.objective.seen_features_BD
        if features_BD is not None and len(features_BD) > 1:
            scalars["health/feature_std"] = float(feature_std(features_BD))
            scalars["health/rankme"] = float(rankme(features_BD))
        return scalars

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


def choice_statistics(t: Training, batch: ViewBatch, result: StepResult) -> dict[str, float]:
    """Share of chosen pairs with the lowest overlap; per source the chosen pairs' mean loss and the hardness gained."""
    views = t.config.selection.views
    if views == 2:
        return {}
    iou_BP = pair_iou(batch.params[:, :views])
    rows = np.arange(len(result.choice_B))
    lowest_B = iou_BP[rows, result.choice_B] <= iou_BP.min(1)
    found = {
        "selection/lowest_iou_share": float(lowest_B.mean()),
        "selection/chosen_iou": float(iou_BP[rows, result.choice_B].mean()),
    }
    if result.losses_BP is not None:
        chosen_B, mean_B = result.losses_BP[rows, result.choice_B], result.losses_BP.mean(1)
        for number, source in enumerate(t.data.sources):
            own = batch.sources_B == number
            if own.any():
                found[f"selection/chosen_loss/{source}"] = float(chosen_B[own].mean())
                found[f"selection/gain/{source}"] = float((chosen_B - mean_B)[own].mean())
                found[f"selection/lowest_iou_share/{source}"] = float(lowest_B[own].mean())
    return found


def held_out_knn(backbone: nn.Module, train: str, test: str, config: PretrainConfig, world: World) -> float:
    """kNN top-1 (0 to 1, k = 20) on the images of `test` from those of `train`, by frozen features."""
    size, batch = config.backbone.image_size, min(256, max(32, config.batch))
    known, held_out = open_images(train), open_images(test)
    try:
        table = torch.from_numpy(label_table(known, held_out))  # a held-out image's own label → the training label
        train_nD, labels_n = extract_features(backbone, known, size, world.device, batch)
        test_qD, own_q = extract_features(backbone, held_out, size, world.device, batch)
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
