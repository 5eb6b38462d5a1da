"""Where the time goes: seconds per stage, summed over threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by name; safe to use from many threads."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._seconds = dict.fromkeys(names, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block as the stage `name`'s."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self._seconds[name] += spent

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by stage."""
        with self._lock:
            return dict(self._seconds)
