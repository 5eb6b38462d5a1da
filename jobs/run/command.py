"""Command-line parsing and terminal output that every job shares."""

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from shards.errors import InputError

Config = TypeVar("Config")

# Progress and notes go to stderr, so that what a job prints as its result can be piped.
console = Console(stderr=True, soft_wrap=True)


def parse(config: type[Config], argv: Sequence[str], prog: str, default: Config | None = None) -> Config:
    """Reads flags into the dataclass `config`; `default` gives the values of flags that are left out.

    Raises:
        InputError: for a flag that does not exist; the message names the closest known ones.
        SystemExit: 0 after `--help`, 2 where a value has the wrong type.
    """
    marks = (tyro.conf.AvoidSubcommands,)
    parsed, unknown = tyro.cli(
        config, args=list(argv), prog=prog, default=default, return_unknown_args=True, config=marks
    )
    if unknown:
        raise InputError(unknown_flag(unknown[0], config, prog, default))
    assert parsed is not None
    return parsed


def unknown_flag(flag: str, config: type[object], prog: str, default: object | None) -> str:
    """One line on a flag that does not exist: the flag, its nearest neighbours, where all of them are listed."""
    known = sorted({word for word in help_text(config, prog, default).split() if word.startswith("--")})
    near = difflib.get_close_matches(flag, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known flags: {', '.join(known)}."
    return f"{flag}: {prog} has no such argument; {hint} `{prog} --help` explains all of them"


def help_text(config: type[object], prog: str, default: object | None = None) -> str:
    """The text that `--help` prints."""
    return tyro.extras.get_parser(
        config, prog=prog, default=default, config=(tyro.conf.AvoidSubcommands,)
    ).format_help()


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"– {self.unit}/s")


class Bar:
    """One progress bar; `advance` is safe to call from any thread."""

    def __init__(self, bars: Progress, description: str, total: float | None, completed: int = 0) -> None:
        self._progress = bars
        self._task = bars.add_task(description, total=total, completed=completed, note="")

    @staticmethod
    def silent() -> "Bar":
        """A bar that nobody sees, for processes that do not lead."""
        return Bar(Progress(disable=True), "", None)

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Moves the bar by `amount` units and, if given, replaces the note at its end."""
        if note is None:
            self._progress.update(self._task, advance=amount)
        else:
            self._progress.update(self._task, advance=amount, note=note)


@contextmanager
def progress(description: str, total: float | None, unit: str, completed: int = 0) -> Iterator[Bar]:
    """A progress bar on stderr with count, rate in `unit` per second and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield Bar(bars, description, total, completed)


def warn(message: str) -> None:
    """A line on stderr that something was left out or changed, while the job goes on."""
    console.print(f"[yellow]warning:[/yellow] {message}", highlight=False)


def fail(message: str) -> int:
    """Prints a user's mistake and returns the exit code for it."""
    print(f"hardviews: {message}", file=sys.stderr)
    return 2
