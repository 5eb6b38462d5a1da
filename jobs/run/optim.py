"""Optimizers, their schedules, and which parameters decay."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from shards.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """How the online encoder learns."""

    name: Literal["adamw", "lamb", "lars", "sgd"] = "adamw"
    """Optimizer; AdamW and SGD are torch's fused ones, LAMB and LARS are timm's."""
    lr: float = 1e-3
    """Peak learning rate for a batch of `lr_batch` images; scaled linearly with the global batch."""
    lr_batch: int = 512
    """Global batch (images) at which `lr` holds; 0 = never scale."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine, scaled as `lr`."""
    warmup_epochs: float = 5.0
    """Linear warm-up (epochs), no longer than the run; where `warmup_share` is given, it has no say."""
    warmup_share: float | None = None
    """Linear warm-up as a share of the run (0 to 1) instead, for runs of any length."""
    weight_decay: float = 0.05
    """Weight decay of what `decay` names."""
    final_weight_decay: float | None = None
    """Weight decay at the end of its cosine; None = constant."""
    decay: Literal["weights", "tokens", "all"] = "weights"
    """What decays: weights (matrices and convolutions); tokens = also class and mask tokens and position embeddings
    (MoBY, DINO, iBOT); all = also norms and biases (MoCo, MoCo v3, SimSiam)."""
    momentum: float = 0.9
    """Momentum of LARS and SGD, first beta of AdamW and LAMB."""
    beta2: float = 0.999
    """Second beta of AdamW and LAMB."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 = no clipping."""
    clip_by: Literal["all", "tensor"] = "all"
    """Whose norm `clip_norm` bounds: that of all parameters together, or each parameter's own (DINO, iBOT)."""
    constant_predictor: bool = False
    """Keep the learning rate of the online encoder's predictor at its peak throughout (SimSiam, section 4.2)."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"optimizer.lr: {self.lr} must be above 0")
        if self.decay not in ("weights", "tokens", "all"):
            raise InputError(f"optimizer.decay: {self.decay!r} is unknown; take weights, tokens or all")
        if self.clip_by not in ("all", "tensor"):
            raise InputError(f"optimizer.clip_by: {self.clip_by!r} is unknown; take all or tensor")
        for field in ("momentum", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"optimizer.{field}: {getattr(self, field)} must lie in [0, 1)")
        if self.final_weight_decay is not None and self.final_weight_decay < 0:
            raise InputError(f"optimizer.final_weight_decay: {self.final_weight_decay} must be 0 or above")
        if self.warmup_share is not None and not 0 <= self.warmup_share <= 1:
            raise InputError(f"optimizer.warmup_share: {self.warmup_share} must lie between 0 and 1")
        for field in ("final_lr", "warmup_epochs", "weight_decay", "clip_norm", "lr_batch"):
            if getattr(self, field) < 0:
                raise InputError(f"optimizer.{field}: {getattr(self, field)} must be 0 or above")


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay at any step: a pure function of config and length.

    Raises:
        InputError: the warm-up is longer than the run.
    """

    config: OptimizerConfig
    batch: int
    steps: int
    steps_per_epoch: float

    def __post_init__(self) -> None:
        if self.steps and self.warmup > self.steps:
            raise InputError(
                f"optimizer.warmup_epochs: {self.config.warmup_epochs:g} epochs are {self.warmup} steps, and the run "
                f"has {self.steps}; train longer, lower it, or set optimizer.warmup_share to 0.1"
            )

    @property
    def scale(self) -> float:
        return self.batch / self.config.lr_batch if self.config.lr_batch else 1.0

    @property
    def warmup(self) -> int:
        share = self.config.warmup_share
        return round(self.config.warmup_epochs * self.steps_per_epoch if share is None else share * self.steps)

    @property
    def peak(self) -> float:
        return self.config.lr * self.scale

    def lr(self, step: int) -> float:
        return warmup_cosine(step, self.steps, self.warmup, self.peak, self.config.final_lr * self.scale)

    def weight_decay(self, step: int) -> float:
        final = self.config.final_weight_decay
        return self.config.weight_decay if final is None else cosine(step, self.steps, self.config.weight_decay, final)


TOKENS = {"cls_token", "pos_embed", "reg_token", "mask_token", "mask_token_D", "relative_position_bias_table"}


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Two groups: what decays by `config.decay`, and what does not; and the same two for a predictor whose learning
    rate is constant."""
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, True): [], (False, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            token = name.rsplit(".", 1)[-1] in TOKENS
            decays = config.decay != "weights" if token else config.decay == "all" or parameter.ndim > 1
            constant = config.constant_predictor and name.startswith("online.predictor.")
            members.setdefault((constant, decays), []).append(parameter)
    return [
        {"params": found, "decays": decays, "constant": constant} | ({} if decays else {"weight_decay": 0.0})
        for (constant, decays), found in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over every parameter of `model` that wants a gradient; `set_step` gives it its rates."""
    groups = parameter_groups(model, config)
    betas = (config.momentum, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    if config.name == "lars":
        # timm annotates momentum and weight decay as int and takes float
        options: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        return Lars(groups, lr=config.lr, **options)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)


def set_step(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Puts the schedule's rates for `step` into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.peak if group["constant"] else schedule.lr(step)
        group["weight_decay"] = schedule.weight_decay(step) if group["decays"] else 0.0


def warmup_cosine(step: int, total: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Value at `step` (0 to total): linear from 0 to `peak` over `warmup` steps, then half a cosine to `final`.

    The first step already learns: step 0 of a warm-up of w steps has peak / w.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, final)


def cosine(step: int, total: int, start: float, final: float) -> float:
    """Half a cosine from `start` at step 0 to `final` at step `total`, constant behind it."""
    share = min(step / total, 1.0) if total > 0 else 1.0
    return final + (start - final) * (1 + math.cos(math.pi * share)) / 2
