"""A run's way out: what the outside world did to it, in one line."""

import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from jobs.run.failure import RankLostError, TrainingFailedError
from jobs.run.folder import RunFolder

BROKEN = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def as_training_failure(folder: Path) -> Iterator[None]:
    """Turns a full disk and the loss of another rank, wherever they are met, into one clear line.

    Raises:
        TrainingFailedError: the disk of `folder` is full, or a rank is gone.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingFailedError):
            raise
        causes = list(chain(error))
        if full := first(disk_full(cause, folder) for cause in causes):
            raise TrainingFailedError(f"{full}; go on with --resume") from error
        if lost := first(rank_lost(cause) for cause in causes):
            raise RankLostError(f"{lost}; go on with --resume") from error
        raise


def first(lines: Iterable[str | None]) -> str | None:
    """The first line that is not None; None where all are."""
    return next(filter(None, lines), None)


def record_failure(folder: RunFolder, error: TrainingFailedError) -> None:
    """Writes down that a run failed and why, unless the process that failed first has done so.

    On a full disk the recorded state stays what it was.
    """
    with suppress(OSError):
        recorded = folder.read_state()
        if isinstance(error, RankLostError) and recorded.get("state") == "failed":
            return
        facts = {name: value for name, value in recorded.items() if name not in ("state", "updated", "reason")}
        folder.write_state("failed", **facts, reason=str(error))


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
