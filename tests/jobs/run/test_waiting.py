import pytest

from jobs.run.waiting import SPINS, wait_briefly


def test_threads_spin_briefly_unless_told_otherwise() -> None:
    environment = {"PATH": "/bin"}
    wait_briefly(environment)
    assert environment == {"PATH": "/bin", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("told", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "0"}])
def test_what_the_environment_says_of_waiting_holds(told: dict[str, str]) -> None:
    environment = dict(told)
    wait_briefly(environment)
    assert environment == told
