"""The colour plan: what is done to the colour of each view, from its parameters, without a pixel.

Brightness, contrast and saturation are affine in RGB once the mean colour is known, so every run of them is one 3×4
map; hue is not, and splits the jitter into map, hue, map. Hue is torchvision's and PIL's, a shift in HSV, but without
going there: see `split_turns`.

Shape suffixes: V views, S side of a view in pixels, 3 channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.params import JITTER_OPS, JITTER_ORDERS, ViewParams

# ImageNet's mean and standard deviation of RGB in 0…1: what published backbones were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# torchvision's weights of RGB in gray (ITU-R 601, four digits).
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)
# Values from here on are inverted by solarize, of 255 (BYOL, appendix B).
SOLARIZE_FROM = 128

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(len(JITTER_OPS))
_OPERATIONS = 3  # that are affine
_ORDERS = np.array(JITTER_ORDERS)


def blur_radius(size: int, sigma: float, sigmas: float = 6) -> int:
    """Pixels to each side of the middle that a Gaussian's window has in a view of `size` pixels: `sigmas` sigma, no
    more than can be reflected at the border.

    Beyond 6 sigma lies no weight that float32 holds. BYOL's window of 23 pixels at 224 (SimCLR, appendix A: 10 % of the
    image's side) ends at 5.5 sigma of its largest sigma, so that nothing is cut off there either.
    """
    return min(size - 1, math.ceil(sigmas * sigma))


@dataclass(frozen=True)
class AffineMaps:
    """x ↦ A x + (m · mean RGB of the view) (1, 1, 1)ᵀ for each view: brightness, contrast, saturation in any order."""

    matrix_V33: NDArray[np.float32]
    mean_V3: NDArray[np.float32]
    active_V: NDArray[np.bool_]
    """False where the map is the identity."""


@dataclass(frozen=True)
class ColourPlan:
    """What is done to the colour of V views, ready for the pixels."""

    before: tuple[AffineMaps, ...]
    """Ahead of hue, one after the other; the whole of the jitter where there is no hue."""
    exchange_V: NDArray[np.int64]
    """Hue, first part: times that the channels move on by one, 0 … 2."""
    sextants_V: NDArray[np.float32]
    """Hue, second part: shift in sixths of a turn, −1 … 1."""
    after: tuple[AffineMaps, ...]
    gray_V: NDArray[np.bool_]
    sigma_V: NDArray[np.float32]
    """Gaussian blur in pixels, 0 for none."""
    solarize_V: NDArray[np.bool_]


def split_turns(turns_V: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A shift of hue as thirds of a turn, which only exchange channels, and sextants t between −1 and 1.

    For these HSV needs no conversion. Let v and m be a pixel's largest and smallest channel: they stay. Each channel is
    a trapezoid over hue, flat over two sextants at v and at m, with ramps of one sextant. So on a ramp a channel moves
    by t (v − m), and from a flat part by as much of that as is left after the way to the corner, which the other two
    channels tell. Both are said by

        R′ = clamp(R − sign(t) · soft(G − B, (1 − |t|) (v − m)), m, v),   soft(e, θ) = sign(e) · max(|e| − θ, 0)

    and the same with R, G, B moved on for the other two. No division, no sectors, and exact in uint8 but for θ.
    """
    thirds_V = np.rint(3 * turns_V)
    return thirds_V.astype(np.int64) % 3, (6 * turns_V - 2 * thirds_V).astype(np.float32)


def plan_colour(params: ViewParams, clamp: bool = False) -> ColourPlan:
    """The plan of all views in `params` ([B, N] is read row by row), computed without pixels; with `clamp`, values are
    clamped wherever torchvision's operations clamp any."""
    params = params.flat()
    hue_V = np.where(params.jitter, params.hue, np.float32(0))
    order_V4 = _ORDERS[params.order]
    place_V = np.where(hue_V != 0, np.argmax(order_V4 == _HUE, axis=1), len(JITTER_OPS))
    ahead_V4 = np.arange(len(JITTER_OPS)) < place_V[:, None]
    jitter_V1 = params.jitter[:, None]
    exchange_V, sextants_V = split_turns(hue_V)
    return ColourPlan(
        before=_affine_maps(params, order_V4, ahead_V4 & jitter_V1, clamp),
        exchange_V=exchange_V,
        sextants_V=sextants_V,
        after=_affine_maps(params, order_V4, ~ahead_V4 & jitter_V1, clamp),
        gray_V=params.gray,
        sigma_V=params.blur,
        solarize_V=params.solarize,
    )


def _affine_maps(
    params: ViewParams, order_V4: NDArray[np.integer], use_V4: NDArray[np.bool_], clamp: bool
) -> tuple[AffineMaps, ...]:
    """The operations of `order_V4` where `use_V4`, composed to one map, between whose parts nothing is clamped; with
    `clamp` to three, each of which ends with an operation that may leave the range of values."""
    one = np.float32(1)
    identity_V33 = np.tile(np.eye(3, dtype=np.float32), (len(order_V4), 1, 1))
    matrix_V33, mean_V3 = identity_V33.copy(), np.zeros((len(order_V4), 3), np.float32)
    active_V = np.zeros(len(order_V4), np.bool_)
    maps = tuple(
        AffineMaps(identity_V33.copy(), mean_V3.copy(), active_V.copy()) for _ in range(_OPERATIONS if clamp else 1)
    )
    done_V = np.zeros(len(order_V4), np.int64)  # maps that are finished

    def factor(op: int, values_V: NDArray[np.float32], place: int) -> NDArray[np.float32]:
        return np.where(use_V4[:, place] & (order_V4[:, place] == op), values_V, one)

    for place in range(len(JITTER_OPS)):
        b_V = factor(_BRIGHTNESS, params.brightness, place)
        c_V = factor(_CONTRAST, params.contrast, place)
        s_V = factor(_SATURATION, params.saturation, place)
        active_V |= (b_V != 1) | (c_V != 1) | (s_V != 1)
        gray_V3 = np.einsum("c,vcd->vd", LUMA, matrix_V33)  # luma of the image so far, as a row on the input's RGB
        # At one place one factor at most is not 1. Brightness: b x. Contrast: c x + (1 − c) mean luma.
        # Saturation: s x + (1 − s) luma of x.
        mean_V3 = (b_V * c_V * (s_V + (1 - s_V) * LUMA.sum()))[:, None] * mean_V3 + (1 - c_V)[:, None] * (
            gray_V3 + LUMA.sum() * mean_V3
        )
        matrix_V33 = (b_V * c_V * s_V)[:, None, None] * matrix_V33 + ((1 - s_V)[:, None] * gray_V3)[:, None, :]
        # A factor of at most 1 mixes values that are in the range with others that are: nothing to clamp.
        ends_V = active_V & (clamp & (b_V * c_V * s_V > 1) | (place == len(JITTER_OPS) - 1))
        for number, part in enumerate(maps):
            rows = ends_V & (done_V == number)
            part.matrix_V33[rows], part.mean_V3[rows], part.active_V[rows] = matrix_V33[rows], mean_V3[rows], True
        done_V += ends_V
        matrix_V33[ends_V], mean_V3[ends_V], active_V[ends_V] = identity_V33[ends_V], 0, False
    return maps


def normalise(images_V3SS: Tensor) -> Tensor:
    """[V, 3, S, S] in 0…1 → minus ImageNet's mean, over its standard deviation."""
    mean_311, std_311 = (images_V3SS.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images_V3SS - mean_311) / std_311
