"""Builds a run, from nothing or from its newest checkpoint."""

import inspect
import json
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.log.reader import open_log
from jobs.log.writer import AugmentationLog, truncate_log
from jobs.run import checkpoint
from jobs.run.arithmetic import arithmetic_of, use_arithmetic
from jobs.run.config import PretrainConfig, from_plain, save_config, to_plain
from jobs.run.data import (
    Data,
    check_batch,
    check_crops,
    check_labels,
    check_shards,
    open_data,
    open_stream,
    run_length,
    run_policy,
    strong_blur,
)
from jobs.run.folder import RunFolder, keep_lines
from jobs.run.metrics import Loggers, check_loggers
from jobs.run.optim import Schedule, build_optimizer
from jobs.run.terminal import note, warn
from jobs.run.weights import open_weights, start
from jobs.run.world import World
from jobs.training.health import FiniteGuard
from jobs.training.memory_bank import open_bank
from jobs.training.monitor import Monitor, check_held_out
from jobs.training.saving import CheckpointWriter
from jobs.training.state import Stateful, Training
from jobs.training.timing import StepTimer
from models.heads import has_batchnorm
from models.objectives import Length, Objective, build_objective
from models.objectives.base import Chosen, Encoder
from shards.errors import InputError
from shards.reader import SampleError


