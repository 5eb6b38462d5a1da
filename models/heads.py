"""Projection and prediction heads, and a BatchNorm whose statistics span all ranks.

B images, D width, C channels, HW pixels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import sum_over_ranks, world_size


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over all axes but the second, with the statistics of all ranks' rows, on any device.

    torch's SyncBatchNorm refuses CPU tensors; here sums and squares are added over ranks by a differentiable
    all-reduce, so that gloo works. In a world of one it is torch's own BatchNorm. All ranks have the same batch size.
    """

    def forward(self, input: Tensor) -> Tensor:
        if world_size() == 1 or not self.training:
            return super().forward(input)
        rows = input.float().movedim(1, -1)
        mean, variance, count = statistics(rows)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        normal = (rows - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            normal = normal * self.weight + self.bias
        return normal.movedim(-1, 1).to(input.dtype)


def statistics(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance [C] of all ranks' rows [..., C], and how many rows they are."""
    axes = tuple(range(rows.dim() - 1))
    count = rows[..., 0].numel() * world_size()
    mean = sum_over_ranks(rows.sum(axes)) / count
    return mean, sum_over_ranks((rows - mean).square().sum(axes)) / count, count


class BatchNorm(_Synchronised, nn.BatchNorm1d):
    """Over [B, D]. Of [B, N, D], while nothing is tracked, each of the N views is a batch of its own: the result of N
    calls in one pass."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return super().forward(input)
        assert self.training and not self.track_running_stats
        columns = input.flatten(1)
        weight, bias = (p if p is None else p.repeat(input.shape[1]) for p in (self.weight, self.bias))
        if world_size() == 1:
            return F.batch_norm(columns, None, None, weight, bias, training=True, eps=self.eps).view_as(input)
        mean, variance, _ = statistics(columns.float())
        normal = ((columns - mean) * (variance + self.eps).rsqrt()).view_as(input)
        return (normal if self.weight is None else normal * self.weight + self.bias).to(input.dtype)


class BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """Over [B, C, H, W], for ResNets."""


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any part normalises by batch statistics."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def mlp(
    width_in: int,
    hidden: int,
    width_out: int,
    layers: int = 2,
    *,
    hidden_norm: bool = True,
    last_norm: bool = False,
    last_affine: bool = False,
    bias: bool = True,
) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them.

    MoBY: two layers, BatchNorm + ReLU in the hidden one only. MoCo v3 and SimCLR normalise the output too, without
    affine parameters (`last_norm`); `last_affine` gives them.
    """
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer + 1 == layers
        size_in, size_out = width_in if layer == 0 else hidden, width_out if last else hidden
        normed = last_norm if last else hidden_norm
        modules.append(nn.Linear(size_in, size_out, bias=bias and not (normed and not last)))
        if normed:
            modules.append(BatchNorm(size_out, affine=last_affine if last else True))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def unit(rows: Tensor) -> Tensor:
    """Rows [..., D] scaled to length 1, in fp32: bf16 is too coarse for similarities under a temperature of 0.2."""
    return F.normalize(rows.float(), dim=-1)
