"""The momentum (target) encoder."""

import copy
import math

import torch
from torch import nn


def target_of(online: nn.Module) -> nn.Module:
    """A copy that gradients never reach."""
    return copy.deepcopy(online).requires_grad_(False)


def momentum_at(step: int, total: int, start: float) -> float:
    """Cosine from `start` at step 0 to 1 at step `total` (BYOL, section 3.1; MoBY)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(step / total, 1.0)) + 1) / 2


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """θ_target ← m·θ_target + (1 − m)·θ_online, over the parameters that both have, by name."""
    sources = dict(online.named_parameters())
    pairs = [(p, sources[name]) for name, p in target.named_parameters()]
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        [p for p, _ in pairs], [q.detach() for _, q in pairs], 1 - momentum
    )
