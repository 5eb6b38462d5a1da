import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from log_rows import append, batch_at, losses_at, params_at, write_log

from jobs.log import format as log_format
from jobs.log.writer import AugmentationLog, Rows, batch_rows, open_log, truncate_log
from pipelines.params import FIELDS, pairs
from shards.errors import InputError


def read(path: Path, **how) -> Rows:
    return Rows.concatenate(list(open_log(path).chunks(**how)))


def assert_whole(rows: Rows, count: int, views: int = 4, images: int = 1_000) -> None:
    """Rows 0 … count−1, each once, in order, with the values that were appended."""
    at = np.arange(count)
    np.testing.assert_array_equal(rows.position_B, at)
    np.testing.assert_array_equal(rows.sample_B, at % images)
    expected = params_at(at, views)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(rows.params, name), getattr(expected, name))
    losses = losses_at(at, views, expected)
    np.testing.assert_array_equal(rows.loss_BP, losses)
    np.testing.assert_array_equal(rows.choice_B, losses.argmax(1))
    np.testing.assert_array_equal(np.argwhere(rows.chosen_BN)[:, 1].reshape(-1, 2), pairs(views)[losses.argmax(1)])


@pytest.mark.parametrize("batch", [3, 256, 700])
@pytest.mark.parametrize("world", [1, 3])
def test_rows_come_back_in_order(tmp_path, batch, world):
    steps = max(600 // (batch * world), 2)
    write_log(tmp_path / "log", steps=steps, batch=batch, world=world)
    assert_whole(read(tmp_path / "log"), steps * batch * world)
    assert_whole(read(tmp_path / "log", size=1), steps * batch * world)


def test_chunks_are_bounded_and_steps_select(tmp_path, monkeypatch):
    monkeypatch.setattr(log_format, "CHUNK_ROWS", 32)
    write_log(tmp_path / "log", steps=30, batch=16, world=2)
    log = open_log(tmp_path / "log")
    assert max(len(chunk) for chunk in log.chunks(size=64)) <= 128
    rows = read(tmp_path / "log", size=64, steps=(3, 7))
    np.testing.assert_array_equal(rows.position_B, np.arange(3 * 32, 7 * 32))
    assert log.count((3, 7)) == 4 * 32 and log.count((40, 50)) == 0 and log.count() == log.rows == 960


def test_zarr_and_xarray_open_it(tmp_path):
    write_log(tmp_path / "log", steps=5, batch=64)
    dataset = xarray.open_zarr(tmp_path / "log" / "rank-00000")
    assert dict(dataset.sizes) == {"row": 320, "view": 4, "pair": 6}
    assert dataset.attrs == {"committed": 320}
    np.testing.assert_array_equal(dataset["position"], np.arange(320))
    group = zarr.open_group(tmp_path / "log", mode="r")
    assert group.attrs["sources"] == ["real", "synthetic"]
    np.testing.assert_array_equal(group["rank-00000/brightness"][:], params_at(np.arange(320), 4).brightness)


def test_uncommitted_rows_do_not_count(tmp_path):
    log = AugmentationLog(tmp_path / "log", 0, 4, shard_rows=256)
    append(log, 0, 0, 100, 4)
    log.commit()
    append(log, 1, 100, 100, 4)
    assert log.rows == 200
    assert_whole(read(tmp_path / "log"), 100)
    log.close()
    assert_whole(read(tmp_path / "log"), 200)


def test_steps_without_selection(tmp_path):
    write_log(tmp_path / "log", steps=4, batch=8, every=2)
    rows = read(tmp_path / "log")
    np.testing.assert_array_equal(np.isnan(rows.loss_BP).all(1), rows.step_B % 2 == 1)
    log = AugmentationLog(tmp_path / "bare", 0, 3)
    at = np.arange(5)
    log.append(batch_rows(batch_at(0, params_at(at, 3), at, at, at, at), 0, 3))
    choice = np.array([-1, 0, 1, 2, -1])
    log.append(batch_rows(batch_at(5, params_at(at, 3), at, at, at, at), 1, 3, choice_B=choice, at_random_B=choice > 0))
    log.close()
    bare = read(tmp_path / "bare")
    np.testing.assert_array_equal(bare.choice_B, [-1] * 6 + [0, 1, 2, -1])
    np.testing.assert_array_equal(bare.chosen_BN[6:9], [[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    assert not bare.chosen_BN[:6].any()
    np.testing.assert_array_equal(np.flatnonzero(bare.at_random_B), [7, 8])
    assert bare.sizes_B2.tolist() == [[100, 120]] * 10


def test_multi_crop_scores_the_first_views_and_marks_the_chosen(tmp_path):
    at = np.arange(5)
    chosen = np.zeros((5, 6), bool)
    chosen[:, [0, 3]] = True
    log = AugmentationLog(tmp_path / "log", 0, 6, scored=3)
    made = batch_at(0, params_at(at, 6), at, at, at, at)
    log.append(batch_rows(made, 0, 3, np.ones((5, 3), np.float32), at % 3, chosen_BN=chosen))
    log.close()
    rows = read(tmp_path / "log")
    assert rows.loss_BP.shape == (5, 3)
    np.testing.assert_array_equal(rows.chosen_BN, chosen)


def test_truncate_and_go_on(tmp_path):
    write_log(tmp_path / "log", steps=10, batch=64)
    for position in (513, 512, 300, 5, 0):
        truncate_log(tmp_path / "log", position)
        assert open_log(tmp_path / "log").rows == position
        if position:
            assert_whole(read(tmp_path / "log"), position)
    log = AugmentationLog(tmp_path / "log", 0, 4)
    for step in range(10):
        append(log, step, step * 64, 64, 4)
    log.close()
    assert_whole(read(tmp_path / "log"), 640)


def test_goes_on_at_another_world_size(tmp_path):
    write_log(tmp_path / "log", steps=6, batch=32, world=3)
    truncate_log(tmp_path / "log", 3 * 96)
    write_log(tmp_path / "log", steps=6, batch=96, world=1, first=3)
    assert_whole(read(tmp_path / "log"), 9 * 96)
    truncate_log(tmp_path / "log", 4 * 96)
    write_log(tmp_path / "log", steps=4, batch=48, world=2, first=4)
    assert_whole(read(tmp_path / "log"), 8 * 96)


def test_missing_rows_are_found_before_the_run_goes_on(tmp_path):
    write_log(tmp_path / "log", steps=4, batch=32, world=2)
    truncate_log(tmp_path / "log", 192)
    with pytest.raises(InputError, match="192 rows from position 0 to 256, the checkpoint's, where 256 belong"):
        truncate_log(tmp_path / "log", 256)
    # A log that somebody removed begins where the run went on.
    write_log(tmp_path / "later", steps=4, batch=32, first=10)
    truncate_log(tmp_path / "later", 12 * 32)
    np.testing.assert_array_equal(read(tmp_path / "later").position_B, np.arange(320, 384))


def test_a_kill_before_anything_was_written(tmp_path):
    (tmp_path / "log").mkdir()
    truncate_log(tmp_path / "log", 0)
    with pytest.raises(InputError, match="no augmentation log"):
        truncate_log(tmp_path / "log", 64)
    log = AugmentationLog(tmp_path / "log", 0, 4)
    truncate_log(tmp_path / "log", 0)
    assert dict(xarray.open_zarr(tmp_path / "log" / "rank-00000").sizes) == {"row": 0, "view": 4, "pair": 6}
    log.close()


def test_no_row_twice(tmp_path):
    log = AugmentationLog(tmp_path / "log", 0, 4)
    append(log, 0, 0, 64, 4)
    with pytest.raises(ValueError, match="position 63 is not behind"):
        append(log, 1, 63, 64, 4)
    log.close()


def test_errors_of_the_background_thread_surface(tmp_path, monkeypatch):
    log = AugmentationLog(tmp_path / "log", 0, 4, shard_rows=256)
    append(log, 0, 0, 200, 4)
    log.commit()

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log_format, "sync", full)
        append(log, 1, 200, 100, 4)
        with pytest.raises(OSError, match="No space"):
            for step in range(2, 300):
                append(log, step, 100 + step * 100, 100, 4)
                time.sleep(0.01)
    # There is space again, but the lost block stays lost: no later one may follow it.
    with pytest.raises(OSError, match="No space"):
        log.close()
    assert_whole(read(tmp_path / "log"), 200)


def test_a_slow_disk_slows_training_rather_than_filling_the_memory(tmp_path, monkeypatch):
    writes = threading.Event()
    log = AugmentationLog(tmp_path / "log", 0, 4, shard_rows=256)
    monkeypatch.setattr(log_format, "sync", lambda _: writes.wait(60))
    training = threading.Thread(target=lambda: [append(log, step, step * 256, 256, 4) for step in range(20)])
    training.start()
    training.join(1)
    assert training.is_alive() and log.rows <= 4 * 256
    writes.set()
    training.join()
    log.close()
    assert_whole(read(tmp_path / "log"), 20 * 256)


@pytest.mark.parametrize(("views", "rows"), [(4, 65_536), (16, 32_768), (100, 2_048)])
def test_blocks_are_bounded_in_rows_and_bytes(views, rows):
    assert log_format.shard_rows(views, len(pairs(views))) == rows


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="no augmentation log"):
        open_log(tmp_path / "none")
    write_log(tmp_path / "log", steps=1)
    with pytest.raises(InputError, match=r"4 views.*this run has 3"):
        AugmentationLog(tmp_path / "log", 0, 3)
    metadata = tmp_path / "log" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(InputError, match="schema version 1, this program reads 2; use the version"):
        open_log(tmp_path / "log")


TRAIN = """
import pathlib, sys
from log_rows import append
from jobs.log.writer import AugmentationLog, truncate_log
path, checkpoint, steps = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
if path.exists():
    truncate_log(path, first * 48)
log = AugmentationLog(path, 0, 4, sources=("real", "synthetic"), shard_rows=256)
print("ready", flush=True)
for step in range(first, steps):
    append(log, step, step * 48, 48, 4)
    if step % 7 == 6:
        log.commit()
        temporary = checkpoint.with_suffix(".new")
        temporary.write_text(str(step + 1))
        temporary.replace(checkpoint)
log.close()
"""


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_at_any_moment_and_resume(tmp_path, rounds):
    """kill -9 while shards and commits are being written, again and again; in the end every row is there once."""
    rng = np.random.default_rng(0)
    here = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, str(Path.cwd())])}
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "log"), str(tmp_path / "checkpoint")]
    kills = 0
    for _ in range(rounds):
        with subprocess.Popen([*command, "100000"], env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            while not (tmp_path / "checkpoint").exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        assert_whole(read(tmp_path / "log"), open_log(tmp_path / "log").rows)
    assert kills == rounds
    steps = int((tmp_path / "checkpoint").read_text()) + 10
    subprocess.run([*command, str(steps)], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert_whole(read(tmp_path / "log"), steps * 48)
