"""What a run folder holds, read for the report; whatever is missing or damaged stays out, with the reason."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from jobs.reporting.html import Markup
from jobs.run.folder import RunFolder, open_run
from jobs.run.metrics import read_metrics


@dataclass(frozen=True)
class RunData:
    """One run. `pictures` holds the parts that need images or a model: name → HTML, or the reason it is not there."""

    name: str
    path: Path
    config: dict[str, Any]
    state: dict[str, Any]
    metrics: list[dict[str, Any]]
    analysis: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    problems: list[str]
    pictures: Mapping[str, Markup | str] = field(default_factory=dict)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64 [n] each, of one metric; empty where it was never logged."""
        points = [(line["step"], line[name]) for line in self.metrics if "step" in line and _is_number(line.get(name))]
        both = np.array(points, dtype=np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def real_loss(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the loss against real negatives alone: the loss itself where no synthetic ones are."""
        lines = [{"loss": line.get("train/loss_real", line.get("train/loss")), **line} for line in self.metrics]
        return replace(self, metrics=lines).series("loss")

    def synthetic_span(self) -> list[tuple[str, float]]:
        """Where synthetic negatives begin and end (steps), as far as they do within the run."""
        logged = [line for line in self.metrics if "train/loss" in line]
        used = [row for row, line in enumerate(logged) if "train/loss_real" in line]
        if not used:
            return []
        marks = [("begin", used[0] - 1)] if used[0] > 0 else []
        marks += [("end", used[-1])] if used[-1] < len(logged) - 1 else []
        return [(f"synthetic negatives {word}", float(logged[row]["step"])) for word, row in marks]

    def names(self, prefix: str = "") -> list[str]:
        """Metrics that start with `prefix`, in the order they first appear."""
        ordered: dict[str, None] = {}
        for line in self.metrics:
            ordered.update({key: None for key in line if key not in ("step", "time") and key.startswith(prefix)})
        return list(ordered)

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        values = self.series(name)[1]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def setting(self, *names: str) -> Any:
        """The first of these dotted config keys that is set."""
        flat = flatten(self.config)
        return next((flat[name] for name in names if flat.get(name) is not None), None)

    @property
    def origin(self) -> str | None:
        """Where the weights that the run began with come from; None for random ones."""
        origin = self.config.get("origin")
        if not origin:
            return None
        step = f", step {origin['step']}" if origin.get("step") is not None else ""
        encoder = f", {origin['encoder']} encoder" if origin.get("encoder") else ""
        return f"{origin['kind']} {origin['name']}{step}{encoder} (SHA-256 {origin['sha256'][:12]})"

    def addresses(self, source: str) -> list[str]:
        """Where the `real` or the `synthetic` shards lie."""
        return addresses(flatten(self.config), source)


def addresses(flat: Mapping[str, Any], source: str) -> list[str]:
    """Where the shards of a source lie, from settings by dotted key; runs of before have one address as text."""
    value = flat.get(f"data.{source}") or []
    return [value] if isinstance(value, str) else list(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, content in config.items():
        if isinstance(content, Mapping):
            flat.update(flatten(content, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = content
    return flat


def read_run(path: Path) -> RunData:
    """Reads everything but the pictures.

    Raises:
        InputError: the folder is no run.
    """
    folder = open_run(path)
    problems: list[str] = []
    evaluations = [_json(file, problems) for file in sorted(folder.evaluation.glob("*.json"))]
    return RunData(
        name=folder.path.resolve().name,
        path=folder.path,
        config=_json(folder.config, problems) or {},
        state=(_json(folder.state, problems) or {}) if folder.state.is_file() else {},
        metrics=read_metrics(folder.metrics),
        analysis=_analysis(folder, problems),
        evaluations=[e for e in evaluations if e is not None and "kind" in e],
        quarantine=read_metrics(folder.quarantine),
        problems=problems,
    )


def told_apart(runs: Sequence[RunData]) -> list[RunData]:
    """The runs by names that differ: where folders have the same, by as many of those above as it takes."""
    places = [run.path.resolve().parts for run in runs]
    names = []
    for place in places:
        alike = {other for other in places if other[-1] == place[-1] and other != place}
        depth = next(n for n in range(1, len(place) + 1) if not any(other[-n:] == place[-n:] for other in alike))
        names.append("/".join(place[-depth:]))
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _analysis(folder: RunFolder, problems: list[str]) -> dict[str, Any] | None:
    file = folder.analysis / "analysis.json"
    return _json(file, problems) if file.is_file() else None


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return None
    if isinstance(content, dict):
        return content
    problems.append(f"{path.name} is not a JSON object")
    return None


def _is_number(x: object) -> TypeGuard[float]:
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_finite(x: object) -> TypeGuard[float]:
    """Whether x is a number that can be drawn."""
    return _is_number(x) and math.isfinite(x)
