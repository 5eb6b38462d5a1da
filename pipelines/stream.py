"""The endless stream of view batches, from any position.

Everything about a batch follows from its position: which samples, which views, which substitutes. So the stream has no
state but one integer, and gives the same batches for any number of threads, any prefetch and after any resume; with
another batch size or world size the same rows come in other portions.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from pipelines.batch import Order, Reader, Recipe, ScoringViews, ViewBatch, plan_batch
from pipelines.decode import HAS_DALI
from pipelines.device import DeviceProducer
from pipelines.host import HostProducer
from pipelines.policies import Policy
from pipelines.replace import SampleError
from shards.errors import InputError

BACKENDS = ("auto", "host", "device")
# Below this many broken samples no share is judged: one bad image in the first batch is no bad data set.
FEW = 16


class ViewStream:
    """Iterates over this rank's batches for ever; use it as a context manager, or call `close()`.

    Args:
        reader: gives bytes and facts of samples.
        order: gives the samples at each position.
        policy: the views.
        seed: of the views' parameters.
        batch: images of this rank in a batch.
        rank, world: this process's part: rank r's batch at the global position p is p + r·batch … p + (r + 1)·batch.
        position: global index of the first sample of the first global batch.
        device: where the batches go.
        dtype: of the crops.
        colour: "fused" or "exact" (Kornia, op by op).
        backend: "host" decodes and crops on the CPU, "device" in DALI's graph on the device, "auto" on the device if
            that is a GPU and DALI is installed.
        threads: of the CPU; 0 for all cores that this process may use.
        prefetch: batches that are made ahead. Memory is bounded by prefetch + 1 batches.
        compiled: whether colour on a GPU runs through torch.compile, which pays off within some hundred batches.
        selection: how selection's crops differ, if they do.
        quarantine: called, in order and in the consumer's thread, with what was wrong with each replaced sample.
        max_failure_share: of all samples so far, from 0 to 1, that may be broken.

    Raises:
        InputError: for a bad argument, and while iterating when too many samples are broken.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        policy: Policy,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        colour: str = "fused",
        backend: str = "auto",
        threads: int = 0,
        prefetch: int = 2,
        compiled: bool = True,
        selection: ScoringViews = ScoringViews(),  # noqa: B008 (frozen)
        quarantine: Callable[[SampleError], None] | None = None,
        max_failure_share: float = 0.05,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch: {batch} images a process; give at least 1")
        if prefetch < 0 or threads < 0:
            raise InputError(f"prefetch, threads: {prefetch}, {threads}; neither can be negative")
        self.position = position
        self._step, self._offset = batch * world, batch * rank
        self._batch, self._prefetch = batch, prefetch
        self._quarantine, self._max_failure_share = quarantine, max_failure_share
        self._seen = self._failed = 0
        self._waited = 0.0
        recipe = Recipe(policy, seed, selection)
        self._plan = partial(plan_batch, order, reader, recipe, count=batch)
        self._producer = open_producer(
            reader,
            recipe,
            backend=backend,
            batch=batch,
            device=torch.device(device),
            dtype=dtype,
            colour=colour,
            threads=threads or cores(),
            compiled=compiled,
        )
        self._pending: deque[Future[ViewBatch]] = deque()
        self._submitted = position

    def __iter__(self) -> Iterator[ViewBatch]:
        return self

    def __next__(self) -> ViewBatch:
        """The batch at `position`, which then moves on by batch × world."""
        while len(self._pending) <= self._prefetch:
            self._pending.append(self._producer.submit(partial(self._plan, self._submitted + self._offset)))
            self._submitted += self._step
        start = time.perf_counter()
        batch = self._pending.popleft().result()
        self._waited += time.perf_counter() - start
        self.position += self._step
        self._judge(batch)
        for tensor in (*batch.crops, *(batch.selection_crops or ())):
            _hand_over(tensor)
        return batch

    def profile(self) -> dict[str, float]:
        """Seconds so far: `wait`, what the consumer waited, and per stage what all threads together spent; `images`."""
        return {"images": self._seen, "wait": self._waited, **self._producer.clock.seconds()}

    def close(self) -> None:
        """Ends all threads and lets go of the batches made ahead; may be called twice."""
        self._producer.close()
        self._pending.clear()

    def __enter__(self) -> ViewStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge(self, batch: ViewBatch) -> None:
        """Reports replaced samples and gives up on a data set with too many of them."""
        self._seen += len(batch)
        for error in batch.replaced:
            self._failed += 1
            if self._quarantine:
                self._quarantine(error)
        if self._failed > max(FEW, self._max_failure_share * self._seen):
            raise InputError(
                f"data: {self._failed} of the first {self._seen} samples cannot be used, more than "
                f"{self._max_failure_share:.1%}; the last: {batch.replaced[-1]}; run `hardviews verify` on the shards"
            )


def open_producer(
    reader: Reader,
    recipe: Recipe,
    *,
    backend: str,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    colour: str,
    threads: int,
    compiled: bool,
) -> HostProducer | DeviceProducer:
    """The producer for a backend; `auto` takes the device's own graph where that is a GPU and DALI is installed.

    Raises:
        InputError: for an unknown backend or colour.
    """
    if backend not in BACKENDS:
        raise InputError(f"views.backend: {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    on_device = backend == "device" or (backend == "auto" and device.type == "cuda" and HAS_DALI)
    if on_device:
        return DeviceProducer(
            reader,
            recipe,
            batch=batch,
            device=device,
            dtype=dtype,
            colour=colour,
            threads=threads,
            compiled=compiled,
        )
    return HostProducer(reader, recipe, batch=batch, device=device, dtype=dtype, colour=colour, threads=threads)


def cores() -> int:
    """CPU cores for this process: its share of those it may use, where torchrun has started several on this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _hand_over(tensor: Tensor) -> None:
    """Tells torch's allocator that the consumer's stream uses memory of the producer's stream."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
