"""Command-line parsing and terminal output that every job shares."""

import contextlib
import difflib
import io
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, TypeVar

import tyro
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from shards.errors import InputError

Config = TypeVar("Config")

# The type of a union's default decides which of its members the flags are for.
MARKS = (tyro.conf.AvoidSubcommands,)
MINUTE = 60.0


class _Output(Console):
    """Lets a closed pipe raise, so that `jobs.cli` ends the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Progress and notes go to stderr, so that what a job prints as its result can be piped.
# A log file has no width of its own, and 80 columns would cut the bars.
# Names of folders and classes may hold [brackets]: no text is taken for markup, and what has a style is a Text.
console = _Output(stderr=True, soft_wrap=True, markup=False, emoji=False, width=None if sys.stderr.isatty() else 120)
tables = _Output(markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)


def parse(config: type[Config], argv: Sequence[str], prog: str, default: Config | None = None) -> Config:
    """Reads flags into the dataclass `config`; `default` gives the values of flags that are left out.

    Raises:
        InputError: for a flag that does not exist (the message names the closest known ones), one that is missing, and
            a value of the wrong type or out of range.
        SystemExit: after `--help`.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                config, args=list(argv), prog=prog, default=default, return_unknown_args=True, config=MARKS
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise InputError(f"{one_line(printed.getvalue())}; `{prog} --help` explains every flag") from None
    if unknown:
        raise InputError(unknown_flag(unknown[0], config, prog, default))
    assert parsed is not None
    check_numbers(parsed)
    return parsed


def check_numbers(config: Any, prefix: str | None = None) -> None:
    """Checks all numbers once: comparisons with NaN are false, so range checks alone would let it pass.

    Messages name a field with `prefix` and the fields that it is within, or, where that is None, by itself.

    Raises:
        InputError: a value that is infinite, not a number, or a whole number of more than 63 bits.
    """
    for name, value in vars(config).items():
        if is_dataclass(value):
            check_numbers(value, None if prefix is None else f"{prefix}{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{prefix or ''}{name}: {number} is not finite; give a number")
            if isinstance(number, int) and abs(number) >= 1 << 63:
                raise InputError(f"{prefix or ''}{name}: {number} is too large; give a smaller number")


def check_least(config: Any, **least: float) -> None:
    """Raises InputError for a field below its least value."""
    for name, bound in least.items():
        if (value := getattr(config, name)) < bound:
            raise InputError(f"{name}: {value} must be at least {bound}")


def check_within(config: Any, low: float, high: float, *names: str) -> None:
    """Raises InputError for a field that is not within `low` and `high`."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise InputError(f"{name}: {getattr(config, name)} must lie between {low} and {high}")


def one_line(box: str) -> str:
    """tyro's error box as one line: without its frame, its title and the help text of the argument."""
    lines = [re.sub(r"^[│╭╰|+]|[│╮╯|+]$", "", line.strip()).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if re.search(r"\w", line))
    text = re.split(r"Argument helptext:|For full helptext|Got errors:", text)[0]
    # A nested configuration's own message names the field already.
    return re.sub(r"^config[.\w]*: ", "", text.replace("Error parsing ", "")).strip(" .")


def unknown_flag(flag: str, config: type[object], prog: str, default: object | None) -> str:
    """One line on a flag that does not exist: the flag, its nearest neighbours, where all of them are listed."""
    known = sorted({word.rstrip(",") for word in help_text(config, prog, default).split() if word.startswith("--")})
    near = difflib.get_close_matches(flag, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known flags: {', '.join(known)}."
    return f"{flag}: {prog} has no such argument; {hint} `{prog} --help` explains all of them"


def help_text(config: type[object], prog: str, default: object | None = None) -> str:
    """The text that `--help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(config, args=["--help"], prog=prog, default=default, config=MARKS)
    return printed.getvalue()


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"– {self.unit}/s")


class _Bars(Progress):
    """Progress with each task's note on a line of its own, so that a long one does not squeeze the bar."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", style="dim", no_wrap=True, overflow="ellipsis")


class Bar:
    """One progress bar; `advance` is safe to call from any thread. A log file gets a line a minute before it."""

    def __init__(self, bars: Progress, description: str, total: float | None, completed: int = 0) -> None:
        self._progress, self._told = bars, time.monotonic()
        self._task = bars.add_task(description, total=total, completed=completed, note="")

    @staticmethod
    def silent() -> "Bar":
        """A bar that prints nothing, for processes that do not lead."""
        return Bar(Progress(disable=True), "", None)

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Moves the bar by `amount` units and, if given, replaces the note at its end."""
        if note is None:
            self._progress.update(self._task, advance=amount)
        else:
            self._progress.update(self._task, advance=amount, note=note)
        if time.monotonic() - self._told > MINUTE and not (self._progress.disable or console.is_terminal):
            self._told = time.monotonic()
            task = self._progress.tasks[self._task]
            total = "" if task.total is None else f" of {task.total:,.0f}"
            line = f"{task.description} {task.completed:,.0f}{total}  {task.fields['note']}"
            console.print(line.rstrip(), highlight=False)


@contextmanager
def progress(description: str, total: float | None, unit: str, completed: int = 0) -> Iterator[Bar]:
    """A progress bar on stderr with count, rate in `unit` per second and time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with _Bars(*columns, console=console, refresh_per_second=4) as bars:
        yield Bar(bars, description, total, completed)


def speaks() -> bool:
    """Whether this process speaks for all of its job: under torchrun, the leading one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """A line on stderr about what a job does."""
    if speaks():
        console.print(message, highlight=False)


def warn(message: str) -> None:
    """A line on stderr that something was left out or changed, while the job goes on."""
    if speaks():
        console.print(Text.assemble(("warning:", "yellow"), f" {message}"), highlight=False)


def fail(message: str, code: int = 2) -> int:
    """Prints what went wrong and returns the exit code for it: 2, a user's mistake."""
    print(f"hardviews: {message}", file=sys.stderr)
    return code
