"""Ranks of a world as processes of this machine."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def launch(script: Path, folder: Path, world: int) -> list[Any]:
    """What the ranks of `script RANK WORLD FOLDER` left in FOLDER/RANK.pt. The first to fail ends the others."""
    processes = []
    try:
        for rank in range(world):
            with (folder / f"{rank}.txt").open("w") as said:
                command = [sys.executable, str(script), str(rank), str(world), str(folder)]
                processes.append(subprocess.Popen(command, stderr=said))
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        assert process.returncode in (0, -9), (folder / f"{rank}.txt").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
