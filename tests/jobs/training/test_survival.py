"""Runs that survive: kills, signals, damaged checkpoints, full disks, lost ranks, other world sizes."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_of_training import WORKER, finish, ranks, rows, same_rows, same_run, start, torchrun, two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import cli
from jobs.pretrain import pretrain
from jobs.run import checkpoint
from jobs.run.config import PretrainConfig, save_config
from jobs.run.failure import RankLostError, TrainingFailedError
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.training import loop as trainer
from jobs.training.ending import as_training_failure, record_failure
from shards.errors import InputError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the worker: sums depend on how they are split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_step(monkeypatch: pytest.MonkeyPatch, number: int, action) -> None:
    """Does something in a step, before anything else."""
    step = trainer.train_step

    def watched(t, *others):
        if t.step + 1 == number:
            action()
        return step(t, *others)

    monkeypatch.setattr(trainer, "train_step", watched)


def stop_at(config: PretrainConfig, run: Path, number: int) -> None:
    """A run that a signal interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert pretrain(config, run) == "interrupted"


def test_a_signal_writes_a_checkpoint_and_resume_is_exact(tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(tiny, tmp_path / "whole")
    stop_at(tiny, tmp_path / "parts", 1)
    state = RunFolder(tmp_path / "parts").read_state()
    assert (state["state"], state["step"], state["steps"]) == ("interrupted", 1, 6)
    assert pretrain(tiny, tmp_path / "parts", resume=True) == "finished"
    same_run(tmp_path / "whole", tmp_path / "parts")
    for line in ("train/loss", "health/rankme"):
        steps = [entry["step"] for entry in read_metrics(tmp_path / "parts" / "metrics.jsonl") if line in entry]
        assert steps == sorted(set(steps)) and steps[-1] == 6
    curves = [entry["step"] for entry in read_metrics(tmp_path / "parts" / "curves.jsonl")]
    assert curves == [3, 6]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_closed_terminal_and_a_warning_of_the_job_manager_stop_behind_a_checkpoint(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the tests' own process ignores SIGHUP
    in_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    try:
        assert pretrain(tiny, tmp_path / "run") == "interrupted"
    finally:
        signal.signal(number, before)
    assert checkpoint.load_newest(RunFolder(tmp_path / "run").checkpoints)["step"] == 3


@pytest.mark.slow
def test_what_is_said_to_a_terminal_that_is_closed_fails_no_run(tiny: PretrainConfig, tmp_path: Path) -> None:
    save_config(replace(tiny, steps=100_000), tmp_path / "config.json")
    folder = RunFolder(tmp_path / "run")
    mine, its = pty.openpty()
    command = [sys.executable, WORKER, str(tmp_path / "config.json"), str(folder.path), "new"]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    try:
        while process.poll() is None and folder.read_state().get("step", 0) < 2:
            os.read(mine, 65536)
        os.close(mine)
        os.kill(process.pid, signal.SIGHUP)  # the kernel sends it to a session that the terminal leads
        assert process.wait(60) == 0
    finally:
        process.kill()
    state = folder.read_state()
    assert state["state"] == "interrupted"
    assert checkpoint.load_newest(folder.checkpoints)["step"] == state["step"] >= 2


class Odd(BaseException):
    """As what some extension modules raise."""


def fail_with(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes\ndiffer"), Odd("odd"), InputError("data: gone; bring it back")])
def test_whatever_ends_a_run_is_recorded_and_a_fault_of_the_program_keeps_its_traceback(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = RunFolder(tmp_path / "run")
    in_step(monkeypatch, 3, lambda: fail_with(error))
    with pytest.raises(type(error)):
        pretrain(tiny, folder.path)
    state = folder.read_state()
    assert (state["state"], state["step"], state["steps"]) == ("failed", 2, 6)
    if isinstance(error, InputError):
        assert state["reason"] == str(error) and "log" not in state and not folder.failure.exists()
    else:
        name = type(error).__name__
        assert state["reason"] == f"{name}: {str(error).splitlines()[0]}"
        kept = Path(state["log"]).read_text()
        assert "Traceback" in kept and f"{name}: {error}" in kept and "fail_with" in kept
        assert error.__notes__ == [f"This is kept in {folder.failure}."]
    monkeypatch.undo()
    assert pretrain(tiny, folder.path, resume=True) == "finished"
    assert "reason" not in folder.read_state()


def test_a_second_ctrl_c_leaves_a_run_that_was_interrupted(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step(monkeypatch, 3, lambda: fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_state()["state"] == "interrupted"


def test_what_goes_wrong_before_a_run_begins_changes_nothing_of_the_one_it_would_replace(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    stop_at(tiny, folder.path, 1)
    before = folder.read_state()
    with pytest.raises(InputError, match="batch: BatchNorm needs two images"):
        pretrain(replace(tiny, batch=1), folder.path, overwrite=True)
    monkeypatch.setattr("jobs.training.opening.open_data", lambda config: fail_with(ValueError("a fault")))
    with pytest.raises(ValueError, match="a fault"):
        pretrain(tiny, folder.path, overwrite=True)
    assert folder.read_state() == before and not folder.failure.exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_want_of_memory_is_one_line_with_a_remedy(tmp_path: Path, error: Exception) -> None:
    one_line = r"^run: out of memory .*--batch.*--accumulate"
    with pytest.raises(TrainingFailedError, match=one_line), as_training_failure(tmp_path):
        raise error


def test_a_run_resumed_from_its_first_checkpoint_repeats_no_line(
    tiny: PretrainConfig, tmp_path: Path, digits: Path
) -> None:
    held_out = replace(
        tiny.monitor, knn_train=str(digits / "train"), knn_test=str(digits / "test"), loggers=("json", "tensorboard")
    )
    config, folder = replace(tiny, steps=2, monitor=held_out), RunFolder(tmp_path / "run")
    pretrain(config, folder.path)
    for path in folder.checkpoints.glob("step-00000002.*"):
        path.unlink()
    assert pretrain(config, folder.path, resume=True) == "finished"
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    for name, steps in (("knn/top1", [0, 2]), ("train/loss", [2])):
        assert [line["step"] for line in read_metrics(folder.metrics) if name in line] == steps
        assert [event.step for event in events.Scalars(name)] == steps


def test_a_checkpoint_holds_what_a_resumed_run_takes_back_and_nothing_else(
    tiny: PretrainConfig, tmp_path: Path
) -> None:
    stop_at(tiny, tmp_path / "run", 2)
    folder = RunFolder(tmp_path / "run").checkpoints
    content = checkpoint.load_newest(folder)
    assert [*content] == ["schema", "step", "config", "objective", "optimizer", "monitor", "guard"]
    content["guard"] = {"skipped": 5, "in_a_row": 0}
    content["monitor"]["newest_knn"] = 0.25
    checkpoint.save(folder, content.pop("step"), {name: content[name] for name in content if name != "schema"})
    pretrain(tiny, tmp_path / "run", resume=True)
    assert checkpoint.load_newest(folder)["guard"] == {"skipped": 5, "in_a_row": 0}
    assert checkpoint.entries(folder)[-1].facts["score"] == 0.25


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_taken(
    tiny: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny, tmp_path / "whole")
    stop_at(tiny, tmp_path / "parts", 4)
    damaged = tmp_path / "parts" / "checkpoints" / "step-00000004.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    capsys.readouterr()
    assert pretrain(tiny, tmp_path / "parts", resume=True) == "finished"
    said = capsys.readouterr().err.replace("\n", "")
    assert damaged.name in said and "damaged" in said
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_replaced_samples_stand_once_in_the_quarantine(tiny: PretrainConfig, tmp_path: Path) -> None:
    for name in ("real", "synthetic"):
        shards = shutil.copytree(getattr(tiny.data, name)[0], tmp_path / name)
        for path in shards.glob("*.tar"):
            with tarfile.open(path) as tar:
                places = [member.offset_data + member.size // 2 for member in tar if not member.name.endswith(".cls")]
            content = bytearray(path.read_bytes())
            for place in places[::10]:
                content[place] ^= 0xFF
            path.write_bytes(content)
    data = replace(tiny.data, real=str(tmp_path / "real"), synthetic=str(tmp_path / "synthetic"), max_failures=1.0)
    config = replace(tiny, data=data)
    pretrain(config, tmp_path / "whole")
    stop_at(config, tmp_path / "parts", 3)
    # What the kill of a later step leaves behind is cut off.
    with RunFolder(tmp_path / "parts").quarantine.open("a") as file:
        file.write('{"step": 3, "shard": "x", "key": "y", "reason": "z"}\n{"step": 4, "sh')
    assert pretrain(config, tmp_path / "parts", resume=True) == "finished"
    whole, parts = (RunFolder(tmp_path / name).quarantine.read_text() for name in ("whole", "parts"))
    steps = {json.loads(line)["step"] for line in whole.splitlines()}
    assert whole == parts and min(steps) < 3 <= max(steps)
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("loggers", [(), ("json",), ("tensorboard",)])
def test_a_full_disk_stops_the_run_with_one_line_and_a_usable_checkpoint(
    tiny: PretrainConfig,
    tmp_path: Path,
    small_disk: Path,
    loggers: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tiny = replace(tiny, monitor=replace(tiny.monitor, loggers=loggers, every=1), steps=8)
    pretrain(tiny, tmp_path / "whole")
    run, ballast = small_disk / "run", small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    in_step(monkeypatch, 3, fill)
    with pytest.raises(
        TrainingFailedError, match=r"No space left on device.*0\.0 GB free.*make room; .*--resume"
    ) as it:
        pretrain(tiny, run)
    assert "\n" not in str(it.value) and "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    assert checkpoint.load_newest(RunFolder(run).checkpoints)["step"] == 2
    assert not [path.name for path in RunFolder(run).checkpoints.iterdir() if ".pt." in path.name]
    ballast.unlink()
    assert pretrain(tiny, run, resume=True) == "finished"
    same_run(tmp_path / "whole", run)


def test_training_that_cannot_go_on_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise TrainingFailedError("step 3: the loss is nan")

    monkeypatch.setattr("jobs.pretrain.pretrain", fail)
    assert cli.run(["pretrain", "synby-vit-tiny", "--run", "R", "--data.real", "S"]) == 1
    assert capsys.readouterr().err == "hardviews: step 3: the loss is nan\n"


@pytest.mark.timeout(300)
def test_many_ranks_do_what_one_does_and_a_run_goes_on_at_another_world_size(
    without_chance: PretrainConfig, tmp_path: Path
) -> None:
    """Same order and log rows, same losses to float tolerance, at world sizes 1 and 2 and across them."""
    # BatchNorm in the backbone too: statistics of all ranks, and none from selection.
    backbone = replace(without_chance.backbone, batchnorm_mlp=True)
    config, file = replace(without_chance, backbone=backbone), str(tmp_path / "config.json")
    save_config(config, Path(file))
    stop_at(config, tmp_path / "one-two", 3)
    jobs = {"two": "new", "parts": "new:3", "two-one": "new:4", "one-two": "resume"}
    arguments = [word for name, how in jobs.items() for word in (file, str(tmp_path / name), how)]
    two = two_ranks(*arguments, file, str(tmp_path / "parts"), "resume")
    pretrain(config, tmp_path / "one")
    finish(two, 200)
    # Only 32 positions are kept of the 64 that two ranks wrote, of each rank's rows half.
    for name in ("step-00000004.pt", "step-00000004.json"):
        (tmp_path / "two-one" / "checkpoints" / name).unlink()
    assert pretrain(config, tmp_path / "two-one", resume=True) == "finished"
    same_run(tmp_path / "two", tmp_path / "parts")
    for name in ("two", "two-one", "one-two"):
        same_rows(tmp_path / "one", tmp_path / name, exact=False)
    same_curves(tmp_path / "one", tmp_path / "two")


def same_curves(first: Path, second: Path) -> None:
    """The same metrics at the same steps, to float tolerance."""
    lines = [read_metrics(run / "metrics.jsonl") for run in (first, second)]
    analysed = ("health/rankme", "health/alignment", "health/uniformity/synthetic")
    schedules = ("train/epoch", "train/lr")  # of the global step, however many ranks share its batch
    learned = ("train/loss", "train/grad_norm", "train/proxy", "monitor/bank_knn", "selection/gain/real")
    for name in (*schedules, *learned, *analysed):
        wanted, found = ([entry[name] for entry in entries if name in entry] for entries in lines)
        assert found
        np.testing.assert_allclose(found, wanted, rtol=2e-2 if name == "selection/gain/real" else 2e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks_do_what_one_does(without_chance: PretrainConfig, tmp_path: Path) -> None:
    save_config(without_chance, tmp_path / "config.json")
    four = ranks(4, str(tmp_path / "config.json"), str(tmp_path / "four"), "new")
    pretrain(without_chance, tmp_path / "one")
    finish(four, 400)
    same_rows(tmp_path / "one", tmp_path / "four", exact=False)
    same_curves(tmp_path / "one", tmp_path / "four")


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two hosts: network namespaces joined by a cable. Name, network device and address of each."""
    found = [(f"hv{os.getpid()}-{n}", f"cable{n}", f"10.77.0.{n}") for n in (1, 2)]
    (one, device, _), (two, other, _) = found
    made = subprocess.run(["ip", "netns", "add", one], capture_output=True, check=False) if shutil.which("ip") else None
    if made is None or made.returncode:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        ip("netns", "add", two)
        ip("link", "add", device, "netns", one, "type", "veth", "peer", "name", other, "netns", two)
        for name, device, address in found:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found
    finally:
        for name, _, _ in found:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_do_what_one_does(tiny: PretrainConfig, tmp_path: Path, hosts: list[tuple[str, str, str]]) -> None:
    save_config(tiny, tmp_path / "config.json")
    meet = f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id=hosts --rdzv-endpoint={hosts[0][2]}:29500"
    training = [WORKER, str(tmp_path / "config.json"), str(tmp_path / "two"), "new"]
    processes = []
    for name, device, address in hosts:
        inside = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *meet.split()]
        leads = f"--rdzv-conf=is_host={int(address == hosts[0][2])}"
        command = [*inside, leads, f"--local-addr={address}", *training]
        processes.append(start(command, GLOO_SOCKET_IFNAME=device))
    finish(processes, 400)
    finish(two_ranks(str(tmp_path / "config.json"), str(tmp_path / "one"), "new"), 200)
    same_run(tmp_path / "one", tmp_path / "two")


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def trains(run: Path, process: subprocess.Popen[str], steps: int = 2) -> None:
    """Waits until a run has taken some steps."""
    while process.poll() is None and RunFolder(run).read_state().get("step", 0) < steps:
        time.sleep(0.05)
    assert process.poll() is None, process.stdout and process.stdout.read()[-3000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=["killed", "hangs"]
)
def test_a_lost_rank_ends_the_job_within_a_minute_with_the_reason(
    tiny: PretrainConfig, tmp_path: Path, how: signal.Signals
) -> None:
    save_config(replace(tiny, steps=100_000), tmp_path / "config.json")
    process = start(torchrun(str(tmp_path / "config.json"), str(tmp_path / "run"), "new"))
    checkpoints = RunFolder(tmp_path / "run").checkpoints
    try:
        trains(tmp_path / "run", process)
        while not any(
            entry.facts["step"] >= 2 for entry in checkpoint.entries(checkpoints)
        ):  # written beside training, which may be ahead of it
            time.sleep(0.05)
        began = time.monotonic()
        first, second = children(process.pid)
        os.kill(first if how == signal.SIGKILL else second, how)
        said, _ = process.communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert process.returncode != 0
        if how == signal.SIGKILL:
            assert "Signal 9 (SIGKILL)" in said, said[-3000:]
            reason = "another process of this job is gone"
        else:
            reason = "rank 1 has given no sign of life"
        state = RunFolder(tmp_path / "run").read_state()
        assert state["reason"] in said, said[-3000:]
        assert state["state"] == "failed" and reason in state["reason"] and "\n" not in state["reason"]
        assert checkpoint.load_newest(checkpoints)["step"] >= 2
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_process_that_fails_first_says_why(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_state("running", step=3)
    for error in (RankLostError("gone"), TrainingFailedError("the loss is nan"), RankLostError("gone")):
        record_failure(folder, error)
    said = folder.read_state()
    assert (said["state"], said["step"], said["reason"]) == ("failed", 3, "the loss is nan")


@pytest.mark.parametrize("words", ["[gloo/transport/tcp/pair.cc:537] Read error", "Connection reset by peer"])
def test_what_a_broken_connection_means_is_said(tmp_path: Path, words: str) -> None:
    with (
        pytest.raises(RankLostError, match=r"another process of this job is gone \([CR][a-z ]+\);"),
        as_training_failure(tmp_path),
    ):
        raise RuntimeError(f"{words}. This is typically caused by\nsomething")
    with pytest.raises(RuntimeError, match="shapes differ"), as_training_failure(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_passes_a_signal_on_and_all_ranks_stop_behind_a_checkpoint(
    tiny: PretrainConfig, tmp_path: Path
) -> None:
    save_config(replace(tiny, steps=100_000), tmp_path / "config.json")
    process = start(torchrun(str(tmp_path / "config.json"), str(tmp_path / "run"), "new"))
    trains(tmp_path / "run", process)
    process.terminate()
    process.communicate(timeout=60)
    state = RunFolder(tmp_path / "run").read_state()
    assert state["state"] == "interrupted"
    assert checkpoint.load_newest(RunFolder(tmp_path / "run").checkpoints)["step"] == state["step"]
    assert len(rows(tmp_path / "run")["position_B"]) == 16 * state["step"]


def kill_and_resume(config: PretrainConfig, folder: Path, ranks: int, kills: int, longest: float) -> None:
    """Kills a run with SIGKILL at random moments, resuming it each time, and compares with an unbroken one.

    A moment lies up to `longest` seconds behind the begin of opening the run, however long Python takes to start.
    """
    file, broken, chance, done = folder / "config.json", folder / "broken", random.Random(ranks), 0
    save_config(config, file)
    command = torchrun if ranks == 2 else lambda *arguments: [sys.executable, WORKER, *arguments]

    finish([start(command(str(file), str(folder / "whole"), "new"))], 600)
    while done < kills:
        resume = bool((broken / "config.json").is_file() and checkpoint.entries(RunFolder(broken).checkpoints))
        if RunFolder(broken).read_state().get("state") == "finished":
            shutil.rmtree(broken)
            resume = False
        before = opened(broken)
        process = start(command(str(file), str(broken), "resume" if resume else "new"))
        while process.poll() is None and opened(broken) == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, longest))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            done += 1
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said[-3000:]
    last = "resume" if checkpoint.entries(RunFolder(broken).checkpoints) else "new"
    finish([start(command(str(file), str(broken), last))], 600)
    same_run(folder / "whole", broken)


def opened(run: Path) -> int:
    """Changes when a process has begun to open the run: it writes config.json then."""
    file = run / "config.json"
    return file.stat().st_mtime_ns if file.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "kills"), [(1, 20), (2, 10)])
def test_killed_at_any_moment_a_run_resumes_to_the_bit(
    tiny: PretrainConfig, tmp_path: Path, ranks: int, kills: int
) -> None:
    kill_and_resume(replace(tiny, steps=120), tmp_path, ranks, kills, 4.0)


@pytest.mark.timeout(240)
def test_killed_once_a_run_resumes_to_the_bit(tiny: PretrainConfig, tmp_path: Path) -> None:
    """In processes of their own only what is killed."""
    config = replace(tiny, steps=10)
    pretrain(config, tmp_path / "whole")
    save_config(config, tmp_path / "config.json")
    process = start([sys.executable, WORKER, str(tmp_path / "config.json"), str(tmp_path / "run"), "new"])
    trains(tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert RunFolder(tmp_path / "run").read_state()["state"] == "running"
    assert pretrain(config, tmp_path / "run", resume=True) == "finished"
    same_run(tmp_path / "whole", tmp_path / "run")
