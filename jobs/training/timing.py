"""Where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Seconds per phase, averaged over the steps since the last report.

    On CUDA a phase is timed by events on the stream, read once per report, so that timing adds no synchronisation to
    the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str, host: bool = False) -> Iterator[None]:
        """Times one phase; `host` marks work of the CPU (waiting for data, writing the log) on every device."""
        if self._cuda and not host:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def step(self) -> None:
        """Marks the end of a step."""
        self._steps += 1

    def report(self, images: int) -> dict[str, float]:
        """Per step: `time/<phase>` and `time/step` in seconds; `train/images_per_second`; starts the next window.

        `images` is the number of images per step over all ranks.
        """
        if self._cuda:
            torch.cuda.synchronize()
            for name, first, last in self._events:
                self._seconds[name] += first.elapsed_time(last) / 1e3
        wall, steps = time.perf_counter() - self._start, max(self._steps, 1)
        report = {f"time/{name}": seconds / steps for name, seconds in self._seconds.items()}
        report["time/step"] = wall / steps
        report["train/images_per_second"] = images * steps / wall
        self._seconds.clear()
        self._events.clear()
        self._steps, self._start = 0, time.perf_counter()
        return report
