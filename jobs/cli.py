"""The `hardviews` command: finds the job, runs it, and says in one line what went wrong.

Exit code 2 is a user's mistake, 1 training that cannot go on, 75 a sweep with runs still to do, 130 an interruption,
141 an output that nobody reads any more.
"""

import difflib
import errno
import importlib
import importlib.metadata
import os
import select
import signal
import sys
from typing import TextIO

from jobs.run.failure import TrainingFailedError
from jobs.run.process import wait_briefly
from jobs.run.terminal import fail
from shards.errors import InputError

# Job → what it does. Each lives in the module of its name, whose `main(argv)` runs it; modules load on use, so that
# `hardviews info` does not wait for torch.
JOBS = {
    "build": "images → WebDataset shards with a manifest",
    "index": "a manifest for WebDataset tars that others wrote",
    "verify": "re-read shards and name every damaged shard and sample",
    "info": "counts, sizes and provenance of shards",
    "duplicates": "images that are there twice, within and across data sets",
    "generate": "sample a synthetic clone of a data set from a diffusion pipeline",
    "pretrain": "pretrain a backbone on streamed shards with hard views",
    "evaluate": "kNN, linear probe, fine-tuning, retrieval",
    "embed": "features of every image, as Parquet",
    "export": "augmentation log → Parquet tables",
    "export-backbone": "checkpoint → safetensors that timm loads",
    "analyse": "IoU, fANOVA and choice statistics of a run's log",
    "report": "one self-contained HTML file about one or more runs",
    "replay": "draw the views of a logged step again",
    "runs": "list runs with state, step, speed and last metrics",
    "compare": "curves and final numbers of several runs side by side",
    "sweep": "run a study: axes × seeds, resumable",
    "bench": "measure against honest baselines",
    "doctor": "versions, devices, and what is missing",
    "demo": "the whole system on real images, in minutes",
}


# What a disk may refuse anywhere → the remedy.
DISK = {
    errno.ENOSPC: "make room there, or write to another disk",
    errno.EDQUOT: "make room there, or write to another disk",
    errno.EROFS: "make it writable, or copy it to a disk that is",
    errno.EACCES: "give this user the rights, or choose another place",
}


def usage() -> str:
    width = max(map(len, JOBS))
    lines = [f"  {name:{width}}  {text}" for name, text in JOBS.items()]
    return (
        "usage: hardviews JOB [flags]\n\njobs:\n"
        + "\n".join(lines)
        + "\n\n`hardviews JOB --help` explains every flag, `hardviews --version` tells the version."
    )


def run(argv: list[str]) -> int:
    """Runs one job and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"hardviews {importlib.metadata.version('hardviews')}")
        return 0
    name, *rest = argv
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return fail(f"{name}: no such job; {hint}known jobs: {', '.join(JOBS)}")
    try:
        importlib.import_module(f"jobs.{name.replace('-', '_')}").main(rest)
    except (InputError, TrainingFailedError) as error:
        if os.environ.get("HARDVIEWS_TRACEBACK"):
            raise
        return fail(str(error), 1 if isinstance(error, TrainingFailedError) else 2)
    except OSError as error:
        if os.environ.get("HARDVIEWS_TRACEBACK") or error.errno not in DISK:
            raise
        return fail(f"{error.filename or name}: {error.strerror}; {DISK[error.errno]}")
    except KeyboardInterrupt:
        print("hardviews: interrupted", file=sys.stderr)
        return 130
    return 0


def unread(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed, as `head` does when it has seen enough."""
    waiting = select.poll()
    waiting.register(stream, 0)  # an error is told without being asked for
    return bool(waiting.poll(0))


def main() -> None:
    """Entry point of the console script."""
    wait_briefly(os.environ)
    try:
        try:
            sys.exit(run(sys.argv[1:]))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if unread(stream)]
        if not closed:  # it was a connection
            raise
        for stream in closed:  # for what is still to be written at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
