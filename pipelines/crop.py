"""Crop, resize and mirror on the CPU: torch's antialiased bilinear resize of uint8, channels last.

Shape suffixes: N views of an image, S side of a view in pixels, H and W of the image, 3 channels.
"""

from __future__ import annotations

import cv2
import torch
from torch import Tensor

from pipelines.params import ViewParams

# The operator behind F.interpolate(mode="bilinear", antialias=True): called by name it writes into memory of ours,
# which saves an allocation and a copy per view and doubles the speed.
_resize = torch.ops.aten._upsample_bilinear2d_aa.out


def crop_views(image_HW3: Tensor, params: ViewParams, out_NSS3: Tensor) -> None:
    """Writes the N views of one image (params of shape [N]) into `out_NSS3`, uint8 and contiguous.

    Safe to call from many threads at once; the work is done without the interpreter lock.
    """
    size = out_NSS3.shape[1]
    image_13HW = image_HW3.permute(2, 0, 1)[None]
    mirror_SS3 = torch.empty_like(out_NSS3[0]) if params.flip.any() else None
    boxes = zip(params.top.tolist(), params.left.tolist(), params.height.tolist(), params.width.tolist(), strict=True)
    for view, (top, left, height, width) in enumerate(boxes):
        patch_13hw = image_13HW[..., top : top + height, left : left + width]
        out_SS3 = out_NSS3[view]
        if mirror_SS3 is not None and params.flip[view]:
            _resize(patch_13hw, [size, size], False, None, None, out=mirror_SS3.permute(2, 0, 1)[None])
            cv2.flip(mirror_SS3.numpy(), 1, dst=out_SS3.numpy())
        else:
            _resize(patch_13hw, [size, size], False, None, None, out=out_SS3.permute(2, 0, 1)[None])
