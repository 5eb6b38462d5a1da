"""The verdict on a run: known figures of runs that learned and that did not, and short runs that are judged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.pretrain import pretrain
from jobs.run.config import PretrainConfig
from jobs.run.failure import TrainingFailedError
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.training.verdict import Signs, judge

CHANCE = 2 * math.log(1 + 1024)


def signs(losses: list[float], spreads: list[float], chance: float | None = CHANCE) -> Signs:
    found = Signs()
    for loss in losses:
        found.take_loss(loss, chance)
    for spread in spreads:
        found.take_health(spread, 5.0)
    return found


@pytest.mark.parametrize(
    ("losses", "spreads", "chance", "step", "name"),
    [
        # Digits under views far too strong for them: loss 13.6 to 13.95 beside 13.87, nearly one vector.
        ([13.6, 13.95], [-0.07, -0.15], CHANCE, 240, "not-learning"),
        ([13.6, 13.95], [-0.07, -0.15], CHANCE, 60, "not-learning-yet"),
        # The same with views that suit: random pairs, hardest of 4.
        ([13.6, 11.3], [-0.07, -2.3], CHANCE, 240, "learning"),
        ([13.6, 12.8], [-0.07, -0.9], CHANCE, 240, "learning"),
        # A queue of random rows makes the first losses low.
        ([12.4], [-0.05], CHANCE, 10, "not-learning-yet"),
        ([12.4], [], CHANCE, 10, "not-learning-yet"),
        ([12.0, 3.0], [-1.2, -0.001], CHANCE, 100, "collapsed"),
        ([13.0, 13.5], [-0.001], CHANCE, 200, "collapsed"),
        ([13.0, 13.5], [-0.001], CHANCE, 20, "not-learning-yet"),  # an untrained backbone may begin so
        ([13.0, 20.0], [-0.5], CHANCE, 20, "diverging"),
        ([13.0, math.nan], [-0.5], CHANCE, 20, "diverging"),
        # Without a chance level.
        ([3.5, 1.0], [-0.8], None, 240, "learning"),
        ([3.5, 3.49], [-0.8], None, 240, "not-learning"),
        ([3.5, 0.01], [-0.8, -0.001], None, 100, "collapsed"),
    ],
)
def test_verdicts(losses: list[float], spreads: list[float], chance: float | None, step: int, name: str) -> None:
    verdict = judge(signs(losses, spreads, chance), step, 240)
    assert verdict.name == name
    assert f"loss {losses[-1]:.2f}" in verdict.reason and all(math.isfinite(v) for v in verdict.figures.values())
    assert bool(verdict.advice) == (name != "learning")


def test_patience_is_half_of_the_run_and_at_most_2000_steps() -> None:
    names = [judge(signs([13.6], [-0.1]), step, steps).name for step, steps in ((119, 240), (120, 240), (2000, 10**6))]
    assert names == ["not-learning-yet", "not-learning", "not-learning"]


def test_a_run_that_is_worse_than_its_starting_weights_forgets() -> None:
    for last, step, name in ((0.5, 240, "forgetting"), (0.5, 60, "learning"), (0.79, 240, "learning")):
        found = signs([13.6, 11.3], [-0.07, -2.3])
        found.take_knn(0.8)
        found.take_knn(last)
        verdict = judge(found, step, 240)
        assert verdict.name == name and f"kNN {last:.1%} (80.0% by the starting weights)" in verdict.reason


def test_signs_survive_a_checkpoint() -> None:
    one, other = signs([13.6, 12.8], [-0.1, -0.9]), Signs()
    one.take_knn(0.8)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other == one


def judged(tiny: PretrainConfig, steps: int, **monitor: object) -> PretrainConfig:
    return replace(tiny, steps=steps, monitor=replace(tiny.monitor, every=1, health_every=1, **monitor))


def test_a_run_records_its_verdict(tiny: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(judged(tiny, 6), tmp_path / "run")
    state = RunFolder(tmp_path / "run").read_state()
    assert state["state"] == "finished" and state["verdict"] in ("learning", "not-learning", "collapsed")
    assert "uniformity" in state["verdict_reason"] and state["verdict_figures"]["chance"] == 2 * math.log(1 + 50)
    assert state["verdict"] in capsys.readouterr().err
    pretrain(judged(tiny, 6), tmp_path / "run", resume=True)  # a finished run keeps it
    assert RunFolder(tmp_path / "run").read_state()["verdict_figures"] == state["verdict_figures"]
    lines = [line for line in read_metrics(RunFolder(tmp_path / "run").metrics) if "train/loss" in line]
    assert all(line["train/loss_real"] < line["train/loss"] for line in lines)  # fewer negatives


def test_a_rate_far_too_high_is_not_learning(tiny: PretrainConfig, tmp_path: Path) -> None:
    config = judged(tiny, 6)
    pretrain(replace(config, optimizer=replace(config.optimizer, lr=100.0, warmup_epochs=0)), tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_state()["verdict"] in ("not-learning", "collapsed", "diverging")


def test_a_run_that_does_not_learn_is_ended_where_that_is_asked(tiny: PretrainConfig, tmp_path: Path) -> None:
    config = judged(tiny, 6, stop_not_learning=2)
    still = replace(config, optimizer=replace(config.optimizer, lr=1e-12))
    with pytest.raises(TrainingFailedError, match=r"monitor.stop_not_learning: not-learning-yet at step 2 \(loss"):
        pretrain(still, tmp_path / "run")
    state = RunFolder(tmp_path / "run").read_state()
    assert state["state"] == "failed" and state["step"] < 6 and "stop_not_learning" in state["reason"]
