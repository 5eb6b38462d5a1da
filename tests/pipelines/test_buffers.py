"""Memory comes back when the last view of a tensor is gone, never before."""

import gc

from pipelines.buffers import Buffers

SHAPE = (2, 3)


def test_memory_is_used_again_once_the_tensor_is_gone() -> None:
    buffers = Buffers()
    first, second = buffers.take(SHAPE), buffers.take(SHAPE)
    address = first.data_ptr()
    assert second.data_ptr() != address
    del first
    gc.collect()
    again = buffers.take((3, 2))
    assert again.shape == (3, 2)
    assert again.data_ptr() == address


def test_a_slice_keeps_the_memory() -> None:
    buffers = Buffers()
    tensor = buffers.take(SHAPE)
    part, address = tensor[1:], tensor.data_ptr()
    part.fill_(7)
    del tensor
    gc.collect()
    others = [buffers.take(SHAPE) for _ in range(3)]
    assert address not in {other.data_ptr() for other in others}
    for other in others:
        other.zero_()
    assert (part == 7).all()
