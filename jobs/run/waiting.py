"""How idle OpenMP threads wait; to be set before torch is imported."""

from collections.abc import MutableMapping

# Some 10 µs, then sleep. On shared cores threads that spin for long made a training step 4 to 8 times slower; threads
# that sleep at once, a fifth slower even where the cores are free, and short operations three times.
SPINS = "10000"


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Tells GNU's OpenMP, which torch's Linux wheels carry, to spin briefly; others (which know only the policy) not at
    all. Where the environment says either itself, nothing changes."""
    if "OMP_WAIT_POLICY" not in environment and "GOMP_SPINCOUNT" not in environment:
        environment.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=SPINS)
