"""A trace of some steps: what host and device did when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs.run.terminal import note
from jobs.training.state import Training
from shards.errors import InputError

BEFORE = 5  # steps that are not traced: in them things are compiled and made once, and the profiler starts


@contextmanager
def tracing(t: Training, steps: int) -> Iterator[Callable[[], None]]:
    """What to call after every step, so that the leading rank's first `steps` steps after the fifth are traced. They go
    to `profile/` in the run's folder, in Chrome's format, which Perfetto and TensorBoard read.

    Raises:
        InputError: more steps than there will be.
    """
    left = t.length.steps - t.step
    if steps < 0 or (steps and steps + BEFORE > left):
        raise InputError(
            f"profile: {steps} steps after the first {BEFORE} are asked for, and {left} are left; "
            f"give at most {max(0, left - BEFORE)}, or 0 for none"
        )
    if not steps or not t.world.leads:
        yield lambda: None
        return
    from torch.profiler import profile, schedule  # takes a while to import

    first = t.step + BEFORE
    path = t.folder.path / "profile" / f"steps-{first}-{first + steps - 1}.pt.trace.json"

    def write(profiler: profile) -> None:
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        note(f"traced steps: {path}")

    with profile(
        schedule=schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1), on_trace_ready=write
    ) as profiler:
        yield profiler.step
