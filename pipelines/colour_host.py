"""Colour of the views on the CPU: given parameters, uint8 crops become normalised float32 views.

The plan of `pipelines/colour.py` in the policies' order: ColorJitter's four operations in the view's own order,
grayscale, Gaussian blur, solarize, normalisation. Between its stages values are rounded to uint8 and clamped, as after
every operation of PIL; normalisation reads uint8 and writes float32 once.

OpenCV does the pixels; every call releases the interpreter lock, so threads scale.

Shape suffixes: V views, S side of a view in pixels, 3 channels; crops are [V, S, S, 3], results [V, 3, S, S].
"""

from __future__ import annotations

import threading

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray
from torch import Tensor

from pipelines.colour import MEAN, STD, AffineMaps, ColourPlan, blur_radius, plan_colour
from pipelines.params import ViewParams

# uint8 value → normalised value, per channel.
_SCALE = tuple(1 / (255 * std) for std in STD)
_SHIFT = tuple(-mean / std for mean, std in zip(MEAN, STD, strict=True))


def fused(crops_VSS3: NDArray[np.uint8], params: ViewParams, out_V3SS: Tensor, *, clamp: bool = False) -> None:
    """Colours crops and writes the normalised views into `out_V3SS` (float32, CPU, contiguous).

    `params` has V entries ([B, N] is read row by row); `clamp` is the plan's. Safe to call from many threads at once.
    """
    plan = plan_colour(params, clamp)
    for row, (crop_SS3, view_3SS) in enumerate(zip(crops_VSS3, out_V3SS.numpy(), strict=True)):
        _colour_view(crop_SS3, plan, row, view_3SS)


def _colour_view(crop_SS3: NDArray[np.uint8], plan: ColourPlan, row: int, out_3SS: NDArray[np.float32]) -> None:
    """Row `row` of the plan on one crop, written into `out_3SS`."""
    scratch = _scratch(len(crop_SS3))
    image_SS3 = _jitter(crop_SS3, plan, row, scratch)
    planes_3 = scratch.planes_3
    if plan.gray_V[row]:
        gray_SS = cv2.cvtColor(image_SS3, cv2.COLOR_RGB2GRAY, planes_3[0])
        planes_3 = [_blur(gray_SS, float(plan.sigma_V[row]), planes_3[1])] * 3
    else:
        cv2.split(_blur(image_SS3, float(plan.sigma_V[row]), scratch.image_SS3()), planes_3)
    if plan.solarize_V[row]:
        planes_3 = [_solarize(plane_SS, out_SS) for plane_SS, out_SS in zip(planes_3, scratch.shifted_3, strict=True)]
    for plane_SS, scale, shift, out_SS in zip(planes_3, _SCALE, _SHIFT, out_3SS, strict=True):
        # The only conversion to float32 of OpenCV's that is vectorised and takes an offset; the second image counts 0.
        cv2.addWeighted(plane_SS, scale, plane_SS, 0, shift, out_SS, cv2.CV_32F)


class _Scratch:
    """Buffers of one thread for views of one size: fresh ones would cost page faults at every view.

    Together 1 MB at 224 pixels, so that all of a view stays in a core's second-level cache.
    """

    def __init__(self, size: int) -> None:
        self._images_SS3 = [np.empty((size, size, 3), np.uint8) for _ in range(2)]
        self._next = 0
        self.planes_3, self.limits_3, self.shifted_3, self.others_4 = (
            [np.empty((size, size), np.uint8) for _ in range(count)] for count in (3, 3, 3, 4)
        )

    def image_SS3(self) -> NDArray[np.uint8]:
        """A buffer other than the one given before, which holds what is being worked on."""
        self._next = 1 - self._next
        return self._images_SS3[self._next]


_local = threading.local()


def _scratch(size: int) -> _Scratch:
    scratches: dict[int, _Scratch] = _local.__dict__.setdefault("scratches", {})
    if size not in scratches:
        scratches[size] = _Scratch(size)
    return scratches[size]


def _jitter(image_SS3: MatLike, plan: ColourPlan, row: int, scratch: _Scratch) -> MatLike:
    image_SS3 = _affine(image_SS3, plan.before, row, scratch)
    exchange, sextants = int(plan.exchange_V[row]), float(plan.sextants_V[row])
    if exchange or sextants:
        image_SS3 = _shift_hue(image_SS3, exchange, sextants, scratch)
    return _affine(image_SS3, plan.after, row, scratch)


def _affine(image_SS3: MatLike, every: tuple[AffineMaps, ...], row: int, scratch: _Scratch) -> MatLike:
    """One map after the other."""
    for maps in every:
        if not maps.active_V[row]:
            continue
        matrix_34 = np.empty((3, 4), np.float32)
        matrix_34[:, :3] = maps.matrix_V33[row]
        weights_3 = maps.mean_V3[row].tolist()
        mean_3 = cv2.mean(image_SS3) if any(weights_3) else (0, 0, 0)  # only contrast needs it
        matrix_34[:, 3] = weights_3[0] * mean_3[0] + weights_3[1] * mean_3[1] + weights_3[2] * mean_3[2]
        image_SS3 = cv2.transform(image_SS3, matrix_34, dst=scratch.image_SS3())
    return image_SS3


def _shift_hue(image_SS3: MatLike, exchange: int, sextants: float, scratch: _Scratch) -> MatLike:
    """The formula of `split_turns` plane by plane; uint8 arithmetic, which stops at 0 and at 255, does soft()."""
    planes_3, limits_3, shifted_3 = scratch.planes_3, scratch.limits_3, scratch.shifted_3
    most_SS, least_SS, limit_SS, up_SS = scratch.others_4
    cv2.split(image_SS3, planes_3)
    cv2.max(cv2.max(planes_3[0], planes_3[1], most_SS), planes_3[2], most_SS)
    cv2.min(cv2.min(planes_3[0], planes_3[1], least_SS), planes_3[2], least_SS)
    left = 1 - abs(sextants)
    cv2.addWeighted(most_SS, left, least_SS, -left, 0, limit_SS)
    for plane_SS, above_SS in zip(planes_3, limits_3, strict=True):
        cv2.add(plane_SS, limit_SS, above_SS)
    for channel, down_SS in enumerate(shifted_3):
        following, last = (channel - 2, channel - 1) if sextants >= 0 else (channel - 1, channel - 2)
        cv2.subtract(planes_3[following], limits_3[last], down_SS)
        cv2.subtract(planes_3[last], limits_3[following], up_SS)
        cv2.max(cv2.subtract(planes_3[channel], down_SS, down_SS), least_SS, down_SS)
        cv2.min(cv2.add(down_SS, up_SS, down_SS), most_SS, down_SS)
    return cv2.merge([shifted_3[channel - exchange] for channel in range(3)], scratch.image_SS3())


def _blur(image: MatLike, sigma: float, out: MatLike) -> MatLike:
    """The image itself where sigma is 0. Reflects at the border without repeating the edge, as torchvision does."""
    if sigma == 0:
        return image
    # Beyond 3 sigma lie 0.3 % of the weight: leaving them out costs at most 0.3/255 and saves half of the window.
    radius = blur_radius(len(image), sigma, sigmas=3)
    kernel = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel, dst=out, borderType=cv2.BORDER_REFLECT_101)


def _solarize(plane_SS: MatLike, out_SS: MatLike) -> MatLike:
    """Inverts values of 128 and more: always the smaller of a value and its inverse."""
    return cv2.min(plane_SS, cv2.bitwise_not(plane_SS, out_SS), out_SS)
