"""One training step: choose a pair per image without gradient, learn from it, move the target, log.

Shape suffixes: B images of this rank, N views, P pairs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.log.writer import batch_rows
from jobs.run.arithmetic import arithmetic_of
from jobs.run.optim import set_step
from jobs.training.health import clip_and_norm, gradient_norms
from jobs.training.monitor import StepResult
from jobs.training.state import Training
from models.objectives.base import Scores
from models.selection import same_policy, select
from pipelines.batch import ViewBatch
from pipelines.params import pair_iou, pairs
from pipelines.philox import Purpose, uniform


@dataclass(frozen=True)
class Choice:
    """The pairs of some images."""

    choice_B: Tensor
    """The pair that trains."""
    best_B: Tensor
    """The pair that the rule prefers; differs from `choice_B` only for images that train on a random pair."""
    at_random_B: Tensor
    """bool: the image trains on a random pair although its step chooses by the rule."""
    scores: Scores | None = None
    views_BM: Tensor | None = None

    @property
    def losses_BP(self) -> Tensor | None:
        return None if self.scores is None else self.scores.losses_BP


def train_step(t: Training, batch: ViewBatch, asked_to_stop: Callable[[], bool] = lambda: False) -> StepResult:
    """One optimizer step on one batch; a step that is not finite is skipped and counted. `asked_to_stop` says whether
    this rank is; ranks tell each other beside loss and norm, for which they wait once.

    Raises:
        TrainingFailedError: too many steps in a row were not finite.
    """
    torch.manual_seed(step_seed(t.config.seed, t.step, t.world.rank))
    set_step(t.optimizer, t.schedule, t.step)
    t.optimizer.zero_grad(set_to_none=True)
    t.objective.watching = t.monitor.watches(t.step + 1)
    losses, choices, seen, selection = [], [], [], t.config.selection
    metrics: dict[str, Tensor] = {}
    parts = split(batch, t.config.accumulate)
    for part in parts:
        with t.timer.phase("selection"), autocast(t):
            choice = choose(t, part)
            chosen = t.objective.take(part.crops, choice.choice_B, choice.scores)
        with gradient_sync(t.learner, part is parts[-1]):
            with t.timer.phase("forward"), autocast(t):
                loss, metrics = t.learner(chosen, on_device(t, part.label_B.astype(np.int64)))
            chance = t.objective.chance(len(part.label_B) * t.world.size)
            if chance is not None:
                metrics["chance"] = torch.tensor(chance)
            with t.timer.phase("backward"):
                (loss / len(parts)).backward()
        if selection.audits(t.step):
            with t.timer.phase("audit"), autocast(t):
                metrics |= t.objective.audit(part.crops, choice.best_B, selection)
        losses.append(loss.detach())
        choices.append(replace(choice, views_BM=chosen.views_BM))
        if t.objective.seen_features_BD is not None:
            seen.append(t.objective.seen_features_BD)
    t.objective.seen_features_BD = torch.cat(seen) if seen else None
    with t.timer.phase("optimizer"):
        t.objective.before_step()
        layer_norms = gradient_norms(t.objective) if t.objective.watching else {}
        clip = t.config.optimizer
        norm = clip_and_norm(t.learned, clip.clip_norm, by_tensor=clip.clip_by == "tensor")
        asked = torch.full_like(norm, float(asked_to_stop()))
        means = t.world.mean(torch.stack([torch.stack(losses).mean(), norm, asked]))
        (loss, norm, asked), *recorded = on_host(
            means, *joined(choices)
        )  # the one time that a step waits for the device
        update(t, float(loss), bool(np.isfinite(loss) and np.isfinite(norm)))
    with t.timer.phase("log", host=True):
        record(t, batch, *recorded)
        choice_B, at_random_B, losses_BP, _ = recorded
        result = StepResult(
            float(loss), float(norm), choice_B, at_random_B, losses_BP, metrics, layer_norms, bool(asked > 0)
        )
    t.step += 1
    t.timer.step()
    return result


def choose(t: Training, batch: ViewBatch) -> Choice:
    """The pair of each image that trains: by the configured rule, for a share of the images at random."""
    selection, device = t.config.selection, t.world.device
    barred_P = same_policy(selection.views, device) if selection.cross_policy and selection.views > 2 else None

    def drawn(purpose: Purpose, count: int) -> np.ndarray:
        return uniform(t.config.seed, batch.epoch_B, batch.sample_B, [0], purpose, count)[:, 0]

    def random_pairs() -> Tensor:
        return select(on_device(t, drawn(Purpose.CHOICE, len(pairs(selection.views)))), "random", barred_P)

    scored = selection.scores(t.step)
    if not scored and (selection.rule != "lowest-iou" or t.step % selection.every):
        random_B = random_pairs()
        return Choice(random_B, random_B, torch.zeros_like(random_B, dtype=torch.bool))
    if scored:
        scores = t.objective.pair_losses(batch.scored, selection)
        best_B = select(scores.losses_BP, selection.rule, barred_P)
    else:
        scores, iou_BP = None, pair_iou(batch.params[:, : selection.views])
        best_B = select(on_device(t, iou_BP), "lowest-iou", barred_P)
    at_random_B = on_device(t, drawn(Purpose.SHARE, 1)[:, 0] < selection.share_at_random)
    choice_B = torch.where(at_random_B, random_pairs(), best_B)
    return Choice(choice_B, best_B, at_random_B, scores)


def update(t: Training, loss: float, finite: bool) -> None:
    """Steps optimizer, target and queues, unless loss or gradient is not finite on some rank."""
    if finite:
        t.optimizer.step()
        t.objective.after_step()
        t.guard.passed()
    else:
        t.objective.skip_step()
        t.guard.skip(t.step, t.objective, loss, str(t.folder.checkpoints))


def joined(choices: list[Choice]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of all parts of a step: choices [B], random or not [B], losses [B, P], numbers of all chosen views [B, M]."""
    scored = [choice.losses_BP for choice in choices if choice.losses_BP is not None]
    marked = [choice.views_BM for choice in choices if choice.views_BM is not None]
    return (
        torch.cat([choice.choice_B for choice in choices]),
        torch.cat([choice.at_random_B for choice in choices]),
        torch.cat(scored).float() if scored else None,
        torch.cat(marked) if marked else None,
    )


