"""The `hardviews` command: jobs are found, a user's mistake is one line and exit code 2."""

import errno
import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import cli
from jobs.run import terminal
from jobs.run.terminal import parse
from shards.errors import InputError


def test_unknown_job_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["biuld"]) == 2
    error = capsys.readouterr().err
    assert "did you mean build?" in error and all(name in error for name in cli.JOBS) and error.count("\n") == 1


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.JOBS)


@pytest.mark.parametrize("name", sorted(cli.JOBS))
def test_every_job_explains_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.run([name, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert not code
    assert f"hardviews {name}" in capsys.readouterr().out


@dataclass(frozen=True)
class Flags:
    """A job's flags."""

    views: int = 4
    """Views of an image."""


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--veiws: hardviews x has no such argument; did you mean --views\?"):
        parse(Flags, ["--veiws", "3"], "hardviews x")


def test_a_mistake_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("hardviews")), "info", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("hardviews: ") and done.stderr.count("\n") == 1


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(argv: list[str]) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr("jobs.info.main", refuse)
    with pytest.raises(ConnectionResetError):
        cli.run(["info"])


HELP, PRESET = ["--help"], ["pretrain", "moby-vit-tiny", "--help"]


@pytest.mark.parametrize(("argv", "closed"), [(HELP, "stdout"), (PRESET, "stdout"), (["nothing"], "stderr")])
def test_an_output_that_nobody_reads_any_more_ends_the_command_quietly(argv: list[str], closed: str) -> None:
    """As when piped into `head`; a shell says 141 of other programs that a closed pipe ends."""
    reading, writing = os.pipe()
    os.close(reading)
    other = {"stdout": "stderr", "stderr": "stdout"}[closed]
    command = [str(Path(sys.executable).with_name("hardviews")), *argv]
    done = subprocess.run(command, text=True, check=False, **{closed: writing, other: subprocess.PIPE})
    os.close(writing)
    assert (done.returncode, getattr(done, other)) == (141, "")


def test_a_broken_connection_is_no_closed_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(BrokenPipeError):
        cli.main()


@dataclass(frozen=True)
class Needy:
    """A job that needs a folder."""

    out: Path
    """Where to."""
    views: int = 4
    """Views of an image."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], r"^Missing from hardviews x: --out PATH .*; `hardviews x --help` explains every flag$"),
        (["--out", "a", "--views", "four"], r"^--views: invalid literal.*'four'.*explains every flag$"),
        (["--out"], r"^Missing value for argument '--out'.*explains every flag$"),
    ],
)
def test_missing_and_mistyped_values_are_one_line(argv: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as raised:
        parse(Needy, argv, "hardviews x")
    assert "\n" not in str(raised.value)


def test_a_log_file_gets_lines_as_time_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal.progress("pretraining", 2000, "steps", completed=500) as bar:
        bar.advance(100)
        monkeypatch.setattr(terminal, "MINUTE", -1.0)
        bar.advance(200, note="loss 7.5 [50%]")
        terminal.Bar.silent().advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretraining 800 of 2,000  loss 7.5 [50%]"
    assert sum("2,000" in line for line in lines) == 1


def test_a_warning_keeps_its_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.warn("shards[1]/[bold].jpg is left out")
    assert "shards[1]/[bold].jpg is left out" in capsys.readouterr().err


def test_a_bar_keeps_the_brackets_of_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("embedding shards[a]", 1, "images") as bar:
        bar.advance()
    assert "embedding shards[a]" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["shards", "pipelines", "models", "jobs"])
def test_messages_name_extras_of_a_checkout(root: str) -> None:
    """hardviews is on no package index, so `pip install 'hardviews[…]'` would fail, or fetch something else."""
    files = (Path(cli.__file__).parents[1] / root).rglob("*.py")
    assert not [path.name for path in files if "hardviews[" in path.read_text()]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"hardviews {importlib.metadata.version('hardviews')}\n"
