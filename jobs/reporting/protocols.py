"""Which scores may stand side by side: those of equal protocols, which are all that decides a score but the weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.reporting.rundata import RunData, flatten, is_finite

KINDS = {"knn": "Evaluated kNN", "linear": "Linear probe", "finetune": "Fine-tuned"}
# What a protocol has of a data set, from what tells most.
DATA = ("name", "fingerprint", "images")


@dataclass(frozen=True)
class Score:
    """Top-1 (0 to 1) of a run's own checkpoint."""

    kind: str
    protocol: dict[str, Any]
    """Dotted setting → value; with a run's path where none was recorded, so that it equals no other."""
    top1: float
    step: int
    which: str

    @property
    def key(self) -> str:
        return json.dumps([self.kind, self.protocol], sort_keys=True)


def own_scores(run: RunData) -> list[Score]:
    """The newest step's top-1 in each protocol."""
    newest: dict[str, Score] = {}
    for e in run.evaluations:
        model, top1 = e.get("model", {}), e.get("scores", {}).get("top1")
        if e["kind"] in KINDS and model.get("source") == "run" and is_finite(top1):
            protocol = flatten(e.get("protocol") or {"not recorded in": str(run.path)}) | {
                "encoder": model.get("which")
            }
            score = Score(e["kind"], protocol, top1, model.get("step") or 0, str(model.get("which")))
            if score.key not in newest or newest[score.key].step <= score.step:
                newest[score.key] = score
    return sorted(newest.values(), key=lambda score: list(KINDS).index(score.kind))


def side_by_side(runs: Sequence[RunData]) -> dict[str, list[Score | None]]:
    """Label → each run's score, a row for each protocol; None for runs that were not scored so."""
    by_run = [{score.key: score for score in own_scores(run)} for run in runs]
    rows = {key: [scores.get(key) for scores in by_run] for key in dict.fromkeys(key for one in by_run for key in one)}
    present = [next(score for score in row if score is not None) for row in rows.values()]
    order = sorted(range(len(present)), key=lambda i: list(KINDS).index(present[i].kind))
    names = labels([present[i] for i in order])
    return dict(zip(names, (list(rows.values())[i] for i in order), strict=True))


def labels(scores: Sequence[Score]) -> list[str]:
    """A name for each of different protocols: its kind, and in brackets what sets it apart from others of the kind."""
    names = []
    for score in scores:
        others = [other.protocol for other in scores if other.kind == score.kind]
        fields = dict.fromkeys(name for protocol in others for name in protocol)
        differing = [f for f in fields if len({json.dumps(protocol.get(f)) for protocol in others}) > 1]
        for role in ("train", "test"):  # a name says enough, unless others have it too
            told = next((f"{role}.{part}" for part in DATA if f"{role}.{part}" in differing), None)
            named = {protocol.get(f"{role}.name") for protocol in others}
            marked = {protocol.get(f"{role}.fingerprint") for protocol in others}
            if told == f"{role}.name" and len(named) < len(marked):
                continue
            differing = [f for f in differing if not f.startswith(f"{role}.") or f == told]
        words = [worded(f, score.protocol[f]) for f in differing if f in score.protocol]
        names.append(KINDS[score.kind] + (f" ({', '.join(words)})" if words else ""))
    return names


def worded(name: str, value: Any) -> str:
    """A setting as a reader takes it: test shards, k 10 20, labels 10 %."""
    if name.endswith(".fingerprint"):
        return f"{name.removesuffix('.fingerprint')} {str(value)[:8]}"
    name = name.removesuffix(".name").replace("_", " ").replace(".", " ")
    if name == "labels":
        return f"labels {100 * value:g} %"
    if isinstance(value, list):
        return f"{name} {' '.join(f'{x:g}' if is_finite(x) else str(x) for x in value)}"
    return f"{name} {value:g}" if is_finite(value) else f"{name} {value}"


def described(protocol: dict[str, Any]) -> str:
    """A whole protocol but for its data, for a cell of a table; empty where none was recorded."""
    plain = ("mean", "std")  # the same for all that is trained here
    flat = {name: value for name, value in protocol.items() if name not in ("train", "test", *plain)}
    return ", ".join(worded(name, value) for name, value in flat.items())
