"""kill -9 at random moments of a build: nothing torn under a final name, nothing lost or doubled in the end."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_folders import build_at, contents, imagefolder

IMAGES, SHARD_SAMPLES = 32, 2
SHARDS = IMAGES // SHARD_SAMPLES
BUILD = """
import sys
from functools import partial
from pathlib import Path
from shards.build import build, plan
from shards.engines import run_tasks

run = partial(run_tasks, "local", workers=int(sys.argv[3]))
build(plan(sys.argv[1], Path(sys.argv[2]), run, shard_samples=int(sys.argv[4])), "real", run)
"""


def start(address: str, out: Path, workers: int) -> subprocess.Popen:
    arguments = [sys.executable, "-c", BUILD, address, str(out), str(workers), str(SHARD_SAMPLES)]
    return subprocess.Popen(arguments, start_new_session=True)


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_builds_go_on(tmp_path: Path, kills: int) -> None:
    images = f"imagefolder:{imagefolder(tmp_path / 'images', IMAGES)}"
    build_at(images, tmp_path / "whole", shard_samples=SHARD_SAMPLES)
    whole = contents(tmp_path / "whole")
    out = tmp_path / "out"
    draw = random.Random(kills)
    interrupted = done = 0
    for number in range(kills):
        build = start(images, out, workers=1 + number % 2)
        # At a random moment after a random shard, however fast or slow the machine is today.
        wanted = done + draw.randint(1, 4)
        while build.poll() is None and len(list(out.glob("*.arrow"))) < wanted:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        # The process alone, whose workers have to end by themselves, or all at once, as a power cut does.
        (os.kill if draw.random() < 0.5 else os.killpg)(build.pid, signal.SIGKILL)
        assert build.wait() in (0, -signal.SIGKILL)
        found = [path for path in out.glob("*") if path.name[0] != "."]
        for path in found:
            assert path.read_bytes() == whole[path.name], path.name
        done = sum(path.suffix == ".arrow" for path in found)
        interrupted += 0 < done < SHARDS
        if done > SHARDS - 5:
            assert start(images, out, 2).wait() == 0
            assert contents(out) == whole
            shutil.rmtree(out)
            done = 0
    assert interrupted
    assert start(images, out, 2).wait() == 0
    assert contents(out) == whole
