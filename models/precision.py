"""Number formats of forwards without gradient: bf16 by autocast; int8 and fp8 in a backbone's linear layers.

int8 and fp8 scale each row of the weights by its own largest value, and on a GPU each row of the input too; on a CPU,
where passes over memory cost as much as the products, all of a forward's input by its range. All is measured anew in
every forward, because the weights move with every step (dynamic quantisation).

Shape suffixes: R rows of an input, D its width, E outputs.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.linear import linear_forward, linear_layers

Precision = Literal["same", "auto", "bf16", "int8", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def resolved(precision: Precision, device: torch.device) -> Precision:
    """`auto` made definite: bf16 where the device multiplies in it, else as in training."""
    if precision != "auto":
        return precision
    return "bf16" if has_units(device, "bf16") else "same"


def has_units(device: torch.device, precision: str) -> bool:
    """Whether the device multiplies in a number format itself, rather than by emulation, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= {"bf16": (8, 0), "int8": (7, 5), "fp8": (9, 0)}[precision]
    cpu = torch.cpu
    tiles = cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    if precision == "bf16":
        return tiles or cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    onednn = torch.backends.mkldnn.is_available()
    return precision == "int8" and onednn and cpu._is_avx2_supported()  # pyright: ignore[reportPrivateUsage]


def check_format(field: str, precision: Precision, device: torch.device, backbone: nn.Module) -> None:
    """
    Raises:
        ValueError: the field asks for int8 or fp8, and the device has no units for it or the backbone no linear layers.
    """
    if precision not in ("int8", "fp8"):
        return
    remedy = f"take auto, which is {resolved('auto', device)} here"
    if not has_units(device, precision):
        raise ValueError(f"{field}: this {device.type} device does not multiply in {precision}; {remedy}")
    if not linear_layers(backbone):
        raise ValueError(f"{field}: {precision} is for linear layers, and this backbone has none; {remedy}")


@contextmanager
def arithmetic(precision: Precision, device: torch.device, *backbones: nn.Module) -> Iterator[None]:
    """Inside, forwards are in this number format: bf16 wherever autocast takes it, int8 and fp8 in the linear layers of
    these backbones alone. Without gradient."""
    with ExitStack() as stack:
        precision = resolved(precision, device)
        if precision == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        elif precision != "same":
            forward = int8_linear if precision == "int8" else fp8_linear
            for backbone in backbones:
                stack.enter_context(linear_forward(backbone, forward))
        yield


def int8_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """x Wᵀ + b by whole numbers of 8 bits."""
    weight_ED, weight_scale_E1 = _scaled(linear.weight, 127)
    whole_ED = weight_ED.round_().to(torch.int8)
    if x.device.type == "cpu":
        return _int8_on_cpu(linear, x, whole_ED, weight_scale_E1)  # pyright: ignore[reportCallIssue]
    return _int8_on_gpu(linear, x, whole_ED, weight_scale_E1)


def _int8_on_gpu(linear: nn.Linear, x: Tensor, weight_ED: Tensor, weight_scale_E1: Tensor) -> Tensor:
    rows_RD, rows_scale_R1 = _scaled(x.flatten(0, -2), 127)
    products_RE = torch._int_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows_RD.round_().to(torch.int8), weight_ED.T
    )
    return _finished(linear, x, products_RE.float() * rows_scale_R1 * weight_scale_E1.T)


@torch.compiler.disable  # weights are packed and a range is read in every call, which no compiled code holds
def _int8_on_cpu(linear: nn.Linear, x: Tensor, weight_ED: Tensor, weight_scale_E1: Tensor) -> Tensor:
    # AVX2 adds products in pairs to 16 bits, which hold 2 · 128 · 127 but not 2 · 255 · 127. With zero rounded, the
    # largest value may come out one higher than here.
    largest = 254 if torch.cpu._is_vnni_supported() else 127  # pyright: ignore[reportPrivateUsage]
    rows_RD = x.flatten(0, -2).float()
    low, high = (float(end) for end in rows_RD.aminmax())
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / largest, 1e-12)
    if not math.isfinite(scale):
        return x.new_full((*x.shape[:-1], linear.out_features), math.nan)
    zero = round(-low / scale)
    # Rounded to the nearest by cutting off, which takes fewer passes over memory.
    whole_RD = torch.add(torch.tensor(zero + 0.5), rows_RD, alpha=1 / scale).to(torch.uint8)
    products_RE = torch.ops.onednn.qlinear_pointwise(
        whole_RD,
        scale,
        zero,
        torch.ops.onednn.qlinear_prepack(weight_ED, None),
        weight_scale_E1.flatten(),
        torch.zeros(linear.out_features, dtype=torch.int32),
        linear.bias,
        1.0,  # scale and zero of the output, which is not quantised
        0,
        torch.float32,
        "none",  # nothing after it
        [],
        "",
    )
    return products_RE.to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """x Wᵀ + b by floats of 4 bits of exponent and 3 of mantissa, which reach up to 448."""
    rows_RD, rows_scale_R1 = _scaled(x.flatten(0, -2), 448)
    weight_ED, weight_scale_E1 = _scaled(linear.weight, 448)
    products_RE = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows_RD.to(torch.float8_e4m3fn),
        weight_ED.to(torch.float8_e4m3fn).T,
        scale_a=rows_scale_R1,
        scale_b=weight_scale_E1.T.contiguous(),
        out_dtype=torch.bfloat16,
    )
    return _finished(linear, x, products_RE)


def _scaled(rows: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Rows divided so that each one's largest value is `largest`, and the divisors [·, 1]."""
    rows = rows.float()
    scale = (rows.abs().amax(1, keepdim=True) / largest).clamp_min(1e-12)
    return rows / scale, scale


def _finished(linear: nn.Linear, x: Tensor, products_RE: Tensor) -> Tensor:
    if linear.bias is not None:
        products_RE = products_RE + linear.bias
    return products_RE.to(x.dtype).unflatten(0, x.shape[:-1])
