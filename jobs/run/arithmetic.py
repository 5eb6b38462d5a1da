"""The arithmetic that a run computes in."""

from typing import Literal

import torch

from shards.errors import InputError

Arithmetic = Literal["fp32", "tf32", "bf16"]


def arithmetic_of(precision: Literal["auto", "fp32", "tf32", "bf16"], device: torch.device) -> Arithmetic:
    """What `precision` means on a device: auto is bf16 on CUDA, fp32 elsewhere.

    Raises:
        InputError: tf32 where the device does not multiply in it.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise InputError(f"precision: tf32 is for NVIDIA GPUs from compute capability 8.0 on, not {device}; take fp32")
    return precision


def use_arithmetic(arithmetic: Arithmetic) -> None:
    """Makes CUDA's fp32 products TF32 (10 bits of mantissa) where that is asked for, and whole otherwise; PyTorch's own
    default is TF32 in convolutions and fp32 in matrix products. bf16 comes by autocast; what it leaves in fp32, such as
    similarities under a temperature, is fp32 then."""
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
