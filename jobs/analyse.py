"""`hardviews analyse RUN…`: which pairs are chosen and what makes a pair hard, from the augmentation log (HVP, section
6.1, appendices E and F)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jobs.analysis import output, plots
from jobs.analysis.choices import DISTANCE_EDGES, HISTOGRAMS, ZOOM_EDGES, Choices
from jobs.analysis.classifier import predict_choice
from jobs.analysis.importance import PUBLISHED, TRAPS, importance
from jobs.analysis.sample import PairData, RowSample, pair_data
from jobs.analysis.steps import parse_steps, selected_steps
from jobs.log.reader import Log, Rows, open_log
from jobs.run.folder import RunFolder, write_json
from jobs.run.terminal import parse, progress, warn
from shards.errors import InputError

SCHEMA_VERSION = 1
MIN_PAIRS = 1_000
"""Fewer pairs than this say nothing about importance."""
FULL_PAIRS = 50_000
"""From here on the forests have their full number of trees; below, half."""


@dataclass(frozen=True)
class AnalyseConfig:
    """Analyses the augmentation log of one or more runs. Each gets RUN/analysis with analysis.json, CSV tables and
    pictures (PNG, SVG); several runs are compared as well. docs/log.md describes the files."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, as given to `pretrain --run`."""
    steps: str | None = None
    """Steps to analyse, FIRST:BEHIND_LAST; either may be left out (100: or :100). All by default."""
    pairs: int = 300_000
    """Candidate pairs to sample for the forests and the classifier; statistics of the choices use all rows."""
    seed: int = 0
    """Seed of the sample, the random pairs and the forests."""
    pictures: bool = True
    """Draw PNG and SVG pictures; without them only JSON and CSV."""
    out: Path | None = None
    """Folder for the comparison of several runs; FIRST_RUN/analysis/comparison by default."""


def analyse(
    run: Path, *, steps: str | None = None, pairs: int = 300_000, seed: int = 0, pictures: bool = True
) -> dict[str, Any]:
    """Analyses one run, writes RUN/analysis and returns the content of its analysis.json.

    What cannot be computed is left out, with the reason under `notes`. `pairs` bounds the time: 300,000 take about a
    minute on 2 cores, 30,000 a few seconds.

    Raises:
        InputError: no log, or no rows in those steps.
    """
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed: {seed} must lie between 0 and {(1 << 32) - 1}")
    log = open_log(RunFolder(run).log)
    window = selected_steps(log, parse_steps(steps))
    if pairs < MIN_PAIRS:
        raise InputError(f"pairs: {pairs} are too few to fit anything; give at least {MIN_PAIRS}")
    choices, sample, notes = _read(log, window, pairs, seed)
    analysis: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "run": run.name,
        "log_rows": log.rows,
        "rows": choices.rows,
        "views": log.views,
        "scored_views": log.scored,
    }
    analysis |= _choices(choices, notes)
    analysis |= _explained(sample, pairs, seed, notes)
    analysis["notes"] = notes
    folder = RunFolder(run).analysis
    folder.mkdir(parents=True, exist_ok=True)
    output.write_tables(analysis, folder)
    if pictures:
        plots.draw_all(analysis, folder)
    write_json(folder / "analysis.json", analysis)
    return analysis


