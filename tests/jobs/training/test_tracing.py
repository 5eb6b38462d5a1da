"""A trace of some steps, and garbage that is collected between epochs only."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.pretrain import pretrain
from jobs.run.config import PretrainConfig
from jobs.run.process import collecting_by_hand
from jobs.training import loop
from shards.errors import InputError


def test_a_run_writes_a_trace_of_its_steps(tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(replace(tiny, steps=8), tmp_path / "run", profile=2)
    events = json.loads((tmp_path / "run" / "profile" / "steps-5-6.pt.trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("aten::addmm" in event["name"] for event in events)


def test_more_steps_than_there_are_cannot_be_traced(tiny: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profile: 2 steps after the first 5 are asked for, and 6 are left"):
        pretrain(tiny, tmp_path / "run", profile=2)
    pretrain(tiny, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "profile").exists()


def test_garbage_is_collected_between_steps_only(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled, collected, step, collect = [], [], loop.train_step, gc.collect
    monkeypatch.setattr(loop, "train_step", lambda *given: enabled.append(gc.isenabled()) or step(*given))
    monkeypatch.setattr(gc, "collect", lambda *given: collected.append(len(enabled)) or collect(*given))
    config = replace(tiny, checkpoint=replace(tiny.checkpoint, every=4))
    pretrain(config, tmp_path / "run")
    assert enabled == [False] * 6 and gc.isenabled()
    assert collected == [0, 4, 6]  # at the start and with each checkpoint; an epoch is longer


def test_collecting_leaves_things_as_they_were() -> None:
    with pytest.raises(ValueError), collecting_by_hand():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        raise ValueError
    assert gc.isenabled() and gc.get_freeze_count() == 0
