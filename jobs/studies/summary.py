"""Means, deviations and differences of a study's arms."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.studies.difference import Difference, difference
from jobs.studies.plan import Study
from jobs.studies.results import MEASURES, RunResult


def summarise(results: Sequence[RunResult]) -> dict[str, dict[str, Any]]:
    """Of runs that are done, by arm: each measure, and images per second, as `spread` gives them; verdicts by name with
    their counts."""
    summary: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(result.arm for result in results):
        done = [result for result in results if result.arm == arm and result.state == "done"]
        measures = dict.fromkeys(name for result in done for name in result.scores)
        summary[arm] = {name: spread({r.seed: r.scores[name] for r in done if name in r.scores}) for name in measures}
        speeds = {result.seed: result.images_per_second for result in done if result.images_per_second}
        summary[arm]["images_per_second"] = spread(speeds) if speeds else None
        summary[arm]["verdicts"] = dict(Counter(result.verdict for result in done if result.verdict))
    return summary


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one), number, values and their seeds, of values by seed."""
    numbers = list(values.values())
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "std": deviation, "n": len(numbers), "values": numbers, "seeds": [*values]}


def beside(results: Sequence[RunResult]) -> dict[str, dict[str, Any]]:
    """What the scores have to be read beside, as `spread` gives it: of raw pixels and of untrained features."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("pixels", "untrained"):
        own = {result.seed: scores for result in results if (scores := getattr(result, name))}
        measures = dict.fromkeys(measure for scores in own.values() for measure in scores)
        found[name] = {m: spread({seed: scores[m] for seed, scores in own.items() if m in scores}) for m in measures}
    return found


def by_seed(measured: Mapping[str, Any]) -> dict[int, float]:
    """Values by seed of what `spread` gave."""
    return dict(zip(measured["seeds"], measured["values"], strict=True))


def compared(summary: Mapping[str, Mapping[str, Any]], chosen: Study) -> dict[str, dict[str, dict[str, Difference]]]:
    """arm → the arm that it is compared with → measure → their paired difference; and in a study of costs under
    `same time` that from random pairs of as long a training, read off between the lengths that there are."""
    compared: dict[str, dict[str, dict[str, Difference]]] = {}
    for arm, own in summary.items():
        compared[arm] = {}
        measures = [name for name in MEASURES if name in own]
        other = chosen.against.get(arm, next(iter(chosen.arms)))
        others = {m: by_seed(summary[other][m]) for m in measures if m in summary.get(other, {})}
        if arm != other:
            compared[arm][other] = differences(own, others)
        if arm in chosen.time and arm not in chosen.plain:
            at = {m: plain_at(summary, chosen, m, chosen.time[arm]) for m in measures}
            compared[arm]["same time"] = differences(own, at)
    return compared


def differences(own: Mapping[str, Any], others: Mapping[str, Mapping[int, float]]) -> dict[str, Difference]:
    """By measure, of an arm's summary less other values by seed; where seeds are shared."""
    pairs = {measure: difference(by_seed(own[measure]), values) for measure, values in others.items()}
    return {measure: pair for measure, pair in pairs.items() if pair is not None}


def plain_at(summary: Mapping[str, Mapping[str, Any]], chosen: Study, measure: str, time: float) -> dict[int, float]:
    """By seed: a measure of random pairs after a training of length `time`, on a line over the logarithm of time
    between that seed's next shorter and next longer run; nothing beyond them."""
    known = [arm for arm in chosen.plain if measure in summary.get(arm, {})]
    points: dict[int, list[tuple[float, float]]] = {}
    for arm in sorted(known, key=lambda arm: chosen.time[arm]):
        for seed, value in by_seed(summary[arm][measure]).items():
            points.setdefault(seed, []).append((chosen.time[arm], value))
    curves = {seed: np.array(own).T for seed, own in points.items()}
    return {
        seed: float(np.interp(np.log(time), np.log(lengths), values))
        for seed, (lengths, values) in curves.items()
        if lengths[0] <= time <= lengths[-1]
    }
