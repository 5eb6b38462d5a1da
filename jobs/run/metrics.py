"""Where numbers go: one logger interface, JSON lines and TensorBoard by default, W&B and MLflow as extras."""

import importlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from jobs.run.folder import RunFolder, keep_lines, strict_json
from shards.errors import InputError, install_extra


class Logger(Protocol):
    """Writes scalars, a step at a time."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line with `step`, `time` (Unix seconds) and the scalars."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        keep_lines(folder.metrics, step)
        self._file = folder.metrics.open("a", buffering=1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(strict_json({"step": step, "time": round(time.time(), 3), **scalars}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files, one event a step; a resumed run purges what lies behind its first step.

    Written here rather than by torch's SummaryWriter, whose thread meets a full disk with a traceback of its own and
    whose caller hears of it later.
    """

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        # protobuf makes these classes on import
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.tensorboard.mkdir(parents=True, exist_ok=True)
        resumed = any(folder.tensorboard.iterdir())
        # Readers take files in the order of their names, and those alone that have `tfevents` in them.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder.tensorboard / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if resumed:
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()


class WandB:
    """Weights & Biases; mode, project and key come from its own environment variables (WANDB_MODE=offline works)."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder.path.resolve().name
        self._run = wandb.init(dir=folder.path, id=folder.identity(), name=name, resume="allow", config=dict(config))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; the store comes from MLFLOW_TRACKING_URI, else it is a SQLite file beside the run folder."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        import mlflow

        store = None if "MLFLOW_TRACKING_URI" in os.environ else f"sqlite:///{folder.path.resolve().parent}/mlflow.db"
        self._client = mlflow.MlflowClient(store)
        experiment = self._client.get_experiment_by_name("hardviews")
        number = experiment.experiment_id if experiment else self._client.create_experiment("hardviews")
        tags = {"hardviews.run": folder.identity()}
        earlier = self._client.search_runs([number], f"tags.`hardviews.run` = '{folder.identity()}'", max_results=1)
        run = earlier[0] if earlier else self._client.create_run(number, tags=tags, run_name=folder.path.resolve().name)
        self._id = run.info.run_id

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


LOGGERS: dict[str, Callable[[RunFolder, int, Mapping[str, Any]], Logger]] = {
    "json": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_loggers(names: Sequence[str]) -> None:
    """To be called before anything is written.

    Raises:
        InputError: a logger whose package is not installed, or W&B without a key that its server takes.
    """
    for name in names:
        if name in ("wandb", "mlflow"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise InputError(f"loggers: {name} is not installed; {install_extra('loggers')}") from error
    if "wandb" in names:
        check_wandb()


def check_wandb() -> None:
    """Raises InputError where W&B is to send to its server and cannot."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        reason = "" if wandb.login(prompt=False) else "there is no API key"
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise InputError(
            f"loggers: wandb cannot log in ({reason}); run `wandb login`, or set WANDB_MODE=offline to keep its "
            f"files here"
        )


class Loggers:
    """All loggers of a run as one; `names` are keys of LOGGERS."""

    def __init__(self, names: Sequence[str], folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        self._stack = ExitStack()
        self._loggers: list[Logger] = []
        for name in names:
            logger = LOGGERS[name](folder, step, config)
            self._stack.callback(logger.close)
            self._loggers.append(logger)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one step everywhere; non-finite values are written too (JSON as null)."""
        for logger in self._loggers:
            logger.log(step, scalars)

    def close(self) -> None:
        self._stack.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, a half-written last one left out; values that were not finite are NaN."""
    lines = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            lines.append({name: math.nan if value is None else value for name, value in entry.items()})
    return lines