class LossModule(nn.Module):
    """The objective's loss as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, chosen: Chosen, labels_B: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(chosen, labels_B)


def open_training(config: PretrainConfig, folder: RunFolder, world: World, stack: ExitStack, resume: bool) -> Training:
    """Builds everything a run needs, from its newest intact checkpoint where it is resumed; `stack` closes it.

    Raises:
        InputError: shards, sizes or values that do not fit; no intact checkpoint to resume from.
    """
    saved = checkpoint.load_newest(folder.checkpoints) if resume else None
    weights = open_weights(config) if config.init and saved is None else None
    before = from_plain(saved["config"]) if saved is not None else config
    if comparable(before) != comparable(config):
        raise InputError(f"run: {folder.path / 'config.json'} is not what the checkpoint was trained with; restore it")
    step = saved["step"] if saved else 0
    arithmetic = arithmetic_of(config.precision, world.device)
    use_arithmetic(arithmetic)
    data = open_data(config)
    stack.callback(data.reader.close)
    if saved is not None and folder.log.exists():
        check_shards(open_log(folder.log).facts["shards"], data.manifests, "--data.real and --data.synthetic")
    length = run_length(config, data.order)
    if saved is not None:
        check_length(config, before, data, step)
    check_batch(config, world)
    check_loggers(config.monitor.loggers)
    if config.monitor.knn_train:
        check_held_out(config.monitor.knn_train, config.monitor.knn_test, world.leads)
    check_labels(config, data)
    objective = make_objective(config, length, world.device)
    if weights is not None:
        start(objective, weights, config)
        config = replace(config, origin=weights.origin)
    compile_encoders(config, objective, world.device)
    learner: nn.Module = LossModule(objective)
    if world.size > 1:
        learner = data_parallel(learner, world.device)
    optimizer = build_optimizer(config.optimizer, objective)
    schedule = Schedule(config.optimizer, config.batch, length.steps, length.steps_per_epoch)
    guard = FiniteGuard(config.monitor.max_bad_steps)
    timer = StepTimer(world.device)
    bank = open_bank(config, data, objective, world.device)
    monitor = Monitor(config, world, objective, length, schedule, guard, timer, data.sources, folder.curves, bank)
    kept: dict[str, Stateful] = {"objective": objective, "optimizer": optimizer, "monitor": monitor, "guard": guard}
    if saved is not None:
        for name, part in kept.items():
            part.load_state_dict(saved[name])
        monitor.judge(step)
    saver = None
    if world.leads:
        if saved is None:
            folder.clear()
            if advice := strong_blur(config):
                warn(advice)
        save_config(config, folder.config)
        keep_lines(folder.quarantine, step - 1)
        keep_lines(folder.curves, step)
        if folder.log.exists():
            truncate_log(folder.log, step * config.batch)
        monitor.loggers = Loggers(config.monitor.loggers, folder, step, to_plain(config))
        stack.callback(monitor.loggers.close)
        saver = CheckpointWriter(folder.checkpoints, config.checkpoint.keep)
        stack.callback(saver.close)
    world.barrier()
    policy = run_policy(config)
    log = AugmentationLog(
        folder.log,
        world.rank,
        policy.views,
        scored=policy.groups[0].count,
        sources=data.sources,
        facts={
            "seed": config.seed,
            "size": config.backbone.image_size,
            "precision": arithmetic,
            "shards": fingerprints(data),
        },
    )
    stack.callback(log.close)
    training = Training(
        config,
        folder,
        world,
        data,
        length,
        objective,
        learner,
        optimizer,
        schedule,
        # The stream comes last: its threads start to work at once.
        open_stream(config, data, world, step, lambda error: quarantine(training, error)),
        log,
        monitor,
        timer,
        guard,
        saver,
        kept,
        step,
    )
    stack.callback(training.stream.close)
    return training


def make_objective(config: PretrainConfig, length: Length, device: torch.device) -> Objective:
    """The objective with weights that are a function of the seed, in training mode on its device.

    Raises:
        InputError: values that do not fit; the message has field, value and remedy.
    """
    torch.manual_seed(config.seed)
    try:
        objective = build_objective(config.objective, config.backbone, length).to(device)
        objective.check(config.selection)
        objective.check_batch(config.batch // config.accumulate)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_crops(config, objective.online.backbone)
    if config.checkpoint_activations:
        checkpoint_activations(objective.online, config.backbone.name)
    for encoder in (objective.online, objective.target):
        if encoder is not None and isinstance(encoder.backbone, ResNet):
            encoder.backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return objective


def data_parallel(learner: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The learner with gradients averaged over ranks. Its buffers are left alone: queues and statistics are equal on
    all ranks by what is gathered into them."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # from torch 2.13 on
    buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(learner, device_ids=[device] if device.type == "cuda" else None, **buffers)


def checkpoint_activations(encoder: Encoder, name: str) -> None:
    """Recomputes the backbone's activations in the backward pass.

    Raises:
        InputError: a backbone that cannot, or that has BatchNorm, whose running statistics would move twice a step.
    """
    recompute = getattr(encoder.backbone, "set_grad_checkpointing", None)
    if recompute is None or has_batchnorm(encoder.backbone):
        raise InputError(f"checkpoint_activations: not for {name} with its norms; leave it out")
    recompute(True)


def compile_encoders(config: PretrainConfig, objective: Objective, device: torch.device) -> None:
    """torch.compile of the backbones in place, where the configuration asks for it, and by default on CUDA.

    Each of the few shapes of batches has code of its own: to score and to train, per size of crops.
    """
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        from torch._dynamo import config as dynamo  # takes seconds to import

        dynamo.recompile_limit = 64  # torch's 8 are for all backbones together; beyond them it would not compile
        for encoder in (objective.online, objective.target):
            if encoder is not None:
                encoder.backbone.compile(dynamic=False)


def comparable(config: PretrainConfig) -> PretrainConfig:
    """A configuration without what may change while a run is stopped: where the shards lie, and its length."""
    real, synthetic = (("?",) * len(addresses) for addresses in (config.data.real, config.data.synthetic))
    return replace(config, data=replace(config.data, real=real, synthetic=synthetic), epochs=1.0, steps=None)


def check_length(config: PretrainConfig, before: PretrainConfig, data: Data, step: int) -> None:
    """Says what a new length means to a run that has done `step` steps.

    Raises:
        InputError: it is over already, or the order of its images depends on its length.
    """
    then, now = run_length(before, data.order), run_length(config, data.order)
    if then == now:
        return
    field = "epochs" if config.steps is None else "steps"
    value = getattr(config, field)
    if now.steps < step:
        raise InputError(
            f"{field}: {value:g} are {now.steps} steps, and the run has done {step}; give more, or begin another run"
        )
    if config.data.final_synthetic_share is not None:
        raise InputError(
            f"{field}: {value:g} is another length, and with data.final_synthetic_share the order of the images "
            f"depends on it; begin another run with --init"
        )
    rates = [
        Schedule(c.optimizer, c.batch, n.steps, n.steps_per_epoch).lr(step) for c, n in ((before, then), (config, now))
    ]
    note(
        f"from step {step} on, the run has {now.steps} steps instead of {then.steps}, with all schedules as if it had "
        f"been so from the start: learning rate {rates[1]:.3g} instead of {rates[0]:.3g}"
    )


def fingerprints(data: Data) -> list[dict[str, Any]]:
    """What identifies each source's shards, kept with the log so that a replay notices when they have changed."""
    return [{"root": m.root, "source": m.source, "fingerprint": m.fingerprint} for m in data.manifests]


def quarantine(t: Training, error: SampleError) -> None:
    """Appends a replaced sample to the run's quarantine file. Ranks append whole lines, which do not mix."""
    line = {"step": t.step, "shard": error.shard, "key": error.key, "reason": error.reason}
    with t.folder.quarantine.open("a") as file:
        file.write(json.dumps(line) + "\n")
