"""What tests of pretraining look at in a run folder, and how they train in other processes."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from jobs.log.writer import open_log
from jobs.run import checkpoint
from jobs.run.folder import RunFolder

WORKER = str(Path(__file__).with_name("train_worker.py"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors."""
    content = checkpoint.load_newest(RunFolder(run).checkpoints)
    return {name: value for name, value in content["objective"].items() if torch.is_tensor(value)}


def rows(run: Path) -> dict[str, np.ndarray]:
    """All log rows in the order of positions."""
    parts = list(open_log(RunFolder(run).log).chunks(1000))
    found = {}
    for name in ("position_B", "step_B", "sample_B", "source_B", "epoch_B", "loss_BP", "choice_B", "at_random_B"):
        found[name] = np.concatenate([getattr(part, name) for part in parts])
    found["blur"] = np.concatenate([part.params.blur for part in parts])
    found["top"] = np.concatenate([part.params.top for part in parts])
    return found


def same_run(first: Path, second: Path) -> None:
    """The same weights and log, to the bit."""
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one), [n for n in one if not torch.equal(one[n], two[n])]
    same_rows(first, second)


def same_rows(first: Path, second: Path, exact: bool = True) -> None:
    """The same rows at the same positions; where not `exact`, losses to float tolerance and choices left out."""
    one, two = rows(first), rows(second)
    for name in one:
        if exact or name not in ("loss_BP", "choice_B"):
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    np.testing.assert_allclose(one["loss_BP"], two["loss_BP"], rtol=2e-3)
    np.testing.assert_array_equal(one["position_B"], np.arange(len(one["position_B"])))


def torchrun(*arguments: str) -> list[str]:
    """Two ranks of the worker under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, *arguments]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """A process group of its own, its output piped."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def two_ranks(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two ranks of the worker."""
    return ranks(2, *arguments)


def ranks(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Ranks of the worker without torchrun, which starts faster."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(0, len(arguments), 3)]
        for free in taken:
            free.bind(("127.0.0.1", 0))
        ports = " ".join(str(free.getsockname()[1]) for free in taken)
    world = str(size)
    meet = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "PORTS": ports, "LOCAL_WORLD_SIZE": world}
    return [start([sys.executable, WORKER, *arguments], RANK=str(rank), **meet) for rank in range(size)]


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> None:
    """Waits until all have ended well; where one fails or time is up, ends the others too and tells what was said."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
    said = [process.communicate()[0][-2000:] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
