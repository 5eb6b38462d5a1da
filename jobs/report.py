"""`hardviews report`: one self-contained HTML file about one or more runs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.reporting.page import page
from jobs.reporting.pictures import pictures
from jobs.reporting.rundata import read_run, told_apart
from jobs.run.terminal import parse, warn
from shards.errors import InputError

# A file to be mailed: pictures are halved until it fits.
LARGEST = 15_000_000


@dataclass(frozen=True)
class ReportConfig:
    """Writes one HTML file that needs no network: summary, curves, scores, hard views, importance, attention."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders; several are compared and can be switched between."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write; default: report.html in the first run folder."""
    images: int = 12
    """Images in each run's gallery of hard views; 0 = no pictures from shards at all."""


def write_report(runs: Sequence[Path], out: Path, images: int = 12) -> Path:
    """Writes the report of `runs` to `out` and returns it; parts that cannot be made are left out with the reason.

    Raises:
        InputError: a folder is no run; no folder is given; `out` cannot be written.
    """
    if not runs:
        raise InputError("runs: none given; name one run folder or more")
    data = told_apart([read_run(Path(run)) for run in runs])
    while True:
        text = page([dataclasses.replace(run, pictures=pictures(run, images)) for run in data])
        if len(text.encode()) < LARGEST or images == 0:
            break
        images //= 2
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"out: {out} cannot be written ({error.strerror}); choose another --out") from error
    return out


def main(argv: list[str]) -> None:
    config = parse(ReportConfig, argv, prog="hardviews report")
    if config.images < 0:
        raise InputError(f"images: {config.images} is negative; give 0 for none or how many to show")
    runs = [Path(run) for run in config.runs]
    if not runs:
        raise InputError("runs: none given; name one run folder or more")
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            warn(f"run: {run} has no metrics.jsonl; its curves are left out")
    print(write_report(runs, config.out or runs[0] / "report.html", config.images))
