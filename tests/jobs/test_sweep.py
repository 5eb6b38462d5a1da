"""`hardviews sweep` from start to end on small shards: skipping, resuming, failing, ending in time, what is written."""

import csv
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import cli, sweep
from jobs.run import checkpoint
from jobs.run.folder import RunFolder
from jobs.studies import time_limit
from jobs.studies.ready import STUDIES
from jobs.studies.results import RunResult
from jobs.studies.time_limit import now, process_began
from jobs.sweep import SweepConfig
from jobs.training import loop as trainer
from shards.errors import InputError

# A ViT of 4 tokens and two steps, from a preset.
TINY = (
    "backbone.image_size=16", "backbone.width=16", "backbone.depth=1", "backbone.heads=2", "objective.hidden=16",
    "objective.width=8", "objective.queue=64", "data.threads=1", "monitor.bank=0", "monitor.loggers=[\"json\"]",
    "monitor.every=1", "checkpoint.every=1", "device=cpu",
)  # fmt: skip


def config_of(digits: Path, out: Path, **changes: object) -> SweepConfig:
    config = SweepConfig(
        "moby-vit-tiny",
        str(digits / "test"),
        str(digits / "test"),
        out,
        axis=("objective.temperature=0.1,0.2",),
        change=TINY,
        seeds=2,
        steps=2,
        batch=16,
        probe_epochs=2,
    )
    return replace(config, **changes)


def flags(config: SweepConfig) -> list[str]:
    found = ["sweep", config.study, "--real", config.real, "--test", config.test, "--out", str(config.out)]
    found += ["--seeds", str(config.seeds), "--steps", str(config.steps), "--batch", str(config.batch)]
    found += ["--probe-epochs", str(config.probe_epochs)]
    for name in ("axis", "change"):
        for value in getattr(config, name):
            found += [f"--{name}", value]
    return found


def exit_code(argv: list[str]) -> int:
    """What the command line returns or leaves with."""
    try:
        return cli.run(argv)
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


def states(results: list[RunResult]) -> dict[str, str]:
    return {result.run: result.state for result in results}


def checkpoints(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("checkpoints/*")}


def test_a_study_ends_with_table_picture_and_means_and_is_not_done_twice(digits, tmp_path, capsys):
    config = config_of(digits, tmp_path)
    assert exit_code(flags(config)) == 0
    said = capsys.readouterr().out
    assert "temperature=0.1" in said and "kNN top-1" in said and "linear top-1" in said and "2 of 2" in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    arm = summary["arms"]["temperature=0.2"]
    assert arm["changes"] == {"objective.temperature": 0.2}
    assert len(arm["knn"]["values"]) == 2 and arm["knn"]["std"] is not None and 0 < arm["linear"]["mean"] < 1
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == [f"temperature={t}-seed{s}" for s in (0, 1) for t in ("0.1", "0.2")]
    for row in rows:
        own = json.loads((tmp_path / row["run"] / "config.json").read_text())
        assert own["seed"] == int(row["seed"]) and own["objective"]["temperature"] == float(row["arm"].split("=")[1])
        assert row["state"] == "done" and row["step"] == row["steps"] == "2" and float(row["knn"]) > 0
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    # Scores stand beside those of raw pixels and of the backbone before training, and arms beside the first one.
    assert "raw pixels" in said and "untrained" in said
    assert summary["untrained"]["knn"]["n"] == summary["pixels"]["linear"]["n"] == 2
    assert summary["pixels"]["knn"]["std"] == 0 < summary["pixels"]["knn"]["mean"]
    beside = arm["beside"]["temperature=0.1"]["knn"]
    firsts = summary["arms"]["temperature=0.1"]["knn"]
    assert beside["seeds"] == 2 and beside["mean"] == pytest.approx(arm["knn"]["mean"] - firsts["mean"])
    before, scored = checkpoints(tmp_path), (tmp_path / rows[0]["run"] / "evaluation/sweep.json").stat().st_mtime_ns
    assert exit_code(flags(config)) == 0
    assert checkpoints(tmp_path) == before
    assert (tmp_path / rows[0]["run"] / "evaluation/sweep.json").stat().st_mtime_ns == scored
    # Other scores of the same runs are taken without training again.
    results = sweep.sweep(replace(config, probe_epochs=0))
    assert all(set(result.scores) == {"knn"} for result in results) and checkpoints(tmp_path) == before
    with pytest.raises(InputError, match=r"seed0 was trained with other values of steps; choose another --out, or"):
        sweep.sweep(replace(config, steps=3))


