"""A run's way out: what the outside world did to it, in one line."""

import errno
import re
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.run.failure import RankLostError, TrainingFailedError
from jobs.run.folder import RunFolder
from shards.errors import InputError

BROKEN = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def as_training_failure(folder: Path) -> Iterator[None]:
    """Turns a full disk, want of memory and the loss of another rank, wherever they are met, into one clear line.

    Raises:
        TrainingFailedError: the disk of `folder` or the memory is full, or a rank is gone.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingFailedError):
            raise
        causes = list(chain(error))
        if full := first(disk_full(cause, folder) for cause in causes):
            raise TrainingFailedError(f"{full}; go on with --resume") from error
        if full := first(memory_full(cause) for cause in causes):
            raise TrainingFailedError(full) from error
        if lost := first(rank_lost(cause) for cause in causes):
            raise RankLostError(f"{lost}; go on with --resume") from error
        raise


def first(lines: Iterable[str | None]) -> str | None:
    """The first line that is not None; None where all are."""
    return next(filter(None, lines), None)


def record_failure(folder: RunFolder, error: BaseException) -> None:
    """Writes down that a run has ended and why, unless the process that failed first has done so.

    What nobody foresaw is the program's own fault: its traceback is appended to `failure.txt`. On a full disk the
    recorded state stays what it was.
    """
    with suppress(OSError, ValueError):
        recorded = folder.read_state()
        if isinstance(error, RankLostError) and recorded.get("state") == "failed":
            return
        facts = {name: value for name, value in recorded.items() if name not in ("state", "updated", "reason", "log")}
        if isinstance(error, KeyboardInterrupt):
            folder.write_state("interrupted", **facts)
        elif isinstance(error, TrainingFailedError | InputError):
            folder.write_state("failed", **facts, reason=str(error))
        else:
            with folder.failure.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, step {recorded.get('step')}\n")
                file.writelines([*traceback.format_exception(error), "\n"])
            error.add_note(f"This is kept in {folder.failure}.")
            what = " ".join(str(error).split("\n", 1)[0].split())
            folder.write_state("failed", **facts, reason=f"{type(error).__name__}: {what}", log=str(folder.failure))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from or while handling."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def disk_full(error: BaseException, folder: Path) -> str | None:
    """What to say where the disk is full; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in NO_SPACE:
        return None
    free = shutil.disk_usage(folder).free
    return (
        f"run: {error.filename or folder} cannot be written ({error.strerror}; {free / 1e9:.1f} GB free); the newest "
        f"checkpoint in {folder / 'checkpoints'} is whole; make room"
    )


def memory_full(error: BaseException) -> str | None:
    """What to say where memory, the device's or this machine's, does not suffice; None for any other error."""
    message = str(error).split("\n", 1)[0]
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not full and not (isinstance(error, RuntimeError) and "can't allocate memory" in message):
        return None
    place = " ".join(message.split())[:200] or "of this machine"
    return (
        f"run: out of memory ({place}); begin anew with a smaller --batch, a larger --accumulate or "
        f"--checkpoint-activations"
    )


def rank_lost(error: BaseException) -> str | None:
    """What to say where a collective failed because another rank is gone; None for any other error.

    NCCL and the rendezvous store raise torch's own classes, gloo a RuntimeError that names it.
    """
    message = str(error).lower() if isinstance(error, RuntimeError) else ""
    if not isinstance(error, dist.DistError) and not any(words in message for words in BROKEN):
        return None
    # gloo puts its source file in front and advice behind
    detail = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split("\n", 1)[0].split())).split(". ")[0]
    return f"run: another process of this job is gone ({detail}); the first one to fail says why"
