"""Work in pieces: training stops with a checkpoint before a time is up, and whatever still runs is given up then."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TO_STOP_S = 60.0  # for a step, a checkpoint and the closing of files; at most half of the time
# For table, picture and the end of the process, which take some 6 s of a core (loading matplotlib and taking down the
# interpreter are most of it), so several times that where others work on it too; at most a quarter of the time.
TO_LEAVE_S = 20.0
EVERY_S = 0.1  # between looks at the clock


@dataclass(frozen=True)
class TimeLimit:
    """When it is time to stop (seconds of CLOCK_BOOTTIME)."""

    to_stop: float = math.inf

    @property
    def over(self) -> bool:
        """Whether nothing new should begin."""
        return now() >= self.to_stop


@contextmanager
def time_limit(minutes: float, began: float) -> Iterator[TimeLimit]:
    """A limit of `minutes` since `began` (seconds of CLOCK_BOOTTIME); 0 = none.

    Some time before, SIGTERM tells training to stop with a checkpoint, as a scheduler would. Just before the end SIGINT
    gives up what has not stopped, such as an evaluation: as a KeyboardInterrupt with `over` set. Nothing is lost but
    time, because a run is the same however often it is stopped. To be entered in the main thread.
    """
    if not minutes:
        yield TimeLimit()
        return
    idle = signal.getsignal(signal.SIGTERM)
    whole = 60 * minutes
    end = began + whole
    limit, to_leave = TimeLimit(end - min(TO_STOP_S, whole / 2)), end - min(TO_LEAVE_S, whole / 4)
    left = threading.Event()

    def watch() -> None:
        signalled = False
        while not left.wait(EVERY_S):
            # Training listens from when it has opened everything, which may be after it is told to stop.
            if limit.over and not signalled and signal.getsignal(signal.SIGTERM) is not idle:
                os.kill(os.getpid(), signal.SIGTERM)
                signalled = True
            if now() >= to_leave:
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, name="time-limit", daemon=True)
    # Scripts start what they run in the background deaf to SIGINT; here it has to be heard.
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if deaf:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher.start()
    try:
        yield limit
    finally:
        left.set()
        watcher.join()
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def now() -> float:
    """Seconds since the machine was started, suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_began() -> float:
    """When this process was started, on the clock of `now`: before Python loaded anything."""
    after_name = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
