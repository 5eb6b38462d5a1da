"""Checkpoints are whole or absent, and damage is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jobs.run import checkpoint
from shards.errors import InputError


def content(value: float) -> dict:
    return {"model": {"weight": torch.full((64, 64), value)}, "facts": {"position": 7}}


def test_newest_comes_back(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, content(step))
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded["step"] == 20 and loaded["facts"] == {"position": 7}
    assert torch.equal(loaded["model"]["weight"], torch.full((64, 64), 20.0))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "marker"])
def test_damaged_newest_is_named_and_the_one_before_taken(tmp_path: Path, damage: str, capsys) -> None:
    checkpoint.save(tmp_path, 10, content(10))
    path = checkpoint.save(tmp_path, 20, content(20))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "marker":
        path = path.with_suffix(".json")
        path.write_text('{"step": 2')
    elif damage == "cut":
        path.write_bytes(data[:-100])
    else:
        path.unlink()
    assert checkpoint.load_newest(tmp_path)["step"] == 10
    assert path.name in capsys.readouterr().err.replace("\n", "")


def test_nothing_intact_is_an_input_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 10, content(10)).write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="no intact checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_prune_keeps_newest_and_best(tmp_path: Path) -> None:
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.5)):
        checkpoint.save(tmp_path, step, content(step), score)
    checkpoint.prune(tmp_path, keep=2)
    assert [entry.step for entry in checkpoint.entries(tmp_path)] == [2, 4, 5]
    assert len(list(tmp_path.iterdir())) == 6


def test_checkpoints_of_another_schema_version_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 1)
    paths = [checkpoint.save(tmp_path, step, content(step)) for step in (1, 2)]
    monkeypatch.undo()
    with pytest.raises(InputError, match=f"{paths[0]} has schema version 1, this program reads 2; use the version"):
        checkpoint.load(paths[0])
    with pytest.raises(InputError, match=f"{paths[1]} has schema version 1"):  # not a warning for each, then "none"
        checkpoint.load_newest(tmp_path)
    assert capsys.readouterr().err == ""


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"schema": checkpoint.SCHEMA_VERSION, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 10, content(10))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 20, content(20))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000010.json", "step-00000010.pt"]
    assert checkpoint.load_newest(tmp_path)["step"] == 10


KILLED = """
import sys, torch
from pathlib import Path
from jobs.run import checkpoint
for step in range(1, 10_000):
    checkpoint.save(Path(sys.argv[1]), step, {"w": torch.full((200_000,), float(step))})
    checkpoint.prune(Path(sys.argv[1]), 2)
    if step == 1:
        print("go", flush=True)
"""


def test_kill_at_any_moment_leaves_an_intact_newest(tmp_path: Path) -> None:
    for delay in (0.05, 0.13, 0.29):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        loaded = checkpoint.load_newest(tmp_path)
        assert torch.equal(loaded["w"], torch.full((200_000,), float(loaded["step"])))
