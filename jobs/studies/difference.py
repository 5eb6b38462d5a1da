"""What one arm has more than another, over the seeds that both were run with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A paired difference of two arms."""

    mean: float
    low: float | None
    """Ends of the 95 % interval over seeds (Student's t); None for a single seed."""
    high: float | None
    seeds: int
    """Seeds that both arms have."""


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Of `one` less `other`, value by seed each; None where they share no seed."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    values = np.array([one[seed] - other[seed] for seed in shared])
    mean, count = float(values.mean()), len(shared)
    if count == 1:
        return Difference(mean, None, None, 1)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Difference(mean, mean - half, mean + half, count)


def in_points(found: Difference | None) -> str:
    """+3.1 (+1.2 to +5.0, 3 seeds), of shares in percentage points."""
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.1f} (1 seed)"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}, {found.seeds} seeds)"
