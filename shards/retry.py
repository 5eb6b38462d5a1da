"""Trying again what a network may spoil."""

import threading
from collections.abc import Callable
from typing import TypeVar

from shards.errors import InputError

Result = TypeVar("Result")

ATTEMPTS = 8
PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds: doubled each time, in all about half a minute
# What no second attempt mends. Anything else may be the network's: its libraries share no base class for that.
FINAL = (FileNotFoundError, NotADirectoryError, PermissionError, NotImplementedError, InputError)


def retry(
    action: Callable[[], Result], attempts: int = ATTEMPTS, pause: float = PAUSE, ended: threading.Event | None = None
) -> Result:
    """The result of the first attempt that succeeds; pauses double in between. `ended`, when set, stops the trying.

    Raises:
        Exception: what the last attempt raised.
    """
    ended = ended or threading.Event()
    for attempt in range(attempts):
        try:
            return action()
        except FINAL:
            raise
        except Exception:
            if attempt == attempts - 1 or ended.wait(min(pause * 2**attempt, LONGEST_PAUSE)):
                raise
    raise ValueError(f"attempts: {attempts} must be at least 1")
