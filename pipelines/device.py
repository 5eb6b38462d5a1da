"""Batches made on a device: one DALI graph decodes, slices and resizes, torch colours what it leaves there.

A few batches are in the making at once, each in a thread with a graph of its own: while one is read, another is
decoded and a third is coloured, and neither disk nor cores nor GPU wait for each other or for the training step. What
torch does runs on one stream beside the training's. The same code runs on the CPU, on DALI's CPU operators.

Shape suffixes: B images of a batch, n views of a group, V views in a row, S side of a view in pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import STAGES, BatchPlan, Reader, Recipe, ViewBatch, colour_step, finish, wait_for
from pipelines.clock import Clock
from pipelines.colour_device import fused_on_device
from pipelines.decode import BrokenImagesError, DaliViews
from pipelines.replace import Replacer, read_rows, undecodable

_LANES = 3  # batches in the making: one is read, one decoded, one coloured


class DeviceProducer:
    """Makes batches of at most `batch` rows, of `dtype`, on `device`; `threads` are the graphs' on the CPU.

    `compiled`: colour runs through torch.compile where the device is a GPU.
    """

    def __init__(
        self,
        reader: Reader,
        recipe: Recipe,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        colour: str,
        threads: int,
        compiled: bool,
    ) -> None:
        self.clock = Clock(STAGES)
        self._reader, self._recipe = reader, recipe
        self._device, self._dtype = device, dtype
        self._colour = colour_step(colour, partial(fused_on_device, compiled=compiled and device.type == "cuda"))
        self._colouring = threading.Lock()  # torch compiles in one thread at a time
        # Selection at the trained size shares the crops.
        self._cropped = list({output.key: output for output in recipe.outputs}.values())
        groups = [(output.count, output.size) for output in self._cropped]
        each = max(1, threads // _LANES)
        self._open_graph = partial(DaliViews, batch, groups, device, each, recipe.policy.interpolation)
        self._local = threading.local()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(_LANES, thread_name_prefix="hardviews-views")

    def submit(self, plan: Callable[[], BatchPlan]) -> Future[ViewBatch]:
        """Promises the batch of the rows (at most `batch`) that `plan` draws; it runs in a thread of ours."""
        return self._pool.submit(self._make, plan)

    def close(self) -> None:
        """Drops what has not begun, waits for what has, and ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, plan: Callable[[], BatchPlan]) -> tuple[BatchPlan, Replacer, dict[int, NDArray[np.uint8]]]:
        """The plan and the bytes of its rows; what cannot be read is replaced."""
        with self.clock("draw"):
            rows = plan()
        replacer = Replacer(self._reader, rows)
        data: dict[int, NDArray[np.uint8]] = {}
        self._fetch(rows, replacer, data, list(range(len(rows))))
        return rows, replacer, data

    def _fetch(self, rows: BatchPlan, replacer: Replacer, data: dict[int, NDArray[np.uint8]], todo: list[int]) -> None:
        """Reads the rows to do into `data`, replacing samples until all can be read."""
        with self.clock("read"):
            while todo:
                contents, broken = read_rows(self._reader, rows, todo)
                data.update(contents)
                todo = replacer.replace(broken)

    def _make(self, plan: Callable[[], BatchPlan]) -> ViewBatch:
        rows, replacer, data = self._read(plan)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            crops = self._crops(rows, replacer, data)
            with self._colouring, self.clock("colour"):
                tensors = self._coloured(rows, dict(zip((o.key for o in self._cropped), crops, strict=True)))
            if self._stream:
                with self.clock("colour"):
                    wait_for(self._stream)
        rows.replaced = replacer.errors
        return finish(rows, tensors)

    def _crops(self, rows: BatchPlan, replacer: Replacer, data: dict[int, NDArray[np.uint8]]) -> list[Tensor]:
        """uint8 [B, n, S, S, 3] of every group; samples that cannot be decoded are replaced on the way."""
        while True:
            params = [output.params(rows.params, None) for output in self._cropped]
            try:
                with self.clock("decode"):
                    return self._my_graph().crops([data[row] for row in range(len(rows))], params)
            except BrokenImagesError as error:
                reasons = error.reasons
            broken = {row: undecodable(self._reader, rows, row, reason) for row, reason in reasons.items()}
            self._fetch(rows, replacer, data, replacer.replace(broken))

    def _coloured(self, rows: BatchPlan, crops: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        """[B, n, 3, S, S] of every output, normalised."""
        tensors = []
        for output in self._recipe.outputs:
            crops_BnSS3 = crops[output.key]
            shape = (len(rows), output.count, 3, output.size, output.size)
            tensors.append(torch.empty(shape, dtype=self._dtype, device=self._device))
            params = output.params(rows.params, rows.static)
            self._colour(crops_BnSS3.flatten(0, 1), params, tensors[-1].flatten(0, 1))
        return tensors

    def _my_graph(self) -> DaliViews:
        """This thread's graph, built when it is first needed."""
        if not hasattr(self._local, "graph"):
            self._local.graph = self._open_graph()
        return self._local.graph
