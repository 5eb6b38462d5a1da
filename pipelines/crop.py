"""Crop, resize and mirror on the CPU: torch's antialiased resize of uint8, or, where it is bilinear, a compiled kernel
with its bits.

Shape suffixes: N views of an image, S side of a view in pixels, H and W of the image, 3 channels.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache

import cv2
import numpy as np
import torch
from torch import Tensor
from torch._C._nn import _upsample_bicubic2d_aa, _upsample_bilinear2d_aa

from pipelines.params import ViewParams
from pipelines.policies import Interpolation

# The operators behind F.interpolate(antialias=True): called by name they write into memory of ours, which saves an
# allocation and a copy per view and doubles the speed. (By torch.ops they take 10 µs more to call.)
_RESIZE: dict[Interpolation, Callable[..., Tensor]] = {  # torch's stubs leave `out` out
    "bilinear": _upsample_bilinear2d_aa,
    "bicubic": _upsample_bicubic2d_aa,
}

VERSION = 1  # of crop.c
NO_MEMORY, OUTSIDE = 1, 2  # what its crop_views returns where it does not succeed
LARGEST = 2**20  # height and width, pixels, of images that it is given; its int32 sums are safe far beyond
Crop = Callable[[Tensor, ViewParams, Tensor], None]


def crop_views(
    image_HW3: Tensor, params: ViewParams, out_NSS3: Tensor, interpolation: Interpolation = "bilinear"
) -> None:
    """Writes the N views of one image (params of shape [N]) into `out_NSS3`, uint8 and contiguous.

    By the compiled kernel where it can, else by torch's operator; the bits are the same, so nothing depends on which.
    Safe to call from many threads at once; the work is done without the interpreter lock.

    Raises:
        ValueError: the kernel was given a box that is not within the image.
        MemoryError: the kernel finds no memory to work in, some 25 kB for views of 224 pixels of ordinary images.
    """
    kernel = find_kernel()
    if isinstance(kernel, str) or interpolation != "bilinear" or not _suits(image_HW3, params, out_NSS3):
        crop_by_torch(image_HW3, params, out_NSS3, interpolation)
    else:
        kernel(image_HW3, params, out_NSS3)


def crop_by_torch(
    image_HW3: Tensor, params: ViewParams, out_NSS3: Tensor, interpolation: Interpolation = "bilinear"
) -> None:
    """`crop_views` by torch's operator."""
    resize = _RESIZE[interpolation]
    # A tensor that only describes memory costs microseconds, and ten of them a tenth of the time: hence one as_strided
    # a view where slices would do.
    size = [out_NSS3.shape[1]] * 2
    row, column, channel = image_HW3.stride()
    start = image_HW3.storage_offset()
    views_N13SS, views_NSS3 = out_NSS3.permute(0, 3, 1, 2).split(1), out_NSS3.numpy()
    mirror_1SS3 = torch.empty(1, *size, 3, dtype=torch.uint8)
    mirror_13SS, mirror_SS3 = mirror_1SS3.permute(0, 3, 1, 2), mirror_1SS3.numpy()[0]
    fields = (params.top, params.left, params.height, params.width, params.flip)
    boxes = zip(*(field.tolist() for field in fields), strict=True)
    for view, (top, left, height, width, flip) in enumerate(boxes):
        shape, strides = (1, 3, height, width), (0, channel, row, column)
        patch_13hw = image_HW3.as_strided(shape, strides, start + top * row + left * column)
        resize(patch_13hw, size, False, out=mirror_13SS if flip else views_N13SS[view])
        if flip:
            cv2.flip(mirror_SS3, 1, views_NSS3[view])


@cache
def find_kernel() -> Crop | str:
    """`crop_views` by the compiled kernel, for tensors that suit it; or why there is none."""
    spec = importlib.util.find_spec("pipelines._crop")  # never imported: it is a plain library with a module's name
    if spec is None or spec.origin is None:
        return "not compiled"
    try:
        library = ctypes.CDLL(spec.origin)
        version = library.crop_version()
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"
    if version != VERSION:
        return f"compiled from version {version} of its source, not {VERSION}"
    if not library.crop_supported():
        return "this processor has no AVX2"
    crop = library.crop_views
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    crop.argtypes = (pointer, ctypes.c_size_t, integer, integer, integer, pointer, integer, pointer)

    def by_kernel(image_HW3: Tensor, params: ViewParams, out_NSS3: Tensor) -> None:
        boxes_5N = np.array((params.top, params.left, params.height, params.width, params.flip), np.int32)
        height, width, _ = image_HW3.shape
        views, side = out_NSS3.shape[:2]
        image, boxes, out = image_HW3.data_ptr(), boxes_5N.ctypes.data, out_NSS3.data_ptr()
        failure = crop(image, image_HW3.stride(0), height, width, views, boxes, side, out)
        if failure == OUTSIDE:
            raise ValueError(f"boxes: {boxes_5N[:4].T.tolist()} (top, left, height, width) not in {height}×{width}")
        if failure == NO_MEMORY:
            raise MemoryError(f"no memory to crop {views} views of {side}×{side} pixels in")

    return by_kernel


def _suits(image_HW3: Tensor, params: ViewParams, out_NSS3: Tensor) -> bool:
    """Whether the kernel can read the image and write the views: it is given addresses alone."""
    views, side, *_ = out_NSS3.shape
    return (
        image_HW3.dtype == out_NSS3.dtype == torch.uint8
        and image_HW3.is_cpu
        and out_NSS3.is_cpu
        and image_HW3.dim() == 3
        and image_HW3.shape[2] == 3
        and image_HW3.stride()[1:] == (3, 1)
        and out_NSS3.shape == (views, side, side, 3)
        and out_NSS3.is_contiguous()
        and params.shape == (views,)
        and side > 0
        and max(image_HW3.shape) <= LARGEST
    )
