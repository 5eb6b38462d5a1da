"""Tensors that say they are on a CUDA device, on a machine without one: devices, dtypes and waits show, values do not.

PyTorch has no public way to them. Every inner name of it that the tests reach into is in this file; where one is gone
or does something else, the tests that need it are skipped and say so. There is no backward pass: autograd's engine asks
the driver for streams.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend `fake`
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError as error:
    pytest.skip(f"not supported by this PyTorch: {error}", allow_module_level=True)

GPU = torch.device("cuda", 0)
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class NoWaits(TorchDispatchMode):
    """Inside, what makes the host wait for a CUDA device is an error: blocking copies either way, a value that the host
    asks for, a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name
        if name in INDEXING:
            index = [i for i in args[1] if i is not None]
            waits = args[0].is_cuda and any(i.dtype in (torch.bool, torch.uint8) or not i.is_cuda for i in index)
        else:
            asks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
            waits = asks and any(isinstance(a, Tensor) and a.is_cuda for a in args)
        if waits:
            raise AssertionError(f"the host waits for the device: {name}")
        out = func(*args, **kwargs)
        if name in COPIES and not (kwargs.get("non_blocking") or args[2:]):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.is_cuda != out.is_cuda:
                raise AssertionError(f"the host waits for a copy: {name} from {source.device} to {out.device}")
        return out


def as_fake(value: Tensor) -> Tensor:
    """One on the device, with the shape and layout of `value`; a parameter stays one."""
    fake = torch.empty_like(value, device=GPU)
    return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake


def move(module: nn.Module) -> None:
    """Puts a module's parameters and buffers on the device; what is shared stays shared."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({n: made.setdefault(id(t), as_fake(t)) for n, t in held.items() if t is not None})
        for tap in vars(part).values():  # iBOT's hooks hold the mask token
            if isinstance(token := getattr(tap, "token_D", None), Tensor):
                tap.token_D = made.setdefault(id(token), as_fake(token))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, ranks: int = 1) -> Iterator[None]:
    """Inside, tensors are made without values, autocast takes CUDA for available, and `ranks` others answer at once."""
    with monkeypatch.context() as patched:
        try:
            # Without the first two, autocast switches itself off.
            patched.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patched.setattr(torch.cuda, "is_bf16_supported", lambda *how, **named: True)
            patched.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
            mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
            with mode, torch.autocast("cuda", torch.bfloat16):
                product = torch.ones(2, 2, device=GPU) @ torch.ones(2, 2, device=GPU)
        except (AttributeError, TypeError, RuntimeError) as error:
            pytest.skip(f"not supported by this PyTorch: {error}")
        if product.dtype != torch.bfloat16 or not product.is_cuda:
            pytest.skip(
                f"not supported by this PyTorch: a product in bf16 on CUDA is {product.dtype}, {product.device}"
            )
        if ranks > 1:
            torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            with mode:
                yield
        finally:
            if ranks > 1:
                torch.distributed.destroy_process_group()
