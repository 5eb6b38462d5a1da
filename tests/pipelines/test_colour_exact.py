"""Kornia's operations with our parameters against torchvision's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.benches.accuracy import Case, cases, drawn_views, edge_images, neutral, torchvision_views, ways
from jobs.benches.photographs import photograph
from pipelines.colour import SOLARIZE_FROM
from pipelines.colour_exact import exact

CASES = cases(48, photographs=2)
EXACT = ways("cpu")["exact (cpu)"]


IMAGES = [photograph(seed)[:48, :48] for seed in range(2)] + edge_images(48)


@pytest.mark.parametrize("case", CASES, ids=[f"{c.operation}-{c.values}".replace(" ", "_") for c in CASES])
def test_exact_is_within_one_of_255(case: Case) -> None:
    apart = (EXACT(case) - torchvision_views(case, floating=True)).abs()
    assert apart.max() <= (1 if case.params.solarize.any() else 0.002)
    assert apart.mean() < 0.001


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["byol", "simclr"])
def test_whole_policies_are_within_one_of_255(policy: str, seed: int) -> None:
    params, crops = drawn_views(policy, 48, IMAGES, seed)
    none = np.zeros(len(params), np.bool_)
    for views, bound in ((replace(params, solarize=none), 0.001), (replace(params, solarize=~none), 1)):
        case = Case("whole policy", policy, views, crops)
        apart = (EXACT(case) - torchvision_views(case, floating=True)).abs()
        assert apart.max() <= bound
        assert apart.mean() < 0.05 * bound


def test_values_that_rounding_puts_on_either_side_of_the_threshold_stay_within_one_of_255() -> None:
    """A flat image at the threshold, blurred: rounding puts it on one side in torchvision, on the other in Kornia."""
    sigmas = np.linspace(0.1, 2, 96, dtype=np.float32)
    crops = np.full((len(sigmas), 48, 48, 3), SOLARIZE_FROM, np.uint8)
    blurred = replace(neutral(len(sigmas)), blur=sigmas)
    case = Case("solarize", "ties", replace(blurred, solarize=np.ones(len(sigmas), np.bool_)), crops)
    reference = torchvision_views(case, floating=True)
    assert set(reference.round().unique().tolist()) == {127, 128}
    assert (EXACT(case) - reference).abs().max() <= 1


def test_a_value_at_the_threshold_is_inverted_and_the_others_are_torchvisions() -> None:
    crops = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    case = Case("solarize", "all values", replace(neutral(1), solarize=np.ones(1, np.bool_)), crops)
    assert (EXACT(case) - torchvision_views(case, floating=True)).abs().max() < 1e-4


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
