"""The parameters of every view, as arrays, and what follows from them for pairs of views.

Shape suffixes: B images, N views, P = N(N−1)/2 pairs of views in lexicographic order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# ColorJitter's four operations; `ViewParams.order` is an index into the permutations of them.
JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(len(JITTER_OPS))))


class Parameter(NamedTuple):
    """A parameter of views."""

    dtype: type[np.generic]
    meaning: str
    unit: str = ""


PARAMETERS: dict[str, Parameter] = {
    "top": Parameter(np.int32, "crop box's first row", "source pixels"),
    "left": Parameter(np.int32, "crop box's first column", "source pixels"),
    "height": Parameter(np.int32, "crop box's height", "source pixels"),
    "width": Parameter(np.int32, "crop box's width", "source pixels"),
    "flip": Parameter(np.bool_, "mirrored left to right after the crop"),
    "jitter": Parameter(np.bool_, "colour jitter applied; where not, the next five are 1, 1, 1, 0 and 0"),
    "brightness": Parameter(np.float32, "factor, as torchvision's"),
    "contrast": Parameter(np.float32, "factor, as torchvision's"),
    "saturation": Parameter(np.float32, "factor, as torchvision's"),
    "hue": Parameter(np.float32, "shift, −0.5 to 0.5", "turns of the colour circle"),
    "order": Parameter(np.uint8, "index into the 24 orders of (brightness, contrast, saturation, hue)"),
    "gray": Parameter(np.bool_, "turned to grayscale"),
    "blur": Parameter(np.float32, "Gaussian blur's sigma, 0 for none", "pixels of the view"),
    "solarize": Parameter(np.bool_, "values of 128 and more (of 255) inverted"),
}
"""Every parameter by its name, in the order in which it acts; the log's columns of views follow from it."""
FIELDS = tuple(PARAMETERS)


@dataclass(frozen=True)
class ViewParams:
    """What is done to each view; every array has shape [B, N]. `PARAMETERS` says what they mean."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    order: NDArray[np.uint8]
    gray: NDArray[np.bool_]
    blur: NDArray[np.float32]
    solarize: NDArray[np.bool_]

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
        values: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name, (dtype, *_) in PARAMETERS.items()}
        values |= {name: np.ones(shape, np.float32) for name in ("brightness", "contrast", "saturation")}
        boxes = {"top": top, "left": left, "height": height, "width": width}
        values |= {name: np.asarray(box, np.int32) for name, box in boxes.items()}
        return ViewParams(**values)


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


def _pair_ends(params: ViewParams) -> tuple[ViewParams, ViewParams]:
    """First and second view of every pair, [B, P] each."""
    table_P2 = pairs(params.shape[1])
    return params[:, table_P2[:, 0]], params[:, table_P2[:, 1]]
