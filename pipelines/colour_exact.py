"""Colour of the views one operation after the other, as torchvision defines them: the reference for `fused`.

Kornia's functional operations with our parameters, in float32 on whatever device the crops are on, each view in its
own order of operations. Slow (`hardviews bench views --accuracy` shows how near the fast ones come).

Shape suffixes: V views, S side of a view in pixels, 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import kornia.color as kc
import kornia.enhance as ke
import kornia.filters as kf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.colour import LUMA, SOLARIZE_FROM, blur_radius, normalise
from pipelines.params import JITTER_OPS, JITTER_ORDERS, ViewParams


def _gray(images_V3SS: Tensor) -> Tensor:
    """[V, 1, S, S] by torchvision's weights; Kornia's own are 0.01/255 off, enough to solarize other pixels."""
    return kc.rgb_to_grayscale(images_V3SS, images_V3SS.new_tensor(LUMA))


def _contrast(images_V3SS: Tensor, factor_V: Tensor) -> Tensor:
    mean_V111 = _gray(images_V3SS).mean((2, 3), keepdim=True)
    return torch.lerp(mean_V111, images_V3SS, factor_V[:, None, None, None]).clamp_(0, 1)


def _saturation(images_V3SS: Tensor, factor_V: Tensor) -> Tensor:
    return torch.lerp(_gray(images_V3SS), images_V3SS, factor_V[:, None, None, None]).clamp_(0, 1)


# Kornia's adjust_brightness adds, this is torchvision's. Hue is in radians there, in turns here.
_JITTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": ke.adjust_brightness_accumulative,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": lambda images, turns: ke.adjust_hue(images, turns * (2 * math.pi)),
}
_NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
# Further than this from torchvision's values, in 0…1, no operation before solarize comes (measured: 3e-6).
_ROUNDING = 1e-5
_CHUNK = 128  # views at a time: bounds the memory of Kornia's intermediates to about 1 GB at 224 pixels


def exact(crops_VSS3: NDArray[np.uint8] | Tensor, params: ViewParams, out_V3SS: Tensor) -> None:
    """Colours uint8 crops and writes the normalised views into `out_V3SS` (any float type, on any device).

    `params` has V entries ([B, N] is read row by row).
    """
    params = params.flat()
    for start in range(0, len(crops_VSS3), _CHUNK):
        rows = slice(start, start + _CHUNK)
        crops = torch.as_tensor(crops_VSS3[rows], device=out_V3SS.device)
        images_V3SS = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
        out_V3SS[rows] = normalise(colour(images_V3SS, params[rows]))


def colour(images_V3SS: Tensor, params: ViewParams) -> Tensor:
    """[V, 3, S, S] float32 in 0…1 → the same after jitter, grayscale, blur and solarize, before normalisation."""
    images_V3SS = images_V3SS.clone()
    order_V4 = np.array(JITTER_ORDERS)[params.order]
    for place in range(len(JITTER_OPS)):
        for op, name in enumerate(JITTER_OPS):
            strength_V = getattr(params, name)
            use_V = params.jitter & (order_V4[:, place] == op) & (strength_V != _NEUTRAL[name])
            _apply(images_V3SS, use_V, _JITTER[name], strength_V)
    _apply(images_V3SS, params.gray, lambda images: _gray(images).expand_as(images))
    radius_V = np.array([blur_radius(images_V3SS.shape[-1], sigma) for sigma in params.blur.tolist()])
    for radius in np.unique(radius_V[params.blur > 0]).tolist():  # of its own sigma, whatever else is in the batch
        _apply(images_V3SS, (params.blur > 0) & (radius_V == radius), partial(_blur, radius), params.blur)
    _apply(images_V3SS, params.solarize, _solarize)
    return images_V3SS


def _apply(
    images_V3SS: Tensor, use_V: NDArray[np.bool_], op: Callable[..., Tensor], *args_V: NDArray[np.float32]
) -> None:
    """Runs `op` on the views that have it, in place."""
    if use_V.any():
        rows = torch.as_tensor(np.flatnonzero(use_V), device=images_V3SS.device)
        values = [torch.as_tensor(values_V[use_V], device=images_V3SS.device) for values_V in args_V]
        images_V3SS[rows] = op(images_V3SS[rows], *values)


def _blur(radius: int, images_V3SS: Tensor, sigma_V: Tensor) -> Tensor:
    size = 2 * radius + 1
    return kf.gaussian_blur2d(images_V3SS, (size, size), sigma_V[:, None].expand(-1, 2))


def _solarize(images_V3SS: Tensor) -> Tensor:
    """Inverts from the threshold on; the middle of both for values that rounding alone may have put on their side.

    At the threshold the result jumps by 1/255, to which a value on the wrong side would add its own error.
    """
    threshold = torch.as_tensor(SOLARIZE_FROM / 255, dtype=images_V3SS.dtype, device=images_V3SS.device)
    beside = ((images_V3SS - threshold).abs() < _ROUNDING) & (images_V3SS != threshold)
    return torch.where(beside, 0.5, ke.solarize(images_V3SS, SOLARIZE_FROM / 255))
