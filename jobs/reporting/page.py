"""The whole page: head, run tabs, one panel per run."""

import datetime
from collections.abc import Sequence
from functools import partial

from jobs.reporting.compare import comparison
from jobs.reporting.html import Markup, attempt, join, tag
from jobs.reporting.rundata import RunData
from jobs.reporting.script import SCRIPT
from jobs.reporting.sections import SECTIONS
from jobs.reporting.style import STYLE

# Nothing may be fetched: a report opened from disk or from a mail must not call anywhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(runs: Sequence[RunData]) -> str:
    """One HTML document about `runs`; several get a comparison first."""
    panels = [("compare", "All runs", _comparison_panel(runs))] if len(runs) > 1 else []
    panels += [(f"run-{i}", run.name, _run_panel(run, f"run-{i}")) for i, run in enumerate(runs)]
    tabs = [
        tag("button", name, role="tab", type="button", id=f"tab-{key}", aria_controls=key,
            aria_selected="true" if i == 0 else "false", tabindex=None if i == 0 else "-1")
        for i, (key, name, _) in enumerate(panels)
    ]  # fmt: skip
    several = len(panels) > 1
    bodies = [
        tag("main" if not several else "div", content, id=key, class_="panel", hidden=i > 0,
            role="tabpanel" if several else None, aria_labelledby=f"tab-{key}" if several else None)
        for i, (key, _, content) in enumerate(panels)
    ]  # fmt: skip
    names = ", ".join(run.name for run in runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{names} · hardviews report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    bar = tag(
        "div",
        tag("span", "hardviews", tag("span", " report"), class_="brand"),
        tag("div", *tabs, role="tablist", aria_label="Runs") if several else None,
        tag("button", "◐ Auto", type="button", class_="theme", title="Colours: the system's, light, dark"),
    )
    body = tag(
        "body",
        tag("a", "Skip to content", href=f"#{panels[0][0]}", class_="skip"),
        tag("header", bar, class_="top"),
        *([tag("main", *bodies)] if several else bodies),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _run_panel(run: RunData, key: str) -> Markup:
    links = [tag("li", tag("a", title, href=f"#{key}-{name}")) for name, title, _, _ in SECTIONS]
    blocks = []
    for name, title, intro, section in SECTIONS:
        content = attempt(partial(section, run))
        missing = not isinstance(content, Markup)
        blocks.append(
            tag(
                "section",
                tag("h2", title),
                tag("p", intro) if intro and not missing else None,
                tag("p", content, class_="missing") if missing else content,
                id=f"{key}-{name}",
            )
        )
    return join(
        tag("nav", tag("ol", *links), class_="contents", aria_label=f"Sections of {run.name}"),
        tag("div", tag("h1", run.name), tag("p", attempt(lambda: lead(run)), class_="lead"), *blocks, _foot()),
    )


def lead(run: RunData) -> str:
    """One sentence on what the run is."""
    objective = run.setting("objective.name", "objective", "preset")
    backbone = run.setting("backbone.name", "backbone")
    views, rule = run.setting("selection.views"), run.setting("selection.rule")
    words = [str(x) for x in (objective, f"on {backbone}" if backbone else None) if x]
    if views:
        words.append(f"with {views} views per image" + (f", {str(rule).replace('_', ' ')} pair chosen" if rule else ""))
    began = next((line["time"] for line in run.metrics if "time" in line), None)
    if began:
        words.append(f"· begun {datetime.datetime.fromtimestamp(began).strftime('%-d %B %Y, %H:%M')}")
    return " ".join(words)


def _comparison_panel(runs: Sequence[RunData]) -> Markup:
    nav = tag(
        "nav",
        tag("ol", tag("li", tag("a", "Comparison", href="#comparison"))),
        class_="contents",
        aria_label="Sections",
    )
    title = tag("h1", f"{len(runs)} runs side by side")
    return join(nav, tag("div", title, tag("section", attempt(lambda: comparison(runs)), id="comparison"), _foot()))


def _foot() -> Markup:
    now = datetime.datetime.now().strftime("%-d %B %Y, %H:%M")
    return tag("footer", f"Made by hardviews on {now}. This file needs no network.")
