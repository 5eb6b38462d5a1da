"""Training of the small class-conditional diffusion pipeline.

Letters: n images, H and W their sides, C classes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shards.errors import InputError
from shards.generation.diffusion import TIMESTEPS, ClassPipeline, small_pipeline
from shards.generation.request import TrainSettings

DROPPED_CLASSES = 0.1  # share of training images shown without class, for classifier-free guidance
EMA_POWER = 17  # weights averaged over about the last 5 % of training, however long (Karras et al. 2024, section 3.1)

Report = Callable[[float, int, float], None]  # share of the training that is done, steps so far, loss


def train(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    settings: TrainSettings,
    *,
    size: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> ClassPipeline:
    """Trains a small pipeline; the same arguments with `steps` alone as the limit give the same weights on a CPU.

    Args:
        images: uint8 [n, H, W, 3], reduced to `settings.side` pixels a side.
        labels: int [n] in 0 … C−1, −1 where unknown.
        size: pixels a side of the images that the pipeline will give; 0 for `settings.side`.
        report: called after every step.

    Raises:
        InputError: no images, no limit, or settings the network cannot have.
    """
    if not len(images):
        raise InputError("--train-on: there are no images to train on")
    if settings.steps is None and settings.seconds is None:
        raise InputError("--train.steps and --train.seconds: both None; one has to end the training")
    draws = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        gray = bool((images[..., :1] == images).all())
        pipeline = small_pipeline(settings.side, settings.width, 1 if gray else 3, classes, size)
    pixels = reduce(images[..., :1] if gray else images, settings.side)
    known = torch.as_tensor(np.where(labels < 0, len(classes), labels))
    network: Any = pipeline.unet.to(device).train()
    averaged = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    began, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * float(np.cos(np.pi * done)))
        chosen = torch.randint(len(pixels), (settings.batch,), generator=draws)
        clean = pixels[chosen].to(device)
        shown = known[chosen].masked_fill(torch.rand(settings.batch, generator=draws) < DROPPED_CLASSES, len(classes))
        noise = torch.randn(clean.shape, generator=draws).to(device)
        moments = torch.randint(TIMESTEPS, (settings.batch,), generator=draws).to(device)
        noisy = pipeline.scheduler.add_noise(clean, noise, moments)
        velocity = pipeline.scheduler.get_velocity(clean, noise, moments)
        loss = F.mse_loss(network(noisy, moments, shown.to(device)).sample, velocity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for mean, parameter in zip(averaged, network.parameters(), strict=True):
                mean.lerp_(parameter, 1 - (1 - 1 / step) ** EMA_POWER)
        done = max(
            step / settings.steps if settings.steps else 0,
            (time.monotonic() - began) / settings.seconds if settings.seconds else 0,
        )
        if report is not None:
            report(min(done, 1), step, loss.item())
    for parameter, mean in zip(network.parameters(), averaged, strict=True):
        parameter.data.copy_(mean)
    network.eval()
    return pipeline


def reduce(images: np.ndarray, side: int) -> torch.Tensor:
    """uint8 [n, H, W, 1 or 3] → float [n, 1 or 3, side, side] in −1…1, by area."""
    parts = [
        F.interpolate(part.permute(0, 3, 1, 2).float(), size=(side, side), mode="area") / 127.5 - 1
        for part in torch.as_tensor(images).split(1024)
    ]
    return torch.cat(parts)
