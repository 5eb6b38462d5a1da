"""Colour of the views in torch, for crops that lie on a GPU: the same plan as `photometric`, all views at once.

Works on any device; nothing is rounded to uint8 on the way. On a GPU every operation is bound by memory, so all but
the blur is written plane by plane, for `torch.compile` to make two passes over the pixels of it: one before the blur
and one after it. What a view does not have is done to it with neutral values: a choice by rows would cost more. Only
the views that have a blur are blurred: by two matrix products a view, which is what GPUs are fast at (a grouped
convolution with another kernel per view is far slower). Where float32 matrix products are allowed to run in TF32, the
blur is 0.1/255 less exact. What the host knows of the views goes to the device in a few copies from pinned memory,
and nothing comes back, so the host never waits. A view's pixels are the same in any batch.

Shape suffixes: V views, G groups of R views with a blur, S side of a view in pixels, C columns of the table of values,
3 channels; a plane is one channel, [V, S, S].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.colour import LUMA, MEAN, SOLARIZE_FROM, STD, ColourPlan, plan_colour
from pipelines.params import ViewParams

_CHUNK = 512  # views at a time, at most: bounds the memory of intermediates to about 1 GB at 224 pixels
_BLURRED = 64  # views that are blurred at a time: 192 planes are enough for a GPU's cores
_EXACT = 1 << 16  # steps between 0 and 1 in which a plane's mean is taken
_LUMA = tuple(LUMA.tolist())

Planes = tuple[Tensor, Tensor, Tensor]


def fused_on_device(
    crops: Tensor, params: ViewParams, out_V3SS: Tensor, *, compiled: bool = False, clamp: bool = False
) -> None:
    """Colours crops and writes the normalised views into `out_V3SS` (any float type, e.g. bfloat16).

    `crops` is uint8 [V, S, S, 3] or floating [V, 3, S, S] in 0…1, on the device of `out_V3SS`. `params` has V entries
    ([B, N] is read row by row). `compiled` runs the passes through torch.compile; compiling is not thread-safe, so
    callers in several threads take turns. `clamp` is the plan's.
    """
    plan = plan_colour(params, clamp)
    table_VC = to_device(table(plan), crops.device)
    before_blur = _compiled(_before_blur) if compiled else _before_blur
    after_blur = _compiled(_after_blur) if compiled else _after_blur
    for rows in even_chunks(len(crops), _CHUNK):
        images_V3SS = before_blur(crops[rows], table_VC[rows])
        groups_GR = blur_groups(plan.sigma_V[rows])
        sigma_GR = plan.sigma_V[rows][groups_GR]
        for index_R, sigma_R in zip(*(to_device(v, crops.device) for v in (groups_GR, sigma_GR)), strict=True):
            images_V3SS.index_copy_(0, index_R, blur(images_V3SS.index_select(0, index_R), sigma_R))
        after_blur(images_V3SS, table_VC[rows], out_V3SS[rows])


def table(plan: ColourPlan) -> NDArray[np.float32]:
    """[V, C]: the plan's values but the blur's, one view a row, in the order in which the passes read them."""
    maps = [part for m in (*plan.before, *plan.after) for part in (m.matrix_V33.reshape(-1, 9), m.mean_V3)]
    flags = [plan.exchange_V, plan.sextants_V, plan.gray_V, plan.solarize_V]
    return np.concatenate([*maps, *(values_V[:, None] for values_V in flags)], axis=1, dtype=np.float32)


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device, which a GPU makes from pinned memory whenever it comes to it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    pinned = tensor.pin_memory() if device.type == "cuda" and len(tensor) else tensor
    return pinned.to(device, non_blocking=True)


def even_chunks(count: int, largest: int) -> list[slice]:
    """Runs of at most `largest` rows, as long as each other where that can be: code is compiled for a shape."""
    size = -(-count // -(-count // largest)) if count else 1
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def blur_groups(sigma_V: NDArray[np.float32]) -> NDArray[np.int64]:
    """[G, R]: the views that have a blur, in groups of one size, the last filled up with its own last view.

    Products of one shape are computed in one way, so a view's pixels do not depend on how many others are blurred.
    """
    blurred = np.flatnonzero(sigma_V)
    return np.pad(blurred, (0, -len(blurred) % _BLURRED), mode="edge" if len(blurred) else "empty").reshape(
        -1, _BLURRED
    )


@cache
def _compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(step, fullgraph=True)


def _before_blur(crops: Tensor, table_VC: Tensor) -> Tensor:
    """[V, 3, S, S] float32 in 0…1: crops after jitter and grayscale."""
    maps, (exchange_V1, sextants_V1, gray_V1, _) = _columns(table_VC)
    planes, half = _planes(crops), len(maps) // 2
    for matrix_V9, mean_V3 in maps[:half]:
        planes = _affine(planes, matrix_V9, mean_V3)
    planes = _shift_hue(_exchange_channels(planes, exchange_V1), sextants_V1)
    for matrix_V9, mean_V3 in maps[half:]:
        planes = _affine(planes, matrix_V9, mean_V3)
    gray_VSS = _weighted(planes, _LUMA)
    return torch.stack([torch.where(gray_V1[..., None] > 0, gray_VSS, plane) for plane in planes], 1)


def _after_blur(images_V3SS: Tensor, table_VC: Tensor, out_V3SS: Tensor) -> Tensor:
    """Solarize and normalise, into `out_V3SS`, which is returned."""
    solarize_V11 = table_VC[:, -1, None, None] > 0
    planes = []
    for plane_VSS, mean, std in zip(images_V3SS.unbind(1), MEAN, STD, strict=True):
        inverted_VSS = torch.where(plane_VSS >= SOLARIZE_FROM / 255, 1 - plane_VSS, plane_VSS)
        planes.append((torch.where(solarize_V11, inverted_VSS, plane_VSS) - mean) / std)
    return out_V3SS.copy_(torch.stack(planes, 1))


def _columns(table_VC: Tensor) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """The maps, those before hue and as many after it, and the flags."""
    maps_VC, flags_V4 = table_VC[:, :-4], table_VC[:, -4:]
    return [(part_V12[:, :9], part_V12[:, 9:]) for part_V12 in maps_VC.split(12, 1)], flags_V4.split(1, 1)


def _planes(crops: Tensor) -> Planes:
    """Values in 0…1 from uint8 [V, S, S, 3] or floating [V, 3, S, S]."""
    if crops.is_floating_point():
        red, green, blue = crops.contiguous().unbind(1)
    else:
        red, green, blue = (plane_VSS.float() / 255 for plane_VSS in crops.unbind(3))
    return red, green, blue


def _weighted(planes: Planes, weights: tuple[Tensor | float, ...]) -> Tensor:
    return planes[0] * weights[0] + planes[1] * weights[1] + planes[2] * weights[2]


def _affine(planes: Planes, matrix_V9: Tensor, mean_V3: Tensor) -> Planes:
    """One 3×4 map for every view; see `photometric.AffineMaps`."""
    means_V3 = torch.stack([_mean(plane_VSS) for plane_VSS in planes], 1)
    shift_V11 = (mean_V3 * means_V3).sum(1)[:, None, None]
    entries = matrix_V9[..., None, None].unbind(1)
    red, green, blue = ((_weighted(planes, entries[i : i + 3]) + shift_V11).clamp(0, 1) for i in (0, 3, 6))
    return red, green, blue


def _mean(plane_VSS: Tensor) -> Tensor:
    """[V]: in whole steps, whose sum is the same in any order and so in any batch."""
    steps_V = (plane_VSS * _EXACT).round().to(torch.int32).sum((1, 2), dtype=torch.int64)
    return steps_V.to(torch.float32) / (_EXACT * plane_VSS[0].numel())


def _exchange_channels(planes: Planes, by_V1: Tensor) -> Planes:
    """Channel c of view v comes from channel c − by[v]: hue moved by thirds of a turn."""
    by_V11 = by_V1[..., None]
    red, green, blue = (
        torch.where(by_V11 == 0, planes[c], torch.where(by_V11 == 1, planes[c - 1], planes[c - 2])) for c in range(3)
    )
    return red, green, blue


def _shift_hue(planes: Planes, sextants_V1: Tensor) -> Planes:
    """Hue moved by −1 … 1 sextants; the formula is explained at `photometric.split_turns`."""
    sextants_V11 = sextants_V1[..., None]
    most_VSS = torch.maximum(torch.maximum(planes[0], planes[1]), planes[2])
    least_VSS = torch.minimum(torch.minimum(planes[0], planes[1]), planes[2])
    limit_VSS = (1 - sextants_V11.abs()) * (most_VSS - least_VSS)

    def moved(channel: int) -> Tensor:
        across_VSS = planes[channel - 2] - planes[channel - 1]
        soft_VSS = across_VSS - across_VSS.clamp(-limit_VSS, limit_VSS)
        return (planes[channel] - sextants_V11.sign() * soft_VSS).clamp(least_VSS, most_VSS)

    return moved(0), moved(1), moved(2)


def blur(images_R3SS: Tensor, sigma_R: Tensor) -> Tensor:
    """Rows, then columns: G X Gᵀ. G, S × S, holds the Gaussian of each pixel's distance from each other one, and from
    its reflections at both borders, which do not repeat the edge; nothing is cut off."""
    size = images_R3SS.shape[-1]
    place_S = torch.arange(size, device=images_R3SS.device)
    from_S1, to_S = place_S[:, None], place_S
    twice_R11 = 2 * sigma_R[:, None, None].square()

    def weight(apart_SS: Tensor) -> Tensor:
        return torch.exp(-apart_SS.square() / twice_R11)

    matrix_RSS = weight(to_S - from_S1) + weight(to_S + from_S1) * (to_S > 0)
    matrix_RSS += weight(2 * (size - 1) - to_S - from_S1) * (to_S < size - 1)
    matrix_RSS /= matrix_RSS.sum(2, keepdim=True)
    along_R3SS = torch.bmm(images_R3SS.flatten(1, 2), matrix_RSS.mT).view_as(images_R3SS)
    return matrix_RSS[:, None] @ along_R3SS
