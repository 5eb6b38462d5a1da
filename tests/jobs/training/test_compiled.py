"""What torch.compile makes of a run: one graph for each kind of forward, none later, none in parts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.pretrain import pretrain
from jobs.run.config import PretrainConfig
from jobs.run.data import open_data, run_length
from jobs.training import loop
from jobs.training.monitor import Monitor
from models.negatives import NegativesConfig


def test_no_step_compiles_anew_after_the_first_of_its_kind(
    tiny: PretrainConfig, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps in which synthetic negatives begin and end, every second one chooses hard pairs, and kNN runs."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled_alike = monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **how: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl, backend=counter, **how)
        ),
    )
    assert compiled_alike is None
    new: dict[tuple[Any, ...], list[int]] = {}
    step, evaluate = loop.train_step, Monitor.evaluate

    def counted(t: Any, *others: Any) -> Any:
        synthetic = t.config.objective.negatives.active(t.objective.epoch, t.length.epochs)
        before, kind = counter.frame_count, ("step", t.config.selection.scores(t.step), synthetic)
        result = step(t, *others)
        new.setdefault(kind, []).append(counter.frame_count - before)
        return result

    def evaluated(monitor: Monitor, number: int) -> None:
        before = counter.frame_count
        evaluate(monitor, number)
        new.setdefault(("kNN",), []).append(counter.frame_count - before)

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(Monitor, "evaluate", evaluated)
    step_epochs = 1 / run_length(tiny, open_data(tiny).order).steps_per_epoch
    negatives = NegativesConfig(
        8, 4, 4, 4, 4, 4, 4, start_epoch=2.5 * step_epochs, last_epochs_without=2.5 * step_epochs, of_epochs=None
    )
    pretrain(
        replace(
            tiny,
            compile="on",
            objective=replace(tiny.objective, negatives=negatives),
            selection=replace(tiny.selection, every=2),
            monitor=replace(
                tiny.monitor,
                bank=0,
                health_every=0,
                knn_every=5,
                knn_train=str(digits / "test"),
                knn_test=str(digits / "test"),
            ),
            steps=10,
        ),
        tmp_path / "run",
    )
    assert {kind: len(counts) for kind, counts in new.items()} == {
        ("kNN",): 3,  # at the start too
        ("step", True, False): 3,
        ("step", False, False): 2,
        ("step", True, True): 2,
        ("step", False, True): 3,
    }
    assert sum(counts[0] for counts in new.values()) == counter.frame_count > 0
    assert not any(any(counts[1:]) for counts in new.values()), new
    assert not counters["graph_break"]
