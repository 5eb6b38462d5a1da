"""Fine-tuning the whole backbone with layer-wise learning-rate decay (BEiT, section 3.1 there; MAE, appendix A).

Suffixes: B images, C classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.evaluation.features import default_crop, gather, warn_broken
from jobs.evaluation.frozen import Frozen, Pool, pooled, timm_module
from jobs.evaluation.images import ImageSet
from jobs.evaluation.loading import Loader, centre_crop, check_crops, crop_and_flip
from jobs.run.optim import warmup_cosine
from jobs.run.terminal import check_least, check_within
from jobs.run.world import World
from shards.errors import InputError


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of backbone and head together."""

    epochs: int = 100
    """Passes over the labelled images."""
    batch: int = 256
    """Images per step over all ranks."""
    lr: float = 5e-4
    """Peak learning rate of the head for a batch of 256, scaled linearly."""
    layer_decay: float = 0.65
    """Factor on the learning rate from each layer to the one below it; 1 = the same everywhere."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    warmup_epochs: float = 5.0
    """Linear warm-up (epochs), no longer than the run."""
    smoothing: float = 0.1
    """Label smoothing (0 to 1)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crops (share of the image)."""

    def __post_init__(self) -> None:
        check_least(self, epochs=1, batch=1, lr=0, weight_decay=0)
        check_within(self, 0, 1, "layer_decay", "smoothing")
        check_crops(self.crop_scale)
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise InputError(
                f"warmup_epochs: {self.warmup_epochs:g} is not within the {self.epochs} epochs of the run; lower it, "
                f"or train longer"
            )

    def rate(self, step: int, steps: int) -> float:
        """The head's learning rate at `step` of a run of `steps`: linear warm-up, then half a cosine to 0."""
        warmup = round(self.warmup_epochs / self.epochs * steps)
        return warmup_cosine(step, steps, warmup, self.lr * self.batch / 256)


class Classifier(nn.Module):
    """A copy of the backbone with a zero-initialised linear head over its pooled features."""

    def __init__(self, frozen: Frozen, width: int, classes: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(frozen.model)
        self.pool: Pool = frozen.pool
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, crops_B3SS: Tensor) -> Tensor:
        return self.head(pooled(self.backbone, crops_B3SS, self.pool))


def parameter_groups(model: Classifier, config: FinetuneConfig) -> list[dict]:
    """AdamW's groups: each layer's learning rate is `layer_decay` times the one above it; the head's is whole.

    The layers are timm's own (`group_matcher`); each group has `lr_scale`.
    """
    backbone = timm_module(model.backbone)
    exempt = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # type: ignore[operator]
    groups = param_groups_layer_decay(backbone, config.weight_decay, tuple(exempt), layer_decay=config.layer_decay)
    # timm gives its last layer, the norm before the head, a factor of 1, where our head stands: one step down for all.
    below = [{**group, "lr_scale": group["lr_scale"] * config.layer_decay} for group in groups]
    known = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    return [*below, {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0}]


def finetune(
    frozen: Frozen,
    train: ImageSet,
    labels_n: np.ndarray,
    rows: np.ndarray,
    test: ImageSet,
    test_rows: np.ndarray,
    classes: int,
    config: FinetuneConfig,
    seed: int,
    world: World,
    advance: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains on the images `rows` and returns the five best guesses (int64 [q, ≤5]) for the test rows that could be
    read, with those rows."""
    torch.manual_seed(seed)
    device = world.device
    probe = torch.zeros(2, 3, frozen.size, frozen.size, device=device)
    with torch.no_grad():
        width = pooled(frozen.model.to(device).eval(), probe, frozen.pool).shape[1]
    model = Classifier(frozen, width, classes).to(device).train()
    wrapped: nn.Module = model if world.size == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)
    per_rank = max(config.batch // world.size, 1)
    loader = Loader(train, frozen.size, per_rank, frozen.mean, frozen.std)
    targets = torch.from_numpy(labels_n)
    # Every rank makes the same number of steps: rows that do not fill a last common batch wait for the next epoch.
    share = len(rows) // world.size
    steps = max(1, -(-share // per_rank)) * config.epochs
    done = 0
    try:
        for epoch in range(config.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(rows)[: share * world.size][
                world.rank :: world.size
            ]
            transform = crop_and_flip(seed, epoch, frozen.size, config.crop_scale)
            for batch in loader.batches(order, transform, device):
                for group in optimizer.param_groups:
                    group["lr"] = group["lr_scale"] * config.rate(done, steps)
                logits = wrapped(batch.crops_B3SS)
                target = targets[batch.rows].to(device)
                # By sum over count: the mean over a batch of which no image could be read is not a number.
                loss = F.cross_entropy(logits, target, label_smoothing=config.smoothing, reduction="sum")
                loss = loss / max(len(target), 1)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                done += 1
            if advance:
                advance(1)
    finally:
        loader.close()
    return predict(model, frozen, test, test_rows, per_rank, world)


@torch.inference_mode()
def predict(
    model: nn.Module, frozen: Frozen, images: ImageSet, rows: np.ndarray, batch: int, world: World
) -> tuple[np.ndarray, np.ndarray]:
    """The five best classes, best first, of the images that can be read, on every rank."""
    model.eval()
    loader = Loader(images, frozen.size, batch, frozen.mean, frozen.std)
    guesses, kept, broken = [], [], {}
    try:
        mine = rows[world.rank :: world.size]
        for got in loader.batches(mine, centre_crop(default_crop(frozen.size)), world.device):
            broken |= got.broken
            if not len(got.rows):
                continue
            logits = model(got.crops_B3SS)
            guesses.append(logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu())
            kept.append(torch.from_numpy(got.rows))
    finally:
        loader.close()
    for others in gather(broken, world):
        broken |= others
    warn_broken(images, broken)
    parts = gather((torch.cat(guesses), torch.cat(kept)) if guesses else None, world)
    if not parts:
        raise InputError(f"test: no image of {images.name} could be read; `hardviews verify` says why")
    guesses_q, rows_q = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = rows_q.argsort()
    return guesses_q[order].numpy(), rows_q[order].numpy()
