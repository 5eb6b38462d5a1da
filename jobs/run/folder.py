"""The run folder: everything a run leaves behind, and where it lies."""

import fcntl
import glob
import json
import math
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shards.errors import InputError


@dataclass(frozen=True)
class RunFolder:
    """Paths below one run's folder. Everything but config, log, checkpoints and metrics can be derived from those."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def log(self) -> Path:
        return self.path / "log.zarr"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def failure(self) -> Path:
        """Tracebacks of the program's own faults."""
        return self.path / "failure.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def analysis(self) -> Path:
        return self.path / "analysis"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may begin here, or go on; changes nothing.

        Raises:
            InputError: the folder exists and neither flag is given; it is not a run; there is nothing to resume.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other; take one")
        inside = {*self.path.iterdir()} - {self.lock} if self.path.is_dir() else set()
        exists = bool(inside) or self.path.is_file()
        if resume:
            if not self.config.is_file():
                raise InputError(f"run: {self.path} holds no run to resume (no config.json); leave out --resume")
            return
        if exists:
            if not self.config.is_file():
                raise InputError(f"run: {self.path} exists and is not a run folder; choose another --run")
            if not overwrite:
                raise InputError(f"run: {self.path} exists; go on with --resume or replace it with --overwrite")

    def identity(self) -> str:
        """What tells this run from all others, whatever their folders are called: drawn once and kept in the folder."""
        path = self.path / "identity"
        if not path.is_file():
            with whole_file(path) as temporary:
                temporary.write_text(secrets.token_hex(8))
        return path.read_text().strip()

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training into the folder meanwhile; the kernel ends that with this process.

        A folder that is empty at the end, as where a new run was refused, goes again.

        Raises:
            InputError: it cannot be written, or another process trains into it; the message names that one.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self._own_lock()
        except OSError as error:
            raise InputError(f"run: {self.path} cannot be written ({error.strerror}); choose another --run") from error
        with file:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                self.lock.unlink(missing_ok=True)
                with suppress(OSError):
                    self.path.rmdir()

    def _own_lock(self) -> TextIO:
        """The open lock file, locked."""
        while True:
            file = self.lock.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_ino == self.lock.stat().st_ino:
                    return file
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read() or "another process"
                file.close()
                raise InputError(
                    f"run: {self.path}: {owner} is training into it; wait for its end, or choose another --run"
                ) from error
            except FileNotFoundError:
                pass
            file.close()  # the process before took its lock file away in this moment

    def clear(self) -> None:
        """Makes the folder an empty run's. To be called when nothing can be wrong with the new run any more, so that a
        mistake in its command line costs no old one."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if path == self.lock:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.checkpoints.mkdir()

    def write_state(self, state: str, **facts: Any) -> None:
        """Records `running`, `finished`, `interrupted` or `failed`, for `hardviews runs`."""
        write_json(self.state, {"state": state, "updated": time.time(), **facts})

    def read_state(self) -> dict[str, Any]:
        """The recorded state; empty where none is."""
        return json.loads(self.state.read_text()) if self.state.is_file() else {}


def open_run(path: str | Path) -> RunFolder:
    """An existing run.

    Raises:
        InputError: there is no run in that folder.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise InputError(f"run: {path} is no run folder (no config.json in it); give the folder of a `pretrain --run`")
    return folder


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The temporary name of a file that gets its own name when all is written and on the disk: it is never half.

    What killed processes left beside it goes; a living one holds a lock on its own.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    with temporary.open("wb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield temporary
            os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # a full disk has no name
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is always whole."""
    with whole_file(path) as temporary:
        temporary.write_text(strict_json(content, indent=1))


def strict_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: numbers that are infinite or none are null."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(content), indent=indent, allow_nan=False)


def without_nan(content: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def keep_lines(path: Path, last_step: int) -> None:
    """Cuts a JSON-lines file to the lines up to `last_step`, so that a resumed run writes no step twice.

    A half-written last line, left by a kill, goes too.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("step", 0) <= last_step:
            kept.append(line)
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))
