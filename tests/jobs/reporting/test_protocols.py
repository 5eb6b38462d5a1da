"""Scores of equal protocols stand side by side, others in rows of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, protocol

from jobs.compare import compare
from jobs.reporting.protocols import described, own_scores, side_by_side
from jobs.reporting.rundata import RunData, read_run, told_apart


def run_with(path: Path, *scores: tuple[str, float, int, dict[str, Any]]) -> RunData:
    """A run with evaluations: kind, top-1, step, protocol."""
    make_run(path, lines=2)
    for file in (path / "evaluation").iterdir():
        file.unlink()
    for number, (kind, top1, step, own) in enumerate(scores):
        model = {"source": "run", "name": path.name, "step": step, "which": own.pop("which", "online")}
        content = {"kind": kind, "model": model, "scores": {"top1": top1}, **({"protocol": own} if own else {})}
        (path / "evaluation" / f"{number}.json").write_text(json.dumps(content))
    return read_run(path)


def shown(*runs: RunData) -> dict[str, list[float | None]]:
    return {name: [score and score.top1 for score in row] for name, row in side_by_side(runs).items()}


def test_a_few_shot_score_never_stands_beside_one_with_all_labels(tmp_path: Path) -> None:
    one = run_with(
        tmp_path / "one", ("knn", 0.3, 4, protocol("knn", shots=1)), ("knn", 0.6, 4, protocol("knn")),
        ("linear", 0.7, 4, protocol("linear")),
    )  # fmt: skip
    two = run_with(tmp_path / "two", ("knn", 0.5, 9, protocol("knn")), ("knn", 0.4, 9, protocol("knn", labels=0.1)))
    assert shown(one, two) == {
        "Evaluated kNN (labels 100 %, shots 1)": [0.3, None],
        "Evaluated kNN (labels 100 %, shots 0)": [0.6, 0.5],
        "Evaluated kNN (labels 10 %, shots 0)": [None, 0.4],
        "Linear probe": [0.7, None],
    }
    assert compare([str(one.path), str(two.path)])["scores"] == shown(one, two)


def test_the_newest_step_of_a_protocol_counts(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", ("knn", 0.7, 20, protocol("knn")), ("knn", 0.6, 10, protocol("knn")))
    (score,) = own_scores(run)
    assert (score.top1, score.step) == (0.7, 20)


@pytest.mark.parametrize(
    ("change", "first", "second"),
    [
        ({"k": [1, 5]}, "k 10 20", "k 1 5"),
        ({"temperature": 0.2}, "temperature 0.07", "temperature 0.2"),
        ({"which": "target"}, "encoder online", "encoder target"),
        ({"crop": 0.875}, "crop 1", "crop 0.875"),
        ({"test": {"name": "dogs", "images": 8, "fingerprint": "d"}}, "test cats/test", "test dogs"),
        ({"test": {"name": "cats/test", "images": 8, "fingerprint": "other-images"}}, "test test0123", "test other-im"),
    ],
)
def test_whatever_sets_protocols_apart_is_their_label(
    tmp_path: Path, change: dict[str, Any], first: str, second: str
) -> None:
    one = run_with(tmp_path / "one", ("knn", 0.6, 4, protocol("knn")))
    two = run_with(tmp_path / "two", ("knn", 0.5, 4, protocol("knn", **change)))
    assert shown(one, two) == {f"Evaluated kNN ({first})": [0.6, None], f"Evaluated kNN ({second})": [None, 0.5]}


def test_scores_without_a_protocol_equal_no_others(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, ("knn", 0.5, 4, {})) for name in ("one", "two")]
    assert [*shown(*runs).values()] == [[0.5, None], [None, 0.5]]
    assert "not recorded" in next(iter(shown(*runs)))


def test_a_protocol_in_words() -> None:
    said = described(protocol("knn", augment=True, mean=[0.5], std=[0.2]))
    expected = "size 32, crop 1, pool default, labels 100 %, shots 0, seeds 1, k 10 20, temperature 0.07, augment True"
    assert said == expected


def test_runs_of_one_folder_name_are_told_apart_by_the_folders_above(tmp_path: Path) -> None:
    places = ("a/x/run", "b/x/run", "b/other", "b/y/run")
    runs = told_apart([read_run(make_run(tmp_path / place, lines=2)) for place in places])
    assert [run.name for run in runs] == ["a/x/run", "b/x/run", "other", "y/run"]
    assert [run.name for run in told_apart(runs[:1] * 2)] == ["run", "run"]