def test_an_interrupted_study_goes_on_where_it_was(digits, tmp_path, monkeypatch):
    config = config_of(digits, tmp_path / "parts", steps=3, seeds=1)
    whole = sweep.sweep(replace(config, out=tmp_path / "whole"))
    step, taken = trainer.train_step, []

    def pressed(*arguments):
        taken.append(1)
        if len(taken) == 5:  # in the second run's second step
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", pressed)
    assert exit_code(flags(config)) == 130
    runs = [RunFolder(config.out / f"temperature={t}-seed0") for t in (0.1, 0.2)]
    assert [(run.read_state()["state"], run.read_state()["step"]) for run in runs] == [
        ("finished", 3),
        ("interrupted", 2),
    ]
    assert json.loads((config.out / "summary.json").read_text())["runs"][1]["state"] == "interrupted"
    results = sweep.sweep(config)
    assert len(taken) == 6  # one step was missing
    assert [result.scores for result in results] == [result.scores for result in whole]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(digits, tmp_path):
    config = config_of(digits, tmp_path, seeds=1, probe_epochs=0)
    sweep.sweep(config)
    run = RunFolder(tmp_path / "temperature=0.1-seed0")
    for path in run.checkpoints.iterdir():
        path.unlink()
    run.write_state("running", step=0, steps=2)
    assert set(states(sweep.sweep(config)).values()) == {"done"}
    assert checkpoint.entries(run.checkpoints)


def test_a_run_that_fails_is_named_and_the_others_go_on(digits, tmp_path, monkeypatch, capsys):
    config = config_of(digits, tmp_path, seeds=1, probe_epochs=0)
    step = trainer.train_step

    def breaks(training, *others):
        if training.config.objective.temperature == 0.1:
            raise torch.OutOfMemoryError("no memory")
        return step(training, *others)

    monkeypatch.setattr(trainer, "train_step", breaks)
    assert exit_code(flags(config)) == 1
    said = capsys.readouterr()
    reason = "run: out of memory (no memory); begin anew with a smaller --batch, a larger --accumulate or "
    reason += "--checkpoint-activations"
    assert f"temperature=0.1-seed0 failed: {reason}" in said.err
    assert "1 of 2 runs are done" in said.err and "0 of 1" in said.out and "1 of 1" in said.out
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [(row["state"], row["reason"]) for row in rows] == [("failed", reason), ("done", "")]
    monkeypatch.undo()
    assert set(states(sweep.sweep(config)).values()) == {"done"}  # once there is memory


def test_time_stops_training_with_a_checkpoint_and_says_that_more_is_to_be_done(digits, tmp_path, monkeypatch, capsys):
    config = config_of(digits, tmp_path, steps=100_000, seeds=1)
    monkeypatch.setattr(sweep, "process_began", lambda: now() - 538)  # 2 s before training is to stop
    assert exit_code([*flags(config), "--minutes", "10"]) == os.EX_TEMPFAIL
    state = RunFolder(tmp_path / "temperature=0.1-seed0").read_state()
    assert state["state"] == "interrupted" and state["step"] >= 1
    assert checkpoint.load_newest(tmp_path / "temperature=0.1-seed0" / "checkpoints")["step"] == state["step"]
    assert not (tmp_path / "temperature=0.2-seed0").exists()
    said = capsys.readouterr().err
    assert "0 of 2 runs are done, about" in said and "the same command goes on" in said


def test_time_gives_up_a_score_that_lasts_too_long(digits, tmp_path, monkeypatch):
    config = config_of(digits, tmp_path, seeds=1, minutes=0.1)
    monkeypatch.setattr(time_limit, "TO_STOP_S", 1.0)
    monkeypatch.setattr(time_limit, "TO_LEAVE_S", 0.5)
    monkeypatch.setattr(sweep, "process_began", now)
    monkeypatch.setattr(sweep, "score", lambda *_: signal.pause())
    assert set(states(sweep.sweep(config)).values()) == {"trained", "new"}


