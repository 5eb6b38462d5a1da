"""Batches made on the host's cores.

A batch is cut into small chunks, and each thread takes a chunk all the way: read, decode, crop, colour, straight into
the batch's memory. No image waits for the slowest of a stage, and pixels are still in cache when they are coloured.

Shape suffixes: B images of a batch, n views of a group, V rows × n views in a row, S side of a view in pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import STAGES, BatchPlan, Output, Reader, Recipe, ViewBatch, colour_step, finish, wait_for
from pipelines.buffers import Buffers
from pipelines.clock import Clock
from pipelines.colour_host import fused
from pipelines.crop import crop_views
from pipelines.decode import Decoder, open_decoder
from pipelines.params import ViewParams
from pipelines.replace import Replacer, SampleError, read_rows, size_mismatch, undecodable

CHUNK = 16  # images a task: some 20 ms of work, and few enough to stay near the cores
# Threads beside one for each core: they work while others wait for the interpreter lock or for DALI, which left 15 % of
# two cores idle.
SPARE = 1


class HostProducer:
    """Makes batches of at most `batch` rows on `threads` cores and copies them to `device` as `dtype`."""

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
        decoder: str = "auto",
    ) -> None:
        self.clock = Clock(STAGES)
        self._reader, self._recipe = reader, recipe
        self._device, self._dtype = device, dtype
        self._colour = colour_step(colour, fused)
        self._chunk = max(1, min(CHUNK, -(-batch // threads)))
        self._decoder = decoder
        self._buffers = Buffers(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads + SPARE, thread_name_prefix="hardviews-views")

    def submit(self, plan: Callable[[], BatchPlan]) -> Future[ViewBatch]:
        """Promises the batch of the rows (at most `batch`) that `plan` draws; it runs in a thread of ours."""
        promise: Future[ViewBatch] = Future()
        self._run(promise, lambda: self._begin(promise, plan))
        return promise

    def close(self) -> None:
        """Drops what has not begun, waits for what has, and ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, promise: Future[ViewBatch], step: Callable[[], object]) -> None:
        """Queues a step towards a promise. The first step that fails breaks the promise; later ones are left out."""

        def guarded() -> None:
            try:
                if not promise.done():
                    step()
            except BaseException as error:
                if not promise.done():
                    promise.set_exception(error)

        self._pool.submit(guarded)

    def _begin(self, promise: Future[ViewBatch], plan: Callable[[], BatchPlan]) -> None:
        """Draws a batch and queues its chunks; the last chunk to finish keeps the promise."""
        with self.clock("draw"):
            rows = plan()
        shapes = [(len(rows), output.count, 3, output.size, output.size) for output in self._recipe.outputs]
        tensors = [self._buffers.take(shape) for shape in shapes]
        starts = range(0, len(rows), self._chunk)
        errors: dict[int, list[SampleError]] = {}
        lock = threading.Lock()

        def work(start: int) -> None:
            broken = self._fill(rows, list(range(start, min(start + self._chunk, len(rows)))), tensors)
            with lock:
                errors[start] = broken
                last = len(errors) == len(starts)
            if last:
                rows.replaced = [error for start in starts for error in errors[start]]
                promise.set_result(finish(rows, self._send(tensors)))

        for start in starts:
            self._run(promise, lambda start=start: work(start))

    def _fill(self, rows: BatchPlan, todo: list[int], tensors: Sequence[Tensor]) -> list[SampleError]:
        """Makes all views of some rows; returns what was wrong with the samples that had to be replaced."""
        replacer = Replacer(self._reader, rows)
        while todo:
            images, broken = self._decode(rows, todo)
            if images:
                self._views(rows, images, tensors)
            todo = replacer.replace(broken)
        return replacer.errors

    def _decode(self, rows: BatchPlan, todo: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, SampleError]]:
        """Images of the rows that have one, valid until this thread decodes again, and the others' errors."""
        with self.clock("read"):
            data, broken = read_rows(self._reader, rows, todo)
        images: dict[int, Tensor] = {}
        with self.clock("decode"):
            for row, image in zip(data, self._my_decoder().decode(list(data.values())), strict=True):
                reason = image if isinstance(image, str) else size_mismatch(image, rows.sizes_B2[row])
                if isinstance(image, Tensor) and reason is None:
                    images[row] = image
                else:
                    broken[row] = undecodable(self._reader, rows, row, str(reason))
        return images, broken

    def _views(self, rows: BatchPlan, images: dict[int, Tensor], tensors: Sequence[Tensor]) -> None:
        """Crops and colours images into their rows of the batch."""
        index_R = np.array(list(images))
        own, static = rows.params[index_R], rows.static[index_R] if rows.static else None
        crops: dict[tuple[int, int], Tensor] = {}
        for output, tensor in zip(self._recipe.outputs, tensors, strict=True):
            params = output.params(own, static)
            if output.key not in crops:  # selection at the trained size shares the crops
                with self.clock("crop"):
                    crops[output.key] = _crop(list(images.values()), params, output)
            with self.clock("colour"):
                self._colour_rows(crops[output.key], params, tensor, index_R)

    def _colour_rows(self, crops_RnSS3: Tensor, params: ViewParams, tensor: Tensor, index_R: np.ndarray) -> None:
        """Colours straight into the batch where the rows are neighbours, which they are unless a sample is broken."""
        first, last = int(index_R[0]), int(index_R[-1])
        neighbours = last - first + 1 == len(index_R)
        target = tensor[first : last + 1] if neighbours else torch.empty(len(index_R), *tensor.shape[1:])
        self._colour(crops_RnSS3.flatten(0, 1).numpy(), params, target.flatten(0, 1))
        if not neighbours:
            tensor[torch.from_numpy(index_R)] = target

    def _send(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The batch on the device, in its dtype; on a GPU the copies run beside the training step."""
        with self.clock("copy"), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            sent = [tensor.to(self._device, non_blocking=True).to(self._dtype) for tensor in tensors]
            if self._stream:
                wait_for(self._stream)
            return sent

    def _my_decoder(self) -> Decoder:
        """This thread's decoder: one thread each scales better than one decoder with many."""
        if not hasattr(self._local, "decoder"):
            self._local.decoder = open_decoder(self._chunk, threads=1, backend=self._decoder)
        return self._local.decoder


def _crop(images: Sequence[Tensor], params: ViewParams, output: Output) -> Tensor:
    """uint8 [R, n, S, S, 3]: all views of R images."""
    crops_RnSS3 = torch.empty(len(images), output.count, output.size, output.size, 3, dtype=torch.uint8)
    for row, image in enumerate(images):
        crop_views(image, params[row], crops_RnSS3[row], output.interpolation)
    return crops_RnSS3
