"""The training loop."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from jobs.run.config import PretrainConfig
from jobs.run.failure import TrainingFailedError
from jobs.run.folder import RunFolder
from jobs.run.process import collecting_by_hand
from jobs.run.terminal import Bar, console, progress, warn
from jobs.run.world import World
from jobs.training.ending import as_training_failure, record_failure
from jobs.training.opening import open_training
from jobs.training.state import Training, save
from jobs.training.step import train_step
from jobs.training.tracing import tracing
from jobs.training.verdict import Verdict
from shards.errors import InputError

# Ctrl-C, a job's end, a closed terminal, and what Slurm's users have it send before a time limit.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def train(
    config: PretrainConfig, folder: RunFolder, world: World, *, resume: bool = False, traced_steps: int = 0
) -> str:
    """Trains until the configured length or a signal; returns `finished` or `interrupted`. Of `traced_steps` steps the
    run's folder gets a trace.

    What is random in a step is a function of (seed, step, rank); order and views are functions of the position. So a
    run that goes on from a checkpoint computes what it would have computed without the interruption.

    Raises:
        InputError: what the configuration asks for cannot be had.
        TrainingFailedError: too many steps in a row were not finite, the disk is full, another rank is gone; the folder
            keeps the last good checkpoint.
    """
    before = written(folder)
    with ExitStack() as signals:  # are heard until all else is closed
        try:
            with as_training_failure(folder.path):
                return run(config, folder, world, signals, resume, traced_steps)
        except BaseException as error:
            # Before it has begun, a run that is not resumed has no state; there may be that of a run to be replaced.
            mistake = isinstance(error, InputError | KeyboardInterrupt)
            if written(folder) != before or (resume and not mistake):
                record_failure(folder, error)
            if world.size > 1:
                ignore_termination()
            raise


def written(folder: RunFolder) -> int | None:
    """When the state was recorded; None where none is."""
    return folder.state.stat().st_mtime_ns if folder.state.is_file() else None


def run(
    config: PretrainConfig, folder: RunFolder, world: World, signals: ExitStack, resume: bool, traced_steps: int
) -> str:
    """Opens everything, trains, closes everything but `signals`."""
    with ExitStack() as stack:
        t = open_training(config, folder, world, stack, resume)
        note_state(t, "running")  # a resumed run with the verdict it had
        trace = stack.enter_context(tracing(t, traced_steps))
        stop = signals.enter_context(stop_signals())
        bar = stack.enter_context(step_bar(t))
        if not resume:
            t.monitor.evaluate(t.step)
            save(t)
        stack.enter_context(collecting_by_hand())
        state = loop(t, stop, bar, trace)
        if t.saver is not None:
            t.saver.wait()
    note_state(t, state)
    return state


def loop(t: Training, stop: threading.Event, bar: Bar, trace: Callable[[], None]) -> str:
    """Steps until the end or a signal, with a checkpoint every so often and one at the end; `trace` hears of each."""
    epoch = int(t.step / t.length.steps_per_epoch)
    while t.step < t.length.steps:
        with t.timer.phase("data", host=True):
            batch = next(t.stream)
        result = train_step(t, batch, stop.is_set)
        with t.timer.phase("monitors", host=True):
            before = t.monitor.verdict
            t.monitor.after_step(t.step, batch, result)
        trace()
        if t.saver is not None:
            t.saver.surface()
        bar.advance(1, note=t.monitor.note)
        say_verdict(t, before)
        check_learning(t)
        if result.stopping or t.step % t.config.checkpoint.every == 0 or t.step == t.length.steps:
            save(t)
            note_state(t, "running")
            gc.collect()
        if epoch != (epoch := int(t.step / t.length.steps_per_epoch)):
            gc.collect()
        if result.stopping and t.step < t.length.steps:
            if t.world.leads:
                warn(f"stopped at step {t.step} of {t.length.steps}; a checkpoint is written, go on with --resume")
            return "interrupted"
    return "finished"


def say_verdict(t: Training, before: Verdict | None) -> None:
    """Shows and records the verdict where it has changed."""
    verdict = t.monitor.verdict
    if verdict is None or (before is not None and before.name == verdict.name):
        return
    if t.world.leads and verdict.name == "learning":
        console.print(f"step {t.step}: learning ({verdict.reason})", highlight=False)
    elif t.world.leads and verdict.name != "not-learning-yet":
        warn(f"step {t.step}: {verdict.name} ({verdict.reason}); {verdict.advice}")
    note_state(t, "running")


def check_learning(t: Training) -> None:
    """
    Raises:
        TrainingFailedError: the run has not learned within `monitor.stop_not_learning` steps.
    """
    limit, verdict = t.config.monitor.stop_not_learning, t.monitor.verdict
    if limit and t.step >= limit and verdict is not None and verdict.name != "learning":
        raise TrainingFailedError(
            f"monitor.stop_not_learning: {verdict.name} at step {t.step} ({verdict.reason}); {verdict.advice}"
        )


def note_state(t: Training, state: str) -> None:
    """Records how the run stands."""
    if t.world.leads:
        speed = t.monitor.images_per_second
        facts: dict[str, object] = {"step": t.step, "steps": t.length.steps, "images_per_second": speed}
        if (verdict := t.monitor.verdict) is not None:
            facts |= {f"verdict_{name}": getattr(verdict, name) for name in ("reason", "figures", "advice")}
            facts["verdict"] = verdict.name
        t.folder.write_state(state, **facts)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that STOPS set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def note(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # what is still to be said would fail on a terminal that is closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:
                os.dup2(nowhere, terminal)
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield stop
        return
    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)


def ignore_termination() -> None:
    """Ignores SIGTERM from now on: torchrun ends a job's processes as soon as one is gone, and the others still have
    to say why they end. Those that cannot, it kills after its --shutdown-timeout."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def step_bar(t: Training) -> Iterator[Bar]:
    """The progress bar of the leading rank; other ranks have none."""
    if t.world.leads:
        with progress("pretraining", t.length.steps, "steps", completed=t.step) as bar:
            yield bar
    else:
        yield Bar.silent()
