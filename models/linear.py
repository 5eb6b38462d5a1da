"""The linear layers of a module, and running them another way for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """Those of the module and of its parts."""
    return [part for part in module.modules() if type(part) is nn.Linear]


@contextmanager
def linear_forward(module: nn.Module, forward: Callable[[nn.Linear, Tensor], Tensor]) -> Iterator[None]:
    """Inside, every linear layer of the module runs `forward(layer, input)`."""
    layers = linear_layers(module)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(forward, layer)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for layer, outer in zip(layers, before, strict=True):
            if outer is None:
                del layer.forward
            else:
                layer.forward = outer
