"""Work in pieces: training stops with a checkpoint before a time is up, and whatever still runs is given up then."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TO_STOP_S = 60.0  # for a step, a checkpoint and the closing of files; at most a fifth of the time
TO_LEAVE_S = 20.0  # for table, picture and the end of the process; at most a twentieth of the time


@dataclass
class TimeLimit:
    """Whether it is time to stop; `over` means that nothing new should begin."""

    over: bool = False


@contextmanager
def time_limit(minutes: float, began: float) -> Iterator[TimeLimit]:
    """A limit of `minutes` since `began` (seconds of CLOCK_BOOTTIME); 0 = none.

    Some time before, SIGTERM tells training to stop with a checkpoint, as a scheduler would. Just before the end SIGINT
    gives up what has not stopped, such as an evaluation: as a KeyboardInterrupt with `over` set. Nothing is lost but
    time, because a run is the same however often it is stopped.
    """
    limit = TimeLimit()
    if not minutes:
        yield limit
        return
    idle = signal.getsignal(signal.SIGTERM)
    whole = 60 * minutes
    left = whole - (now() - began)

    def stop() -> None:
        limit.over = True
        if signal.getsignal(signal.SIGTERM) is not idle:  # training listens
            os.kill(os.getpid(), signal.SIGTERM)

    def leave() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    timers = [
        threading.Timer(max(0.0, left - min(TO_STOP_S, whole / 5)), stop),
        threading.Timer(max(0.0, left - min(TO_LEAVE_S, whole / 20)), leave),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield limit
    finally:
        for timer in timers:
            timer.cancel()


def now() -> float:
    """Seconds since the machine was started, suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_began() -> float:
    """When this process was started, on the clock of `now`: before Python loaded anything."""
    after_name = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
