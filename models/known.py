"""Linear layers whose outputs are known already, from a forward without gradient.

Hard-view selection forwards all N views of an image, and training forwards the two chosen ones again. Where both are
the same function of the pixels, the second forward takes the outputs of its linear layers from the first, and computes
only what is cheap: norms, activations, attention weights. Its backward pass is the same as ever.

Shape suffixes: B images, N views, R = B·N images that were forwarded, one view after the other of each image; D width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.linear import linear_forward
from models.selection import take_pair


class _Known(Function):
    """y = x Wᵀ + b where y is given: backward of a linear layer without its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        ctx.save_for_backward(x.to(y.dtype), weight)  # under autocast the layer multiplied in y's number format
        ctx.x_dtype, ctx.biased = x.dtype, bias is not None
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        (slope,) = grad_outputs
        rows = slope.flatten(0, -2)
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            (slope @ weight.to(slope.dtype)).to(ctx.x_dtype) if to_x else None,
            (rows.T @ x.flatten(0, -2)).to(weight.dtype) if to_weight else None,
            rows.sum(0).to(weight.dtype) if ctx.biased and to_bias else None,
            None,
        )


class KnownOutputs:
    """What a module's linear layers gave for all views of a batch, in the order of the forward pass."""

    def __init__(self, images: int, views: int) -> None:
        self._shape = (images, views, -1)  # a Swin has several windows a view
        self.outputs: list[Tensor] = []

    @contextmanager
    def record(self, module: nn.Module) -> Iterator[None]:
        """Inside, a forward of R = B·N images keeps what the module's linear layers give."""

        def keeping(linear: nn.Linear, input: Tensor) -> Tensor:
            y = nn.functional.linear(input, linear.weight, linear.bias)
            self.outputs.append(y)
            return y

        with linear_forward(module, keeping):
            yield

    def take(self, choice_B: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        """The outputs of the first and of the second views of the chosen pairs, once: this empties itself layer by
        layer, so that what was not chosen does not stay in memory. None where nothing is left."""
        if not self.outputs:
            return None
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.outputs.reverse()
        while self.outputs:
            y = self.outputs.pop()
            pair = take_pair(y.unflatten(0, self._shape), choice_B)
            del y
            for part, outputs in zip(pair.unbind(1), chosen, strict=True):
                outputs.append(part.flatten(0, 1))
        return chosen


@contextmanager
def known_outputs(module: nn.Module, outputs: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the module's linear layers give these outputs in turn, with the gradients of computed ones."""
    following = iter(outputs)

    def knowing(linear: nn.Linear, input: Tensor) -> Tensor:
        return _Known.apply(input, linear.weight, linear.bias, next(following))  # pyright: ignore[reportReturnType]

    with linear_forward(module, knowing):
        yield