def _read(log: Log, window: tuple[int, int], pairs: int, seed: int) -> tuple[Choices, Rows | None, list[str]]:
    """One pass over the log: the statistics of choices, and a sample of rows whose pairs have losses."""
    notes: list[str] = []
    first, last = log.step_range
    steps = max(window[0], first), min(window[1] - 1, last)
    # Choices by the rule on scores, without scores, and at random: the first kind that the log has is analysed.
    scored, unscored, at_random = kinds = [Choices(steps, log.sources, seed=seed) for _ in range(3)]
    # At random with respect to everything, so that a row has the same chance whatever its step.
    sample = RowSample(-(-pairs // max(log.scored * (log.scored - 1) // 2, 1)), seed)
    with progress("analyse", log.count(window), "images") as bar:
        for rows in log.chunks(steps=window):
            by_rule = (rows.choice_B >= 0) & ~rows.at_random_B
            has_losses = np.isfinite(rows.loss_BP).all(1)
            scored.add(rows[np.flatnonzero(by_rule & has_losses)])
            unscored.add(rows[np.flatnonzero(by_rule & ~has_losses)])
            at_random.add(rows[np.flatnonzero(rows.at_random_B)])
            sample.add(rows[np.flatnonzero(has_losses)])
            bar.advance(len(rows))
    choices = next((kind for kind in kinds if kind.rows), scored)
    if choices is scored and unscored.rows:
        notes.append(
            f"{unscored.rows} rows that were not scored are left out of the statistics of choices, which are over "
            f"{scored.rows} rows"
        )
    if choices is not at_random and at_random.rows:
        notes.append(
            f"{at_random.rows} rows that trained on a random pair on steps that chose by the rule are left out of the "
            f"statistics of choices, which are over {choices.rows} rows"
        )
    kept = sample.rows()
    if kept is None:
        notes.append("losses: no pair of this log has a loss; importance and the classifier are left out")
    if steps[0] == steps[1]:
        notes.append(f"steps: the log has the one step {steps[0]}; series over training are a single point")
    return choices, kept, notes


def _choices(choices: Choices, notes: list[str]) -> dict[str, Any]:
    """Everything about which pairs are chosen."""
    if not choices.rows:
        notes.append("choice: the log records no chosen pair; the statistics of choices are left out")
        return {"lowest_iou_share": None, "chance": None}
    total = choices.total()
    by_class = choices.by_class()
    if not by_class:
        notes.append("labels: the log has none; the table by class is left out")
    iou = {kind: counts.astype(int).tolist() for kind, counts in choices.histograms["iou"].items()}
    return {
        "lowest_iou_share": total["lowest_iou_share"],
        "chance": total["chance"],
        "choices": total,
        "iou_histograms": {"edges": HISTOGRAMS["iou"].tolist(), **iou},
        "histograms": {
            name: {
                "edges": HISTOGRAMS[name].tolist(),
                **{kind: counts.astype(int).tolist() for kind, counts in kinds.items()},
            }
            for name, kinds in choices.histograms.items()
        },
        "zoom_distance": _grid(choices),
        "over_training": choices.over_training(),
        "by_source": choices.by_source(),
        "by_class": by_class,
    }


def _grid(choices: Choices) -> dict[str, Any] | None:
    """How much more often than at random a zoom and distance is chosen; None where every cell has too few pairs."""
    chosen, everything = choices.grids["chosen"], choices.grids["all"]
    expected = everything * chosen.sum() / everything.sum()
    enough = expected >= 5
    if not enough.any():
        return None
    lift = np.divide(chosen, expected, out=np.zeros_like(chosen), where=enough)
    return {
        "zoom_edges": ZOOM_EDGES.tolist(),
        "distance_edges": DISTANCE_EDGES.tolist(),
        "lift": [
            [float(value) if known else None for value, known in zip(*row, strict=True)]
            for row in zip(lift, enough, strict=True)
        ],
    }


def _explained(sample: Rows | None, pairs: int, seed: int, notes: list[str]) -> dict[str, Any]:
    """How far the views' parameters explain the loss and the choice."""
    if sample is None:
        return {}
    data = pair_data(sample)
    if len(data.loss_R) < MIN_PAIRS or data.images < 2 or data.loss_R.std() == 0:
        notes.append(
            f"importance: {len(data.loss_R)} pairs of {data.images} images are too few to explain a loss "
            f"(from {MIN_PAIRS} pairs on); left out"
        )
        return {}
    full = len(data.loss_R) >= FULL_PAIRS
    result = importance(data, *((12, 12) if full else (8, 8)), seed=seed)
    details = asdict(result)
    details |= {"published": PUBLISHED, "traps": list(TRAPS), "over_training_share": _time_share(data)}
    explained: dict[str, Any] = {"importance": details["loss"], "importance_details": details}
    chosen = sample[np.flatnonzero((sample.choice_B >= 0) & ~sample.at_random_B)]
    prediction = predict_choice(chosen, seed, 150 if full else 50) if len(chosen) else None
    if prediction is None:
        notes.append("classifier: fewer than 20 images have a pair chosen by its loss; left out")
        return explained
    return explained | {"classifier": asdict(prediction)}


def _time_share(data: PairData) -> float:
    """Share of the loss's variance between 50 windows of training: drift, which no metric can explain."""
    window_R = (data.step_R - data.step_R.min()) * 50 // (np.ptp(data.step_R) + 1)
    count = np.bincount(window_R)
    means = np.bincount(window_R, data.loss_R) / np.maximum(count, 1)
    return float(count @ (means - data.loss_R.mean()) ** 2 / len(data.loss_R) / data.loss_R.var())


def main(argv: list[str]) -> None:
    """Runs `hardviews analyse`."""
    config = parse(AnalyseConfig, argv, prog="hardviews analyse")
    if not config.runs:
        raise InputError("runs: none given; name at least one run folder")
    analyses: dict[str, dict[str, Any]] = {}
    for run in config.runs:
        try:
            analyses[str(run)] = analyse(
                run, steps=config.steps, pairs=config.pairs, seed=config.seed, pictures=config.pictures
            )
        except InputError as error:
            if len(config.runs) == 1:
                raise
            warn(f"{error}; left out")
    if not analyses:
        raise InputError(f"runs: none of the {len(config.runs)} could be analysed")
    for run, analysis in analyses.items():
        print("\n".join(output.summary(analysis)))
        for note in analysis["notes"]:
            warn(note)
        print(f"  {RunFolder(Path(run)).analysis}")
    if len(analyses) > 1:
        out = config.out or RunFolder(Path(next(iter(analyses)))).analysis / "comparison"
        output.write_comparison(analyses, out, config.pictures)
        print(f"comparison: {out}")
