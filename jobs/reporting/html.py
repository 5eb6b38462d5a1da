"""HTML from Python: text is escaped unless it is Markup already."""

from collections.abc import Callable
from html import escape as _escape

from jobs.run.terminal import warn
from shards.errors import InputError


class Markup(str):
    """Text that is HTML already and is never escaped again."""

    __slots__ = ()


def escape(content: object) -> Markup:
    """Any value as HTML text; Markup passes as it is."""
    return content if isinstance(content, Markup) else Markup(_escape(str(content), quote=True))


def join(*children: object) -> Markup:
    """Children one after another; None is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def attempt(make: Callable[[], Markup | str]) -> Markup | str:
    """A part of the page, or why it cannot be made: files may hold anything, and the other parts are worth having."""
    try:
        return make()
    except (InputError, OSError) as error:
        return f"This part could not be made: {error}."
    except Exception as error:
        reason = f"This part could not be made ({type(error).__name__}: {error})."
        warn(f"report: {reason}")
        return reason


# Elements that have no end tag in HTML.
VOID = frozenset({"img", "br", "hr", "meta", "link", "input", "col"})


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` is class, `aria_label` is aria-label; None and False leave an attribute out."""
    words = [name]
    for key, content in attributes.items():
        if content is None or content is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if content is True else f'{key}="{_escape(str(content), quote=True)}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in VOID else f"{start}{join(*children)}</{name}>")


def number(x: float, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, thousands marked, no trailing zeros."""
    if x != x:
        return "not a number"
    if x in (float("inf"), float("-inf")):
        return "∞" if x > 0 else "−∞"
    if x == int(x) and abs(x) < 1e15:
        return f"{int(x):,}".replace("-", "−")
    if abs(x) >= 1000:
        return f"{x:,.0f}".replace("-", "−")
    return f"{x:.{digits}g}".replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 as per cent."""
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def seconds(duration: float) -> str:
    """A duration in seconds as days, hours, minutes or seconds, whichever two fit best."""
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if duration >= length:
            rest = int(duration % length // part)
            return f"{int(duration // length)} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{duration:.1f} s" if duration >= 0.1 else f"{1000 * duration:.1f} ms"


def table(headers: list[str], rows: list[list[object]], caption: str | None = None, sortable: bool = True) -> Markup:
    """A table in a box that scrolls sideways on a phone; `sortable` headers are buttons.

    A cell that is a float or int is set right-aligned and sorts by value; a (value, text) tuple sorts by the first.
    """
    heads = [
        tag("th", tag("button", text, type="button", class_="sort") if sortable else text, scope="col")
        for text in headers
    ]
    body = [tag("tr", *(_cell(cell, first=i == 0) for i, cell in enumerate(row))) for row in rows]
    content = tag(
        "table",
        tag("caption", caption) if caption else None,
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_="sortable" if sortable else None,
    )
    # A box that scrolls must be reachable by keyboard, so that arrow keys can scroll it.
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")


def _cell(cell: object, first: bool) -> Markup:
    rank, text = cell if isinstance(cell, tuple) else (cell, cell)
    numeric = isinstance(rank, int | float) and not isinstance(rank, bool)
    if isinstance(rank, int | float) and numeric and not isinstance(cell, tuple):
        text = number(rank)
    return tag(
        "th" if first else "td",
        text,
        scope="row" if first else None,
        class_="number" if numeric and not first else None,
        data_value=rank if numeric else None,
    )