def test_training_that_listens_after_the_time_to_stop_is_told_all_the_same():
    told = threading.Event()
    with time_limit.time_limit(10, now() - 541) as limit:  # 1 s after training was to stop
        assert limit.over
        before = signal.signal(signal.SIGTERM, lambda *_: told.set())
        try:
            assert told.wait(5)
        finally:
            signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("minutes", "to_stop", "to_leave"), [(10, 60, 20), (60, 60, 20), (1, 30, 15), (0.1, 3, 1.5)])
def test_there_is_time_to_stop_and_to_leave_however_short_the_whole(minutes, to_stop, to_leave):
    """Without so much, a study of one minute ended 11 s late on a busy machine, and whoever waited killed it."""
    with time_limit.time_limit(minutes, began=now() - 60 * minutes + to_stop + 1) as limit:
        assert not limit.over and limit.to_stop == pytest.approx(now() + 1, abs=0.5)
    with pytest.raises(KeyboardInterrupt), time_limit.time_limit(minutes, now() - 60 * minutes + to_leave) as limit:
        assert limit.over
        threading.Event().wait(5)
    with time_limit.time_limit(minutes, began=now() - 60 * minutes + to_leave + 1):
        threading.Event().wait(0.3)


def test_a_process_that_a_script_runs_in_the_background_is_interrupted_too():
    """Its SIGINT is ignored, and is so again afterwards."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), time_limit.time_limit(10, now() - 600):
            threading.Event().wait(5)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_arms_and_another_process_s_run_are_left_alone(digits, tmp_path):
    config = config_of(digits, tmp_path, seeds=1, probe_epochs=0)
    assert exit_code([*flags(config), "--arms", "temperature=0.2"]) == 0  # and the table has all arms
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["new", "done"]
    with sweep.taken(tmp_path, "temperature=0.1-seed0") as free:
        assert free
        assert states(sweep.sweep(config)) == {"temperature=0.1-seed0": "new", "temperature=0.2-seed0": "done"}


def test_the_small_study_runs_all_its_arms(digits, tmp_path):
    shards = str(digits / "test")
    change = (*(c for c in TINY if "queue" not in c), "backbone.patch_size=8")
    config = SweepConfig("cifar10-study-small", shards, shards, tmp_path, change=change, seeds=1, steps=2, batch=16)
    results = sweep.sweep(replace(config, probe_epochs=1))
    assert [result.arm for result in results] == list(STUDIES["cifar10-study-small"].arms)
    assert {result.state for result in results} == {"done"}
    kept = json.loads((tmp_path / "synby-hard-target-seed0" / "config.json").read_text())
    assert kept["selection"]["encoder"] == "target" and kept["objective"]["negatives"]["mixing"] == 32
    with pytest.raises(InputError, match=r"steps, epochs: each arm of cost-small has a length of its own"):
        sweep.sweep(replace(config_of(digits, tmp_path), study="cost-small", axis=(), change=(), steps=3))
    with pytest.raises(InputError, match="arms: mocco unknown; this study has moby, synby, "):
        sweep.sweep(replace(config, arms=("mocco",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real": "nowhere"}, "nowhere"),
        ({"test": "nowhere"}, "nowhere"),
        ({"minutes": -1.0}, "minutes: -1 must be 0 or above"),
        ({"probe_epochs": -1}, "probe_epochs: -1 must be 0 or above"),
        ({"steps": -1}, "steps: -1 must be 0 or above"),
        (
            {"study": "simsiam-rn50", "axis": ("selection.encoder=online,target",), "change": ()},
            r"selection.encoder: target asked of an objective without a target encoder; take online \(arm encoder=tar",
        ),
        ({"axis": ("backbone.name=vit_foo",)}, r"backbone.name: timm has no model 'vit_foo'"),
        ({"axis": ("selection.resolution=9",)}, r"selection.resolution: crops of 9 pixels are not tiled"),
        (
            {"axis": ("selection.precision=fp8",)},
            r"selection.precision: 'fp8' is not known; choose one of same, auto",
        ),
    ],
)
def test_mistakes_are_said_before_the_first_run(changes, message, digits, tmp_path):
    with pytest.raises(InputError, match=message):
        sweep.sweep(config_of(digits, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_study_is_not_for_torchrun(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="not under torchrun; start it once per GPU"):
        sweep.sweep(config_of(digits, tmp_path / "out"))


def test_no_limit_sets_no_alarm_and_a_process_knows_when_it_began():
    with time_limit.time_limit(0, now()) as limit:
        assert not limit.over
    assert 0 < now() - process_began() < 86_400
