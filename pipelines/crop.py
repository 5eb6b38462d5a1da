"""Crop, resize and mirror on the CPU: torch's antialiased bilinear resize of uint8, channels last.

Shape suffixes: N views of an image, S side of a view in pixels, H and W of the image, 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import torch
from torch import Tensor
from torch._C._nn import _upsample_bilinear2d_aa

from pipelines.params import ViewParams

# The operator behind F.interpolate(mode="bilinear", antialias=True): called by name it writes into memory of ours,
# which saves an allocation and a copy per view and doubles the speed. (By torch.ops it takes 10 µs more to call.)
_resize: Callable[..., Tensor] = _upsample_bilinear2d_aa  # torch's stub leaves `out` out


def crop_views(image_HW3: Tensor, params: ViewParams, out_NSS3: Tensor) -> None:
    """Writes the N views of one image (params of shape [N]) into `out_NSS3`, uint8 and contiguous.

    Safe to call from many threads at once; the work is done without the interpreter lock.
    """
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
        _resize(patch_13hw, size, False, out=mirror_13SS if flip else views_N13SS[view])
        if flip:
            cv2.flip(mirror_SS3, 1, views_NSS3[view])
