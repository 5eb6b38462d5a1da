"""Where tasks run: in processes of this machine, or on a Ray cluster.

The same function and the same tasks, finished in any order by any number of workers.
"""

import itertools
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from shards.errors import InputError, install_extra

Engine = Literal["local", "ray"]
Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks submitted per worker: a running one and the next


def run_tasks(
    engine: Engine,
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int | None = None,
    address: str | None = None,
    gpus_per_task: float = 0,
) -> Iterator[Result]:
    """Yields `function(task)` of every task as they finish.

    Args:
        engine: "local" processes or "ray" core tasks.
        function: at module level; run again for a task whose worker machine is lost, so it has to be idempotent.
        tasks: picklable, small.
        workers: tasks at a time; by default one per core, on Ray as many as its cores (or GPUs) allow.
        address: of the Ray cluster; None starts one on this machine.
        gpus_per_task: GPUs that Ray sets aside for each task.

    Raises:
        InputError: Ray asked for but not installed or not reachable; a worker process killed from outside.
        Exception: what `function` raises; no further task is started then.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: at least 1 is needed")
    if engine == "ray":
        yield from _run_on_ray(function, tasks, workers, address, gpus_per_task)
        return
    if address is not None:
        raise InputError(f"--address {address}: the local engine has none; pass --engine ray too")
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
    else:
        yield from _run_in_processes(function, tasks, workers)


def _run_in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    # Fresh processes rather than forks: this one may hold threads (progress bar, Arrow) in any state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        queue = iter(tasks)
        pending = {pool.submit(function, task) for task in itertools.islice(queue, AHEAD * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(function, task) for task in itertools.islice(queue, len(done))}
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        remedy = "run it again with fewer --workers, it goes on where it stopped"
        raise InputError(f"--workers {workers}: a worker process was killed (out of memory?); {remedy}") from error
    except BaseException:
        # Ctrl-C or a failed task. Tasks may be killed anywhere, so nobody has to wait for those that run.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; a worker whose parent was killed ends at once instead of writing on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_on_ray(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int | None, address: str | None, gpus: float
) -> Iterator[Result]:
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError as error:
        raise InputError(f"--engine ray: ray is not installed; {install_extra('ray')}") from error
    started = not ray.is_initialized()
    if started:
        try:
            knock(address)
            ray.init(address or "local", log_to_driver=False, include_dashboard=None if address else False)
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"--address {address}: no Ray cluster answers ({first}); start one with `ray start`"
            ) from error
    try:
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(function)
        limit = workers or AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        queue = iter(tasks)
        pending = [remote.remote(task) for task in itertools.islice(queue, limit)]
        while pending:
            done, pending = ray.wait(pending)
            pending += [remote.remote(task) for task in itertools.islice(queue, len(done))]
            for one in done:
                try:
                    yield ray.get(one)
                except RayTaskError as error:
                    raise error.cause from error
    finally:
        if started:
            ray.shutdown()


def knock(address: str | None) -> None:
    """Raises OSError where nobody listens at [ray://]HOST:PORT: Ray itself would wait for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
