"""Kornia's operations with our parameters against torchvision's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.benches.accuracy import Case, cases, neutral, torchvision_views, ways
from pipelines.exact import exact

CASES = cases(48, photographs=2)
EXACT = ways("cpu")["exact (cpu)"]


@pytest.mark.parametrize("case", CASES, ids=[f"{c.operation}-{c.values}".replace(" ", "_") for c in CASES])
def test_exact_is_within_one_of_255(case: Case) -> None:
    apart = (EXACT(case) - torchvision_views(case, floating=True)).abs()
    assert apart.max() <= (1.03 if case.params.solarize.any() else 0.1)  # solarize jumps by 1 at its threshold
    assert apart.mean() < 0.02


def test_more_views_than_fit_one_step_and_crops_that_are_tensors() -> None:
    count, size = 130, 4
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    params = replace(neutral(count), gray=rng.random(count) < 0.5, solarize=rng.random(count) < 0.5)
    whole, single = torch.empty(count, 3, size, size), torch.empty(count, 3, size, size, dtype=torch.bfloat16)
    exact(crops, params, whole)
    for row in range(count):
        exact(torch.from_numpy(crops[row : row + 1]), params[row : row + 1], single[row : row + 1])
    assert torch.equal(whole.bfloat16(), single)
