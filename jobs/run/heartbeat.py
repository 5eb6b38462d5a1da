"""Notices ranks that are gone.

A rank that dies is noticed by its torchrun at once. One that hangs, or whose machine is gone, is noticed by nobody: the
others wait for it in a collective until that times out, and timeouts have to be long, because a rank may rightly wait
for a slow disk or an evaluation. So each rank also says from a thread that it lives.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

EVERY = 2.0
PATIENCE = 20.0


class Heartbeat:
    """Beats for this rank and watches the next one, every `EVERY` seconds.

    `lost(reason)` is called from the thread once: where the next rank has not beaten for `PATIENCE` seconds, where
    another one found that, or where the store of the rendezvous is gone.
    """

    # torch documents these classes under torch.distributed and does not export them to type checkers.
    def __init__(self, store: dist.Store, rank: int, size: int, lost: Callable[[str], None]) -> None:  # pyright: ignore[reportPrivateImportUsage]
        self._store, self._rank, self._next, self._lost = store, rank, (rank + 1) % size, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more beats: to be called when all ranks are about to end."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        beat, heard, since = 0, b"", time.monotonic()
        while not self._over.wait(EVERY):
            try:
                beat += 1
                self._store.set(f"hardviews/alive/{self._rank}", str(beat))
                newest = self._read(f"hardviews/alive/{self._next}")
                reason = self._read("hardviews/lost").decode()
            except (RuntimeError, OSError) as error:
                reason, newest = f"the rendezvous store cannot be reached ({str(error).splitlines()[0]})", heard
            if newest != heard:
                heard, since = newest, time.monotonic()
            elif not reason and time.monotonic() - since > PATIENCE:
                reason = f"rank {self._next} has given no sign of life for {PATIENCE:.0f} s"
                with suppress(RuntimeError, OSError):  # the store may be gone too
                    self._store.set("hardviews/lost", reason)
            if reason and not self._over.is_set():
                self._lost(reason)
                return

    def _read(self, key: str) -> bytes:
        """The value, or nothing while there is none: `get` alone would wait for it."""
        return self._store.get(key) if self._store.check([key]) else b""


def connect(rank: int, size: int, lost: Callable[[str], None]) -> Heartbeat:
    """A heartbeat over the store that torchrun's environment names, by a connection of its own."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    return Heartbeat(store, rank, size, lost)
