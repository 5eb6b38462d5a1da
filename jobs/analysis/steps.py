"""Ranges of training steps, as users write them."""

from jobs.log.reader import Log
from shards.errors import InputError

ALL = (0, 2**62)


def parse_steps(text: str | None) -> tuple[int, int]:
    """`FIRST:BEHIND_LAST` → (first, behind the last); either may be left out, None is everything.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return ALL
    first, colon, last = text.partition(":")
    try:
        steps = int(first or ALL[0]), int(last or ALL[1])
    except ValueError:
        steps = (1, 0)
    if not colon or steps[0] < 0 or steps[0] >= steps[1]:
        raise InputError(f"steps: {text} is no range; give FIRST:BEHIND_LAST, for example 100:200, 100: or :200")
    return steps


def selected_steps(log: Log, steps: tuple[int, int]) -> tuple[int, int]:
    """The same steps, if the log has any of them.

    Raises:
        InputError: it has none.
    """
    if not log.count(steps):
        extent = "is empty" if not log.rows else "has steps {} to {}".format(*log.step_range)
        raise InputError(f"steps: {format_steps(steps)} holds no rows of the log {log.path}, which {extent}")
    return steps


def format_steps(steps: tuple[int, int]) -> str:
    """As a user would write the range."""
    return f"{steps[0]}:{'' if steps[1] == ALL[1] else steps[1]}"
