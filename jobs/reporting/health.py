"""Signs of a run's health. Loss alone is a poor one: MoBY's rose from 7 to 16 with infinite gradients and still gave
74.4 %; so kNN, feature spread, rank and gradient norms count here."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jobs.reporting.html import number, percent
from jobs.reporting.rundata import RunData

State = Literal["good", "warn", "bad"]


@dataclass(frozen=True)
class Check:
    """One sign: its name, how it looks, and the figures behind that."""

    name: str
    state: State
    text: str


def checks(run: RunData) -> list[Check]:
    """Every sign that the run's files allow."""
    signs = [
        _verdict(run),
        _state(run),
        _loss(run),
        _knn(run),
        *_collapse(run),
        _gradients(run),
        _quarantine(run),
    ]
    signs += [Check("Files", "bad", problem) for problem in run.problems]
    return [check for check in signs if check is not None]


def _verdict(run: RunData) -> Check | None:
    """The verdict that was given while training; it stands on top, because the other signs prove no learning."""
    name = run.state.get("verdict")
    if name is None:
        return None
    marks: dict[str, State] = {"learning": "good", "not-learning-yet": "warn"}
    advice = f"; what to try first: {run.state['verdict_advice']}" if run.state.get("verdict_advice") else ""
    return Check("Verdict", marks.get(name, "bad"), f"{name}: {run.state.get('verdict_reason', '')}{advice}")


def _state(run: RunData) -> Check | None:
    state = run.state.get("state")
    if state is None:
        return None
    marks: dict[str, State] = {"finished": "good", "running": "good", "interrupted": "warn"}
    reason = run.state.get("reason") or run.state.get("error")
    return Check("State", marks.get(state, "bad"), f"{state}{f': {reason}' if reason else ''}")


def _loss(run: RunData) -> Check | None:
    _, loss = run.series("train/loss")
    if not len(loss):
        return Check("Loss", "warn", "was never logged")
    broken = int((~np.isfinite(loss)).sum())
    if broken:
        return Check("Loss", "bad", f"{broken} of {len(loss)} values are not finite")
    _, chance = run.series("train/chance")
    beside = f", chance {number(float(chance[-1]))}" if len(chance) else ""
    state: State = "warn" if len(chance) and loss[-1] >= chance[-1] else "good"
    return Check("Loss", state, f"{number(float(loss[0]))} → {number(float(loss[-1]))}{beside}")


def _knn(run: RunData) -> Check | None:
    _, top1 = run.series("knn/top1")
    if len(top1) < 2:
        return None
    gain = 100 * (top1[-1] - top1[0])
    drop = 100 * (top1.max() - top1[-1])
    text = f"{percent(top1[0])} → {percent(top1[-1])}, best {percent(top1.max())}"
    if gain <= 0:
        return Check("kNN", "bad", f"{text}: not above the untrained backbone")
    return Check(
        "kNN", "warn" if drop > 2 else "good", text + (f": {drop:.1f} points below its best" if drop > 2 else "")
    )


def _collapse(run: RunData) -> list[Check]:
    signs = []
    for name in run.names():
        last, first = run.last(name), run.series(name)[1]
        if last is None or not len(first):
            continue
        if name.endswith("feature_std"):
            # ℓ2-normalised features of width D that fill their sphere have a deviation of 1/√D per dimension; 0 is
            # collapse. The width is not in the metrics, so a fall to a tenth of the start is the sign.
            bad = last < 0.1 * float(first[0])
            signs.append(
                Check(
                    "Feature spread",
                    "bad" if bad else "good",
                    f"{number(last)} per dimension, {number(float(first[0]))} at the start",
                )
            )
        if name.endswith("rankme"):
            # Healthy runs of BYOL kept 0.7 of it, one that learned nothing under too strong views 0.4.
            state: State = "bad" if last < 2 else "warn" if last < 0.5 * float(first[0]) else "good"
            text = f"{number(last, 3)} effective dimensions, {number(float(first[0]), 3)} at the start"
            signs.append(Check("RankMe", state, text))
    return signs


def _gradients(run: RunData) -> Check | None:
    name = next((n for n in run.names() if n.endswith(("grad_norm", "gradient_norm"))), None)
    if name is None:
        return None
    norms = run.series(name)[1]
    broken = int((~np.isfinite(norms)).sum())
    if broken:
        return Check("Gradients", "warn", f"{broken} of {len(norms)} norms are not finite; those steps were skipped")
    median = float(np.median(norms))
    peak = float(norms.max())
    return Check(
        "Gradients",
        "good" if peak < 50 * max(median, 1e-12) else "warn",
        f"norm {number(median)} (median), {number(peak)} (highest)",
    )


def _quarantine(run: RunData) -> Check:
    count = len(run.quarantine)
    if not count:
        return Check("Data", "good", "no sample had to be put aside")
    return Check("Data", "warn", f"{count} samples could not be read and were replaced")
