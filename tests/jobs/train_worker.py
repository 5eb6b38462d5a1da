"""Trains in a process of its own, which the tests kill: config.json, run folder, new or resume.

Under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT it is one rank. Further runs follow in the same process, three
arguments each, and meet at the next port of PORTS; `new:K` stops the run after K steps by a signal to the last rank.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from jobs.pretrain import pretrain
from jobs.run.config import load_config
from jobs.training import loop as trainer


def stop_after(steps: int) -> None:
    """The last rank gets SIGTERM in its step number `steps`."""
    step = trainer.train_step

    def stopping_step(t, *others):
        if t.step + 1 == steps and t.world.rank == t.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            trainer.train_step = step
        return step(t, *others)

    trainer.train_step = stopping_step


def main() -> None:
    warnings.simplefilter("error")  # as under pytest
    torch.set_num_threads(1)
    for number in range(1, len(sys.argv), 3):
        config, run, how = sys.argv[number : number + 3]
        if "PORTS" in os.environ:
            os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[number // 3]
        if how.startswith("new:"):
            stop_after(int(how.removeprefix("new:")))
        overwrite = how == "new" and (Path(run) / "config.json").is_file()
        pretrain(load_config(Path(config)), Path(run), resume=how == "resume", overwrite=overwrite)


if __name__ == "__main__":
    main()
