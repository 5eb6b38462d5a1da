"""Collectives that are the identity in a world of one. B images of a rank, W ranks, D width."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank's number."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def gather(rows_BD: Tensor) -> Tensor:
    """[W·B, D]: the rows of all ranks in the order of ranks, without gradient."""
    if world_size() == 1:
        return rows_BD
    parts = [torch.empty_like(rows_BD) for _ in range(world_size())]
    dist.all_gather(parts, rows_BD.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward sums all ranks' gradients with respect to this rank's rows.

    Keeping the local gradient alone, as is often done, makes the average over ranks too small by the world size.
    """

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        ctx.batch = len(rows_BD)
        return gather(rows_BD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = rank() * ctx.batch
        return total[start : start + ctx.batch]


def gather_with_gradient(rows_BD: Tensor) -> Tensor:
    """[W·B, D]: the rows of all ranks; gradients flow back to every rank's own rows."""
    return _Gather.apply(rows_BD) if world_size() > 1 else rows_BD  # type: ignore[return-value]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks; gradients are summed likewise."""
    return _Sum.apply(value) if world_size() > 1 else value  # type: ignore[return-value]