def record(
    t: Training,
    batch: ViewBatch,
    choice_B: np.ndarray,
    at_random_B: np.ndarray,
    losses_BP: np.ndarray | None,
    views_BM: np.ndarray | None,
) -> None:
    """Hands the step's rows to the log."""
    chosen_BN = None
    if views_BM is not None:
        chosen_BN = np.zeros(batch.params.shape, np.bool_)
        np.put_along_axis(chosen_BN, views_BM, True, axis=1)
    t.log.append(batch_rows(batch, t.step, t.log.scored, losses_BP, choice_B, at_random_B, chosen_BN))


def split(batch: ViewBatch, parts: int) -> list[ViewBatch]:
    """The batch in `parts` runs of as many rows, for gradient accumulation."""
    if parts == 1:
        return [batch]
    rows = len(batch) // parts
    return [batch.rows(slice(start, start + rows)) for start in range(0, len(batch), rows)]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's global generator, so that what is random in a step is a function of (seed, step, rank)."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def on_device(t: Training, values: np.ndarray) -> Tensor:
    """A copy on this rank's device; nothing waits for it."""
    return torch.from_numpy(values).to(t.world.device, non_blocking=True)


def on_host(*tensors: Tensor | None) -> list[Any]:
    """The tensors as arrays, after one wait for all of them; None stays None."""
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if any(tensor is not None and tensor.is_cuda for tensor in tensors):
        copied = torch.cuda.Event()
        copied.record()
        copied.synchronize()
    return [None if copy is None else copy.numpy() for copy in copies]


def autocast(t: Training) -> AbstractContextManager[Any]:
    """bf16 arithmetic where the configuration asks for it, and by default on CUDA."""
    device = t.world.device
    is_bf16 = arithmetic_of(t.config.precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if is_bf16 else nullcontext()


def gradient_sync(learner: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are averaged over ranks in the last part of a step only."""
    return nullcontext() if last or not isinstance(learner, DistributedDataParallel) else learner.no_sync()
