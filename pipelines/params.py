"""The parameters of every view, as arrays, and what follows from them for pairs of views.

Shape suffixes: B images, N views, P = N(N−1)/2 pairs of views in lexicographic order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# ColorJitter's four operations; `ViewParams.order` is an index into the permutations of them.
JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(len(JITTER_OPS))))

DTYPES: dict[str, type[np.generic]] = {
    "top": np.int32,
    "left": np.int32,
    "height": np.int32,
    "width": np.int32,
    "flip": np.bool_,
    "jitter": np.bool_,
    "brightness": np.float32,
    "contrast": np.float32,
    "saturation": np.float32,
    "hue": np.float32,
    "order": np.uint8,
    "gray": np.bool_,
    "blur": np.float32,
    "solarize": np.bool_,
}


@dataclass(frozen=True)
class ViewParams:
    """What is done to each view, in the order of the fields; every array has shape [B, N].

    The geometry, then ColorJitter, then grayscale, blur, solarize: the order in which the policies apply them.
    """

    top: NDArray[np.int32]
    """Crop box's first row, source pixels."""
    left: NDArray[np.int32]
    """Crop box's first column, source pixels."""
    height: NDArray[np.int32]
    """Crop box's height, source pixels."""
    width: NDArray[np.int32]
    """Crop box's width, source pixels."""
    flip: NDArray[np.bool_]
    """Mirrored left to right after the crop."""
    jitter: NDArray[np.bool_]
    """Whether ColorJitter applies at all; where not, the factors below are 1, 1, 1, 0 and the order 0."""
    brightness: NDArray[np.float32]
    """Factor, torchvision's `adjust_brightness`."""
    contrast: NDArray[np.float32]
    """Factor about the view's mean gray, torchvision's `adjust_contrast`."""
    saturation: NDArray[np.float32]
    """Factor, torchvision's `adjust_saturation`."""
    hue: NDArray[np.float32]
    """Shift in turns of the colour circle, −0.5 … 0.5, torchvision's `adjust_hue`."""
    order: NDArray[np.uint8]
    """Index into JITTER_ORDERS, the 24 orders of (brightness, contrast, saturation, hue)."""
    gray: NDArray[np.bool_]
    """Turned to grayscale, three equal channels."""
    blur: NDArray[np.float32]
    """Gaussian blur's sigma in pixels of the view; 0 for none."""
    solarize: NDArray[np.bool_]
    """Values of 128 and more (of 255) inverted."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N), or what indexing has left of it."""
        return self.top.shape

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, index: Any) -> ViewParams:
        """The same numpy index applied to every array: rows, `[:, views]`, a mask."""
        return ViewParams(**{name: getattr(self, name)[index] for name in FIELDS})

    def flat(self) -> ViewParams:
        """[B·N]: views in a row, the views of an image side by side."""
        return ViewParams(**{name: getattr(self, name).reshape(-1) for name in FIELDS})

    @staticmethod
    def concatenate(parts: Sequence[ViewParams], axis: int = 0) -> ViewParams:
        """Parts joined along images (axis 0) or views (axis 1)."""
        return ViewParams(**{name: np.concatenate([getattr(part, name) for part in parts], axis) for name in FIELDS})

    @staticmethod
    def identity(top: NDArray[Any], left: NDArray[Any], height: NDArray[Any], width: NDArray[Any]) -> ViewParams:
        """Crop boxes without any flip or colour operation."""
        shape = np.shape(top)
        values: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name, dtype in DTYPES.items()}
        values |= {name: np.ones(shape, np.float32) for name in ("brightness", "contrast", "saturation")}
        boxes = {"top": top, "left": left, "height": height, "width": width}
        values |= {name: np.asarray(box, np.int32) for name, box in boxes.items()}
        return ViewParams(**values)


FIELDS: tuple[str, ...] = tuple(field.name for field in fields(ViewParams))


