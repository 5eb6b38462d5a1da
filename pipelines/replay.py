"""Views made again from logged parameters, by the code that made them in training.

Shape suffixes: B images, 2 (height, width).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import BatchPlan, Reader, Recipe, ViewBatch
from pipelines.params import FIELDS, ViewParams
from pipelines.stream import cores, open_producer
from shards.errors import InputError


def replay(
    reader: Reader,
    recipe: Recipe,
    sample_B: NDArray[np.int64],
    sizes_B2: NDArray[np.int32],
    params: ViewParams,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    colour: str = "fused",
    backend: str = "auto",
    compiled: bool = True,
) -> ViewBatch:
    """The views of logged rows, bit for bit those of training on the same backend, device and dtype.

    `compiled` is training's: whether a GPU's colour ran through torch.compile.

    Only ids, sizes and parameters enter; the batch's other facts (position, sources, epochs, labels) are left empty.

    Raises:
        InputError: a sample cannot be read any more, or decodes to another size.
    """
    zeros = np.zeros(len(sample_B), np.int32)
    rows = BatchPlan(recipe, 0, sample_B.copy(), zeros.astype(np.int16), zeros, zeros, sizes_B2.copy(), params, None)
    producer = open_producer(
        reader,
        recipe,
        backend=backend,
        batch=len(sample_B),
        device=torch.device(device),
        dtype=dtype,
        colour=colour,
        threads=cores(),
        compiled=compiled,
    )
    try:
        batch = producer.submit(lambda: rows).result()
    finally:
        producer.close()
    if batch.replaced:
        raise InputError(f"shards: they have changed since the log was written: {batch.replaced[0]}; restore them")
    return batch


def same_draws(
    recipe: Recipe,
    sample_B: NDArray[np.int64],
    epoch_B: NDArray[np.int32],
    sizes_B2: NDArray[np.int32],
    positions_B: NDArray[np.int64],
    logged: ViewParams,
) -> NDArray[np.bool_]:
    """[B]: whether the recipe draws exactly the logged parameters."""
    drawn, _ = recipe.draw(sample_B, epoch_B, sizes_B2, positions_B)
    return np.all([(getattr(drawn, name) == getattr(logged, name)).all(1) for name in FIELDS], axis=0)
