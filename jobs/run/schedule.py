"""Learning-rate and weight-decay schedules: pure functions of the step."""

import math


def warmup_cosine(step: int, total: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Value at `step` (0 to total): linear from 0 to `peak` over `warmup` steps, then half a cosine to `final`.

    The first step already learns: step 0 of a warm-up of w steps has peak / w.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, final)


def cosine(step: int, total: int, start: float, final: float) -> float:
    """Half a cosine from `start` at step 0 to `final` at step `total`, constant behind it."""
    share = min(step / total, 1.0) if total > 0 else 1.0
    return final + (start - final) * (1 + math.cos(math.pi * share)) / 2
