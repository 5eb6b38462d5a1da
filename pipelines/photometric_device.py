"""Colour of the views in torch, for crops that lie on a GPU: the same plan as `photometric`, all views at once.

Works on any device; nothing is rounded to uint8 on the way. On a GPU every operation is bound by memory, so views
without an operation are left out of it, and a blur is two matrix products per view, which tensor cores do in passing
(a grouped convolution with another kernel per view is far slower). Where float32 matrix products are allowed to run in
TF32, maps and blur are 0.1/255 less exact.

Shape suffixes: V views, S side of a view in pixels, K taps of the Gaussian, 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.params import ViewParams
from pipelines.photometric import LUMA, SOLARIZE_FROM, AffineMaps, blur_kernel_size, normalise, plan_colour

_CHUNK = 256  # views at a time: bounds the memory of intermediates to about 2 GB at 224 pixels


def fused_on_device(crops: Tensor, params: ViewParams, out_V3SS: Tensor) -> None:
    """Colours crops and writes the normalised views into `out_V3SS` (any float type, e.g. bfloat16).

    `crops` is uint8 [V, S, S, 3] or floating [V, 3, S, S] in 0…1, on the device of `out_V3SS`. `params` has V entries
    ([B, N] is read row by row).
    """
    params = params.flat()
    for start in range(0, len(crops), _CHUNK):
        rows = slice(start, start + _CHUNK)
        images_V3SS = crops[rows]
        scale = 1 if images_V3SS.is_floating_point() else 255
        images_V3SS = images_V3SS if images_V3SS.is_floating_point() else images_V3SS.permute(0, 3, 1, 2)
        images_V3SS = images_V3SS.to(torch.float32, memory_format=torch.contiguous_format) / scale
        out_V3SS[rows] = normalise(colour(images_V3SS, params[rows]))


def colour(images_V3SS: Tensor, params: ViewParams) -> Tensor:
    """[V, 3, S, S] float32 in 0…1 → the same after jitter, grayscale, blur and solarize, before normalisation."""
    plan = plan_colour(params)
    images_V3SS = _affine(images_V3SS, plan.before)
    images_V3SS = _apply(images_V3SS, plan.exchange_V != 0, _exchange_channels, plan.exchange_V)
    images_V3SS = _apply(images_V3SS, plan.sextants_V != 0, _shift_hue, plan.sextants_V)
    images_V3SS = _affine(images_V3SS, plan.after)
    images_V3SS = _apply(images_V3SS, plan.gray_V, _to_gray)
    images_V3SS = _apply(images_V3SS, plan.sigma_V > 0, _blur, plan.sigma_V)
    return _apply(images_V3SS, plan.solarize_V, _solarize)


def _apply(
    images_V3SS: Tensor, use_V: NDArray[np.bool_], op: Callable[..., Tensor], *args_V: NDArray[np.generic]
) -> Tensor:
    """`op` on the views that have it. The rows are found on the host: a mask on the device would make it wait."""
    if not use_V.any():
        return images_V3SS
    values = [torch.as_tensor(values_V[use_V], device=images_V3SS.device) for values_V in args_V]
    if use_V.all():
        return op(images_V3SS, *values)
    rows = torch.as_tensor(np.flatnonzero(use_V), device=images_V3SS.device)
    return images_V3SS.index_copy(0, rows, op(images_V3SS[rows], *values))


def _affine(images_V3SS: Tensor, maps: AffineMaps) -> Tensor:
    """One 3×4 map for every view, the identity included: cheaper than picking the views that have another."""
    if not maps.active_V.any():
        return images_V3SS
    pixels_V3P = images_V3SS.flatten(2)
    matrix_V33 = torch.as_tensor(maps.matrix_V33, device=images_V3SS.device)
    mean_V3 = torch.as_tensor(maps.mean_V3, device=images_V3SS.device)
    shift_V11 = (mean_V3 * pixels_V3P.mean(2)).sum(1)[:, None, None]
    return torch.baddbmm(shift_V11, matrix_V33, pixels_V3P).clamp_(0, 1).view_as(images_V3SS)


def _exchange_channels(images_V3SS: Tensor, by_V: Tensor) -> Tensor:
    """Channel c of view v comes from channel c − by_V[v]: hue moved by thirds of a turn."""
    source_V3 = (torch.arange(3, device=by_V.device) - by_V[:, None]) % 3
    return images_V3SS[torch.arange(len(by_V), device=by_V.device)[:, None], source_V3]


def _shift_hue(images_V3SS: Tensor, sextants_V: Tensor) -> Tensor:
    """Hue moved by −1 … 1 sextants; the formula is explained at `photometric.split_turns`."""
    sextants_V111 = sextants_V[:, None, None, None]
    most_V1SS, least_V1SS = images_V3SS.amax(1, keepdim=True), images_V3SS.amin(1, keepdim=True)
    limit_V1SS = (1 - sextants_V111.abs()) * (most_V1SS - least_V1SS)
    across_V3SS = images_V3SS.roll(-1, 1) - images_V3SS.roll(-2, 1)
    soft_V3SS = across_V3SS - across_V3SS.clamp(-limit_V1SS, limit_V1SS)
    return torch.addcmul(images_V3SS, soft_V3SS, sextants_V111.sign(), value=-1).clamp(least_V1SS, most_V1SS)


def _to_gray(images_V3SS: Tensor) -> Tensor:
    luma_311 = torch.as_tensor(LUMA, device=images_V3SS.device)[:, None, None]
    return (images_V3SS * luma_311).sum(1, keepdim=True).expand_as(images_V3SS)


def _blur(images_V3SS: Tensor, sigma_V: Tensor) -> Tensor:
    """Columns, then rows: G X Gᵀ, with the reflection at the border folded into each view's S × S matrix G."""
    size = images_V3SS.shape[-1]
    radius = blur_kernel_size(size) // 2
    taps_K = torch.arange(-radius, radius + 1, device=images_V3SS.device)
    weights_VK = torch.exp(-0.5 * (taps_K / sigma_V[:, None]).square())
    weights_VK /= weights_VK.sum(1, keepdim=True)
    matrix_VSS = (weights_VK @ _reflected_shifts(size, radius, images_V3SS.device)).view(-1, size, size)
    return matrix_VSS[:, None] @ images_V3SS @ matrix_VSS.mT[:, None]


@lru_cache(maxsize=8)
def _reflected_shifts(size: int, radius: int, device: torch.device) -> Tensor:
    """[K, S·S]: matrix k takes pixel i from i + k − radius, reflected at the border without repeating the edge."""
    source_KS = torch.arange(size, device=device) + torch.arange(-radius, radius + 1, device=device)[:, None]
    source_KS = source_KS.abs()
    source_KS = torch.where(source_KS >= size, 2 * (size - 1) - source_KS, source_KS)
    return torch.nn.functional.one_hot(source_KS, size).float().flatten(1)


def _solarize(images_V3SS: Tensor) -> Tensor:
    return torch.where(images_V3SS >= SOLARIZE_FROM / 255, 1 - images_V3SS, images_V3SS)
