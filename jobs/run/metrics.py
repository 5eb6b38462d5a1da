"""Where numbers go: one logger interface, JSON lines and TensorBoard by default, W&B and MLflow as extras."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from jobs.run.folder import RunFolder, keep_lines
from shards.errors import InputError


class Logger(Protocol):
    """Takes scalars of one step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line with `step`, `time` (Unix seconds) and the scalars."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        keep_lines(folder.metrics, step)
        self._file = folder.metrics.open("a", buffering=1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **scalars}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files; a resumed run purges what lies behind its first step."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; mode, project and key come from its own environment variables (WANDB_MODE=offline works)."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("loggers: wandb is not installed; `pip install hardviews[loggers]`") from error
        self._run = wandb.init(
            dir=folder.path, id=folder.path.name, name=folder.path.name, resume="allow", config=dict(config)
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; the store comes from MLFLOW_TRACKING_URI, else a local SQLite file below the run folder's parent."""

    def __init__(self, folder: RunFolder, step: int, config: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise InputError("loggers: mlflow is not installed; `pip install hardviews[loggers]`") from error
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name("hardviews")
        number = experiment.experiment_id if experiment else self._client.create_experiment("hardviews")
        name = folder.path.name
        earlier = self._client.search_runs([number], f"attributes.run_name = '{name}'", max_results=1) if step else []
        run = earlier[0] if earlier else self._client.create_run(number, run_name=name)
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
        """Writes scalars of one step everywhere; non-finite values are written too (JSON as NaN)."""
        for logger in self._loggers:
            logger.log(step, scalars)

    def close(self) -> None:
        self._stack.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, a half-written last one left out."""
    lines = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines
