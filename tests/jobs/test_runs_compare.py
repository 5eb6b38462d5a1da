"""`hardviews runs` lists what lies below a folder; `hardviews compare` puts runs side by side."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from jobs import cli
from jobs.compare import compare, draw, summary
from jobs.reporting.compare import comparison
from jobs.reporting.rundata import read_run
from jobs.runs import RunState, ago, find_runs, last_values, list_runs
from shards.errors import InputError

NAN = float("nan")


def make_run(
    folder: Path, lines: list[dict[str, float]], state: dict | None = None, config: dict | None = None
) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"optimizer": {"lr": 0.1}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state is not None:
        (folder / "state.json").write_text(json.dumps(state))
    return folder


def line(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "time": 0.0, **{name.replace("_", "/", 1): value for name, value in values.items()}}


def age(folder: Path, seconds: float) -> None:
    """Makes a run's files look old."""
    then = time.time() - seconds
    for path in folder.iterdir():
        os.utime(path, (then, then))


def by_name(states: list[RunState]) -> dict[str, RunState]:
    return {state.run: state for state in states}


def test_runs_are_found_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path / "one", [])
    make_run(tmp_path / "study" / "lr=1" / "seed=0", [])
    (tmp_path / "one" / "export" / "model").mkdir(parents=True)
    (tmp_path / "one" / "export" / "model" / "config.json").write_text("{}")
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / "config.json").write_text("{}")
    found = sorted(str(run.path.relative_to(tmp_path)) for run in find_runs(tmp_path))
    assert found == ["one", "study/lr=1/seed=0"]
    assert [state.run for state in list_runs(tmp_path / "one", ())] == ["one"]


def test_states_steps_and_metrics(tmp_path: Path) -> None:
    lines = [line(10, train_loss=9.0, knn_top1=0.5), line(20, train_loss=8.0, train_images_per_second=70.0)]
    running = {"state": "running", "step": 10, "steps": 50, "updated": time.time()}
    make_run(tmp_path / "now", [*lines, line(30, train_loss=NAN)], running)
    ended = {"state": "finished", "step": 20, "steps": 20, "updated": 5.0, "images_per_second": 99.0}
    age(make_run(tmp_path / "done", [], ended), 1000)
    age(make_run(tmp_path / "killed", [], {"state": "running", "updated": 1.0, "images_per_second": None}), 2000)
    age(make_run(tmp_path / "new", []), 3000)
    states = list_runs(tmp_path, ["train/loss", "knn/top1"])
    assert [state.run for state in states] == ["now", "done", "killed", "new"]
    named = by_name(states)
    assert (named["now"].state, named["now"].step, named["now"].steps) == ("running", 30, 50)
    assert named["now"].metrics == {"train/loss": 8.0, "knn/top1": 0.5}
    assert named["now"].images_per_second == 70.0
    assert (named["done"].state, named["done"].images_per_second) == ("finished", 99.0)
    assert named["killed"].state == "silent"
    assert (named["new"].state, named["new"].step, named["new"].steps) == ("unknown", 0, None)


def test_last_values_skip_torn_lines_and_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5, "b": 2}\n{"step": 2, "a": NaN}\n{"step": 3, "a": 7')
    assert last_values(path, ["a", "b", "c"]) == {"step": 2, "a": 1.5, "b": 2}
    assert last_values(tmp_path / "absent", ["a"]) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (7200, "2 h"), (90_000, "25 h"), (260_000, "3 days")],
)
def test_spans(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_the_list_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "one", [line(4, train_loss=2.5)], {"state": "interrupted", "step": 4, "steps": 9})
    assert cli.run(["runs", str(tmp_path), "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert (only["run"], only["state"], only["step"], only["metrics"]) == ("one", "interrupted", 4, {"train/loss": 2.5})
    assert cli.run(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "interrupted" in out
    assert "4 / 9" in out
    reason = "run: another process of this job is gone [1]; the first one to fail says why"
    make_run(tmp_path / "two", [], {"state": "failed", "step": 3, "reason": reason})
    assert cli.run(["runs", str(tmp_path)]) == 0
    assert f"two: {reason}\n" in capsys.readouterr().out
    assert cli.run(["runs", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.run(["runs", str(tmp_path / "empty")]) == 2
    assert "hardviews pretrain" in capsys.readouterr().err


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    first = [line(step, train_loss=9 - step / 10, knn_top1=0.4 + step / 100) for step in (0, 10, 20)]
    second = [line(0, train_loss=9.0), line(10, train_loss=5.0), line(20, train_loss=6.0), line(30, train_loss=NAN)]
    config = {"optimizer": {"lr": 0.2}, "run": str(tmp_path / "b")}
    make_run(tmp_path / "a", first, config={"optimizer": {"lr": 0.1}, "run": str(tmp_path / "a")})
    make_run(tmp_path / "b", second, config=config)
    scores = {"kind": "knn", "model": {"source": "run", "which": "last", "step": 20}, "scores": {"top1": 0.61}}
    (tmp_path / "b" / "evaluation").mkdir()
    (tmp_path / "b" / "evaluation" / "knn.json").write_text(json.dumps(scores))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_numbers_side_by_side(pair: list[str]) -> None:
    content = compare(pair)
    assert content["runs"] == ["a", "b"]
    assert content["metrics"]["train/loss"][1] == {"last": 6.0, "best": 5.0, "best_step": 10}
    assert content["metrics"]["knn/top1"][0] == pytest.approx({"last": 0.6, "best": 0.6, "best_step": 20})
    assert content["metrics"]["knn/top1"][1] is None
    assert list(content["metrics"]) == ["train/loss", "knn/top1"]
    assert content["scores"] == {"Evaluated kNN": [None, 0.61]}
    assert content["settings"] == {"optimizer.lr": [0.1, 0.2]}


def test_two_arms_are_compared_over_their_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {("random", 0): 0.5, ("random", 1): 0.6, ("hard", 0): 0.7, ("hard", 1): 0.75, ("hard", 2): 0.1}
    paths = []
    for (rule, seed), knn in values.items():
        config = {"selection": {"rule": rule}, "seed": seed, "run": f"{rule}{seed}"}
        paths.append(str(make_run(tmp_path / f"{rule}{seed}", [line(1, knn_top1=knn)], config=config)))
    found = compare(paths)["differences"]["kNN"]
    assert found["mean"] == pytest.approx(0.175) and found["seeds"] == 2
    assert found["high"] - found["mean"] == pytest.approx(12.706 * 0.025, rel=1e-3)  # t of one degree of freedom
    assert cli.run(["compare", *paths, "--out", str(tmp_path / "curves.png")]) == 0
    assert "+17.5 (-14.3 to +49.3, 2 seeds)" in capsys.readouterr().out
    assert "+17.5 (-14.3 to +49.3, 2 seeds)" in comparison([read_run(Path(path)) for path in paths])
    assert compare(paths[:2])["differences"] == {} == compare([paths[0], paths[4]])["differences"]


def test_the_best_of_an_accuracy_is_the_highest(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [line(1, knn_top1=0.3), line(2, knn_top1=0.9), line(3, knn_top1=0.5)]))
    assert summary(run, "knn/top1") == {"last": 0.5, "best": 0.9, "best_step": 2}


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = [str(make_run(tmp_path / place / "run", [])) for place in ("x", "y")]
    assert compare(paths)["runs"] == ["x/run", "y/run"]


def test_the_picture_has_a_chart_per_metric(pair: list[str], tmp_path: Path) -> None:
    draw(pair, ["a", "b"], ["train/loss"], tmp_path / "one.png")
    draw(pair, ["a", "b"], ["train/loss", "knn/top1", "train/loss"], tmp_path / "three.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "three.png") as three:
        assert (three.width, three.height) == (2 * one.width, 2 * one.height)
        assert len(one.convert("RGB").getcolors(1 << 20) or []) > 20
    with pytest.raises(InputError, match=r"out: .* cannot be written"):
        draw(pair, ["a", "b"], ["train/loss"], tmp_path / "picture.nothing")


def test_compare_on_the_command_line(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "deep" / "curves.png"
    assert cli.run(["compare", *pair, "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "61.0%" in out
    assert "optimizer.lr" in out
    assert picture.is_file()
    assert cli.run(["compare", *pair, "--json", "--metrics", "knn/top1", "--out", str(picture)]) == 0
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == ["knn/top1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--metrics", "knn/top9"],
            "metrics: knn/top9 was logged by none of the runs; known ones: train/loss, knn/top1",
        ),
        (["/nowhere"], "/nowhere is no run folder"),
    ],
)
def test_mistakes_in_a_comparison(
    more: list[str], message: str, pair: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", *pair, *more]) == 2
    assert message in capsys.readouterr().err


def test_one_run_is_too_few(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", pair[0]]) == 2
    assert "two run folders or more" in capsys.readouterr().err
