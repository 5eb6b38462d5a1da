"""Which process this is, by the environment that torchrun and job managers leave."""

import re

import pytest

from jobs.run.world import open_world
from shards.errors import InputError


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"RANK": "3", "LOCAL_RANK": "3"}])
def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open_world("cpu") as world:
        assert (world.rank, world.size, world.leads) == (0, 1, True)


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' in the environment"),
        ({"RANK": "first"}, "RANK: 'first' in the environment"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 processes, but RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE: 2 processes, but MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "WORLD_SIZE: 2 processes, but RANK 2"),
    ],
)
def test_half_of_torchrun_s_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"), open_world("cpu"):
        pass
