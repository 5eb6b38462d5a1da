import os
import subprocess
import sys

import pytest

from jobs.run.process import SPINS, wait_briefly

# Page faults of the last of eight rounds that take and free two strings of 40 MB, which glibc maps by default.
ROUNDS = """
import resource, sys
from jobs.run.process import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [b"x" * (40 << 20) for _ in range(2)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def rounds(way: str, **environment: str) -> list[str]:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", ROUNDS, way], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_cleared_again():
    told, faults = rounds("keep")
    assert told == "True" and int(faults) < 1000
    assert int(rounds("default")[1]) > 10_000  # 80 MB are 20,480 pages


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_the_environment_says_of_the_allocator_holds():
    assert rounds("keep", MALLOC_MMAP_MAX_="65536")[0] == "False"


def test_threads_spin_briefly_unless_told_otherwise() -> None:
    environment = {"PATH": "/bin"}
    wait_briefly(environment)
    assert environment == {"PATH": "/bin", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("told", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "0"}])
def test_what_the_environment_says_of_waiting_holds(told: dict[str, str]) -> None:
    environment = dict(told)
    wait_briefly(environment)
    assert environment == told
