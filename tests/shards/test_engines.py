"""Engines: what they refuse, and what becomes of workers whose work fails."""

import os

import pytest

from shards.engines import run_tasks
from shards.errors import InputError
from shards.sources.tars import parse_label


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_runs_once(workers: int) -> None:
    tasks = [b"%d" % number for number in range(20)]
    assert sorted(run_tasks("local", parse_label, tasks, workers=workers)) == list(range(20))


def test_an_exception_of_a_task_is_raised() -> None:
    with pytest.raises(AttributeError, match="strip"):
        list(run_tasks("local", parse_label, [None, None], workers=2))


def test_a_killed_worker_is_named_with_a_remedy() -> None:
    with pytest.raises(InputError, match=r"a worker process was killed .* fewer --workers"):
        list(run_tasks("local", os._exit, [1, 1], workers=2))


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("local", {"workers": 0}, "--workers 0: at least 1"),
        ("local", {"address": "10.0.0.1:6379"}, "--address .* pass --engine ray"),
        ("ray", {"address": "127.0.0.1:9"}, "--address 127.0.0.1:9: no Ray cluster answers"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # Ray's own, on import
def test_what_is_refused(engine, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(run_tasks(engine, parse_label, [b"1"], **options))
