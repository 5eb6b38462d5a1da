"""Run folders, metric lines across a resume, and loggers."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jobs.run.folder import RunFolder, keep_lines, open_run, whole_file, write_json
from jobs.run.metrics import LOGGERS, Loggers, read_metrics
from shards.errors import InputError


def test_a_run_that_exists_is_refused_unless_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check(resume=False, overwrite=False)
    assert not folder.path.exists()
    folder.clear()
    write_json(folder.config, {})
    with pytest.raises(InputError, match="--resume or replace it with --overwrite"):
        folder.check(resume=False, overwrite=False)
    (folder.checkpoints / "left.pt").touch()
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    assert (folder.checkpoints / "left.pt").exists()
    folder.clear()
    assert folder.checkpoints.is_dir() and not (folder.checkpoints / "left.pt").exists()


def test_one_process_at_a_time_trains_into_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    holder = "import sys\nfrom pathlib import Path\nfrom jobs.run.folder import RunFolder\n"
    holder += "with RunFolder(Path(sys.argv[1])).locked():\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        folder.clear()
        with pytest.raises(InputError, match=f"process {process.pid} on .* is training into it"), folder.locked():
            pass
        process.kill()
    assert folder.lock.exists()  # a killed process leaves its file, but not its lock
    with folder.locked():
        assert folder.checkpoints.is_dir()
    assert not folder.lock.exists() and folder.checkpoints.is_dir()


def test_a_refused_start_takes_its_new_folder_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "run")
    with folder.locked():
        folder.check(resume=False, overwrite=False)
        assert folder.path.is_dir()
    assert not folder.path.exists()
    with pytest.raises(InputError, match="cannot be written"), RunFolder(Path("/dev/null/run")).locked():
        pass


def test_overwrite_never_removes_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a run folder"):
        RunFolder(tmp_path).check(resume=False, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_resume_of_nothing_and_both_flags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        RunFolder(tmp_path / "none").check(resume=True, overwrite=False)
    with pytest.raises(InputError, match="exclude each other"):
        RunFolder(tmp_path / "none").check(resume=True, overwrite=True)
    with pytest.raises(InputError, match="no run folder"):
        open_run(tmp_path)


def test_resume_cuts_lines_behind_the_checkpoint_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)) + '{"step": 6, "tra')
    keep_lines(path, 3)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(LOGGERS))
@pytest.mark.filterwarnings("ignore")  # wandb and mlflow warn about their own dependencies
def test_every_logger_takes_scalars_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = RunFolder(tmp_path / "run")
    folder.clear()
    loggers = Loggers([name], folder, 0, {"seed": 1})
    loggers.log(3, {"train/loss": 0.5, "train/spike": math.nan})
    loggers.close()
    found = {
        "json": lambda: read_metrics(folder.metrics)[0]["train/loss"] == 0.5,
        "tensorboard": lambda: any(folder.tensorboard.glob("events.*")),
        "wandb": lambda: any((folder.path / "wandb").glob("offline-run-*/*.wandb")),
        "mlflow": lambda: any("0.5 3" in p.read_text() for p in (tmp_path / "mlruns").rglob("metrics/train/loss")),
    }
    assert found[name]()


@pytest.mark.parametrize("name", ["wandb", pytest.param("mlflow", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_runs_of_one_folder_name_are_two_runs_to_trackers_and_a_resumed_one_is_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folders = [RunFolder(tmp_path / "runs" / parent / "bob's 10:00") for parent in ("first", "second")]
    for folder in folders:
        folder.clear()
    for folder, step in ((folders[0], 0), (folders[1], 0), (folders[0], 1)):
        loggers = Loggers([name], folder, step, {})
        loggers.log(step + 1, {"train/loss": 0.5})
        loggers.close()
    if name == "wandb":
        ids = [{path.name.split("-")[3] for path in folder.path.glob("wandb/offline-run-*")} for folder in folders]
        assert all(len(own) == 1 for own in ids) and ids[0] != ids[1]
    else:
        counts = []
        for folder in folders:
            with closing(sqlite3.connect(folder.path.parent / "mlflow.db")) as store:
                counts += store.execute("select count(*) from metrics where key = 'train/loss' group by run_uuid")
        assert counts == [(2,), (1,)]
    assert not [*Path.cwd().iterdir()]
    assert folders[0].identity() == folders[0].identity() != folders[1].identity()


def test_tensorboard_reads_back_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path / "run")
    folder.check(resume=False, overwrite=False)
    for resumed, steps in ((0, (1, 2)), (0, (1, 7, 8, 9)), (7, (8, 10))):
        loggers = Loggers(["tensorboard"], folder, resumed, {})
        for step in steps:
            loggers.log(step, {"train/loss": step + resumed / 2, "knn/top1": 0.5})
        loggers.close()
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "knn/top1"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (7, 7), (8, 11.5), (10, 13.5)]


def test_values_that_are_not_finite_are_null_to_every_reader_and_nan_to_ours(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.clear()
    loggers = Loggers(["json"], folder, 0, {})
    loggers.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.5})
    loggers.close()
    folder.write_state("failed", verdict_figures={"loss": -math.inf, "spread": [0.5, math.nan]})

    def strict(text: str) -> dict[str, Any]:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    line = strict(folder.metrics.read_text())
    assert (line["train/loss"], line["train/grad_norm"], line["train/lr"]) == (None, None, 0.5)
    assert strict(folder.state.read_text())["verdict_figures"] == {"loss": None, "spread": [0.5, None]}
    assert math.isnan(read_metrics(folder.metrics)[0]["train/loss"])


def test_what_a_killed_process_left_of_a_file_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "views[1].parquet"
    left = tmp_path / f".{path.name}.12345"
    left.write_text("half")
    other = tmp_path / ".views.parquet.12345"
    other.write_text("of another file")
    with whole_file(path) as one:
        one.write_text("one")
        thread = threading.Thread(target=lambda: write_json(path, "two"))
        thread.start()
        thread.join()
        assert path.read_text() == '"two"' and one.read_text() == "one"
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), whole_file(path) as half:
        half.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and {*tmp_path.iterdir()} == {path, other}


def test_wandb_without_a_key_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_SILENT": "true"}
    code = "from jobs.run.metrics import check_loggers; check_loggers(['wandb'])"
    for mode, refused in (("online", True), ("offline", False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "WANDB_MODE": mode},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ("InputError: loggers: wandb cannot log in (there is no API key)" in done.stderr) is refused, done.stderr
        assert done.returncode == refused
