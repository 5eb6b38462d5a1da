"""This process among all: rank, world size, device. One process without torchrun is a world of one."""

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from jobs.run import heartbeat
from shards.errors import InputError


@dataclass(frozen=True)
class World:
    """rank: 0 to size − 1 over all nodes; device: where this rank trains."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Rank 0 writes checkpoints, metrics and everything else that exists once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, on every rank."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is cuda where there is one, else cpu.

    Raises:
        InputError: for a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: {name} is unknown; take auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no CUDA device; take cpu or auto")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device("cpu")


@contextmanager
def open_world(
    device: str = "auto", timeout_s: float = 3600, last_words: Callable[[str], None] | None = None
) -> Iterator[World]:
    """Joins the process group that torchrun's environment describes: NCCL on GPUs, gloo on CPUs.

    Collectives wait up to `timeout_s` seconds, as long as an evaluation on the leading rank may take; a rank that is
    gone is noticed long before, by its broken connection or by its missing heartbeat. Where a missing heartbeat ends
    this process, `last_words` is called with the reason.

    Raises:
        InputError: the environment names several processes, but not which of them this is or where they meet.
    """
    size, rank, local_rank = number_of("WORLD_SIZE", 1), number_of("RANK", 0), number_of("LOCAL_RANK", 0)
    if size > 1:
        check_environment(size, rank)
    place = pick_device(device, local_rank if size > 1 else 0)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=place if place.type == "cuda" else None,
    )
    alive = heartbeat.connect(rank, size, partial(give_up, last_words))
    try:
        yield World(rank, size, place)
        alive.close()
        dist.barrier()  # rank 0 may hold the store, so nobody leaves before all have stopped beating
    finally:
        alive.close()
        dist.destroy_process_group()


def number_of(name: str, least: int) -> int:
    """A number from the environment; `least` where it is not there.

    Raises:
        InputError: it is something else.
    """
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}: {text!r} in the environment is no number of processes; unset it, or use torchrun")
    return int(text)


def check_environment(size: int, rank: int) -> None:
    """Job managers set WORLD_SIZE too; by itself it starts no processes.

    Raises:
        InputError: what else torchrun sets is not there, or the rank is none of them.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or rank >= size:
        why = f"{', '.join(missing)} not" if missing else f"RANK {rank}"
        raise InputError(
            f"WORLD_SIZE: {size} processes, but {why}, in the environment; start with torchrun, or unset WORLD_SIZE"
        )


def give_up(last_words: Callable[[str], None] | None, reason: str) -> None:
    """Ends this process, whose main thread waits in a collective for a rank that will not come."""
    reason = f"run: {reason}; the job ends here, go on with --resume"
    print(f"hardviews: {reason}", file=sys.stderr, flush=True)
    if last_words is not None:
        last_words(reason)
    os._exit(1)
