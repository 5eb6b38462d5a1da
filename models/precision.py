"""Number format of the forwards that score views."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch

Precision = Literal["same", "auto", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def resolved(precision: Precision, device: torch.device) -> Precision:
    """`auto` resolved for a device: bf16 where the device has bf16 units, else same, which is as in training."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16_units(device) else "same"


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 itself, rather than by emulation, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu
    tiles = cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return tiles or cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


def arithmetic(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, forwards are in bf16 wherever autocast takes it, if the precision resolves to bf16."""
    if resolved(precision, device) == "same":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def in_bf16(device: torch.device) -> bool:
    """Whether the surrounding autocast computes in bf16."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
