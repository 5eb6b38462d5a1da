"""Linear probes: one linear layer per learning rate, all trained at once on the same batches.

Suffixes: R learning rates, B images, D width, C classes, n images.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jobs.run.terminal import check_least, check_within
from jobs.run.world import World
from shards.errors import InputError

# Base learning rates for a batch of 256, as swept by DINO's and MoBY's linear evaluations.
SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class LinearConfig:
    """Training of the linear layers."""

    epochs: int = 100
    """Passes over the labelled images."""
    batch: int = 256
    """Images per step over all ranks; the learning rate is scaled by batch / 256."""
    rates: tuple[float, ...] = SWEEP
    """Base learning rates; one linear layer is trained for each, all at the same time."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.0
    """SGD's weight decay."""

    def __post_init__(self) -> None:
        check_least(self, epochs=1, batch=1, weight_decay=0)
        check_within(self, 0, 1, "momentum")
        if not self.rates or min(self.rates) < 0:
            raise InputError(f"rates: {self.rates} must name learning rates, none of them below 0")


class LinearBank:
    """R linear classifiers and their SGD state; features are centred and scaled by the training set's statistics.

    Standardising with a fixed mean and deviation is an affine map that a linear layer could undo: it makes one sweep
    of learning rates fit backbones whose features differ in scale by orders of magnitude.
    """

    def __init__(self, config: LinearConfig, mean_D: Tensor, std: Tensor, classes: int) -> None:
        width, rates = mean_D.shape[0], len(config.rates)
        device = mean_D.device
        self._config, self._mean_D, self._std = config, mean_D, std
        self.weight_RCD = torch.zeros(rates, classes, width, device=device)
        self.bias_RC = torch.zeros(rates, classes, device=device)
        self._velocity_RCD, self._velocity_RC = torch.zeros_like(self.weight_RCD), torch.zeros_like(self.bias_RC)
        self._rates_R = torch.tensor(config.rates, device=device) * config.batch / 256

    def logits(self, features_BD: Tensor) -> Tensor:
        """[R, B, C]."""
        x_BD = (features_BD - self._mean_D) / self._std
        return torch.baddbmm(self.bias_RC[:, None], x_BD.expand(len(self.weight_RCD), -1, -1), self.weight_RCD.mT)

    def step(self, features_BD: Tensor, labels_B: Tensor, progress: float, world: World | None = None) -> Tensor:
        """One SGD step of every layer at `progress` (0 to 1) of a cosine schedule; returns the losses [R].

        The gradient of softmax cross-entropy is written out: (softmax − one-hot) / B, times the features.
        """
        x_BD = (features_BD - self._mean_D) / self._std
        logits_RBC = self.logits(features_BD)
        log_p_RBC = logits_RBC.log_softmax(dim=-1)
        losses_R = -log_p_RBC.gather(2, labels_B.expand(len(logits_RBC), -1)[..., None]).mean(dim=(1, 2))
        error_RBC = (log_p_RBC.exp() - F.one_hot(labels_B, logits_RBC.shape[-1])) / len(labels_B)
        slope_RCD = torch.matmul(error_RBC.mT, x_BD)
        slope_RC = error_RBC.sum(dim=1)
        if world is not None and world.size > 1:
            for slope in (slope_RCD, slope_RC):
                dist.all_reduce(slope)
                slope /= world.size
        decay = self._config.weight_decay
        rates_R = self._rates_R * (1 + math.cos(math.pi * progress)) / 2
        for value, velocity, slope in (
            (self.weight_RCD, self._velocity_RCD, slope_RCD),
            (self.bias_RC, self._velocity_RC, slope_RC),
        ):
            velocity.mul_(self._config.momentum).add_(slope + decay * value)
            value.sub_(rates_R.view(-1, *[1] * (value.ndim - 1)) * velocity)
        return losses_R

    def predict(self, features_nD: Tensor, most: int = 5, chunk: int = 4096) -> Tensor:
        """The `most` best classes of each layer, best first, int64 [R, n, most]; a diverged layer guesses class 0 …"""
        most = min(most, self.bias_RC.shape[1])
        parts = [self.logits(part).nan_to_num(nan=0.0).topk(most, dim=-1).indices for part in features_nD.split(chunk)]
        return torch.cat(parts, dim=1)


def statistics(features_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and the root mean square deviation over all dimensions, a scalar, never 0."""
    mean_D = features_nD.mean(dim=0)
    return mean_D, (features_nD - mean_D).square().mean().sqrt().clamp_min(1e-12)


# One epoch's batches of (features [B, D], labels [B]).
Epoch = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


def train(
    bank: LinearBank, epochs: int, steps: int, batches: Epoch, world: World | None = None,
    advance: Callable[[int], object] | None = None,
) -> None:  # fmt: skip
    """Runs `epochs` epochs of `steps` steps each."""
    done = 0
    for epoch in range(epochs):
        for features_BD, labels_B in batches(epoch):
            bank.step(features_BD, labels_B, min(done / max(epochs * steps, 1), 1.0), world)
            done += 1
        if advance:
            advance(1)


def cached_batches(
    features_nD: Tensor, labels_n: Tensor, batch: int, seed: int, world: World | None = None
) -> tuple[Epoch, int]:
    """Epochs over stored features in an order that depends on (seed, epoch) alone; and steps per epoch.

    Every rank takes its share of each global batch; the last, smaller one is used too where every rank has a row.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    starts = [i for i in range(0, len(labels_n), batch) if min(batch, len(labels_n) - i) >= size]

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels_n), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for start in starts:
            rows = order[start : start + batch]
            # Equal shares, so that the mean over ranks is the mean over the batch.
            rows = rows[: len(rows) // size * size][rank::size].to(features_nD.device)
            yield features_nD[rows], labels_n[rows]

    return epoch_batches, len(starts)