@cache
def pairs(views: int) -> NDArray[np.int64]:
    """[P, 2]: the pairs of `views` views in lexicographic order: (0, 1), (0, 2), …, (1, 2), …"""
    table_P2 = np.array(list(itertools.combinations(range(views), 2)), np.int64).reshape(-1, 2)
    table_P2.setflags(write=False)
    return table_P2


def pair_iou(params: ViewParams) -> NDArray[np.float32]:
    """[B, P]: intersection over union of the two crop boxes, as areas in the source image."""
    a, b = _pair_ends(params)
    bottom = np.minimum(a.top + a.height, b.top + b.height)
    right = np.minimum(a.left + a.width, b.left + b.width)
    rows = np.maximum(bottom - np.maximum(a.top, b.top), 0).astype(np.float64)
    columns = np.maximum(right - np.maximum(a.left, b.left), 0)
    both = rows * columns
    union = a.height.astype(np.float64) * a.width + b.height.astype(np.float64) * b.width - both
    return (both / union).astype(np.float32)


def pair_distance(params: ViewParams, sizes_B2: NDArray[np.integer]) -> NDArray[np.float32]:
    """[B, P]: distance of the two crops' centres over the image's diagonal (HVP, section 5: relative distance)."""
    a, b = _pair_ends(params)
    rows = (a.top + a.height / 2) - (b.top + b.height / 2)
    columns = (a.left + a.width / 2) - (b.left + b.width / 2)
    diagonal_B1 = np.hypot(sizes_B2[:, 0], sizes_B2[:, 1])[:, None]
    return (np.hypot(rows, columns) / diagonal_B1).astype(np.float32)


def pair_colour_distance(params: ViewParams) -> NDArray[np.float32]:
    """[B, P]: Euclidean distance of the four jitter strengths (HVP, section 5: colour distance)."""
    a, b = _pair_ends(params)
    squares = [np.square(getattr(a, name) - getattr(b, name)) for name in JITTER_OPS]
    return np.sqrt(np.sum(squares, axis=0, dtype=np.float32))


# What describes a view among its image's others, for `pair_columns`.
DESCRIBED = ("area", "row", "column", "aspect", "flip", *JITTER_OPS, "gray", "blur", "solarize")
PAIR_COLUMNS = ("iou", "cross_policy", *(f"{end}_{name}" for name in DESCRIBED for end in ("least", "greatest")))


def pair_columns(params: ViewParams, sizes_B2: NDArray[np.integer]) -> NDArray[np.float32]:
    """[B, P, X]: what a regression knows of a pair, in the order of PAIR_COLUMNS.

    IoU; whether the views come from different policies of two; the least and the greatest of the two views' crop area
    (share of the image), centre (shares of its height and width), aspect (logarithm) and colour parameters. Their
    difference is a linear function of these two.
    """
    height_B1, width_B1 = sizes_B2[:, :1], sizes_B2[:, 1:]
    described = {name: getattr(params, name) for name in DESCRIBED[4:]} | {
        "area": params.height / height_B1 * params.width / width_B1,
        "row": (params.top + params.height / 2) / height_B1,
        "column": (params.left + params.width / 2) / width_B1,
        "aspect": np.log(params.width / params.height),
    }
    table_P2 = pairs(params.shape[1])
    cross_P = (table_P2[:, 0] - table_P2[:, 1]) % 2 != 0
    columns = [pair_iou(params), np.broadcast_to(cross_P, (len(params), len(table_P2)))]
    for name in DESCRIBED:
        ends_BP2 = described[name][:, table_P2]
        columns += [ends_BP2.min(2), ends_BP2.max(2)]
    return np.stack(columns, 2).astype(np.float32)


def _pair_ends(params: ViewParams) -> tuple[ViewParams, ViewParams]:
    """First and second view of every pair, [B, P] each."""
    table_P2 = pairs(params.shape[1])
    return params[:, table_P2[:, 0]], params[:, table_P2[:, 1]]
