"""Fused colour operations, by OpenCV and by torch, against torchvision's for the same parameters.

The torch path runs here on the CPU; tests/pipelines/test_gpu.py runs the same on a CUDA device.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.benches.accuracy import Case, cases, edge_images, neutral, torchvision_views, ways
from pipelines.colour import MEAN, STD, plan_colour
from pipelines.colour_device import fused_on_device
from pipelines.colour_host import fused
from pipelines.params import FIELDS, JITTER_ORDERS, ViewParams

SIZE = 48
CASES = cases(SIZE, photographs=2)
IDS = [f"{case.operation}-{case.values}".replace(" ", "_") for case in CASES]
WAYS = ways("cpu")
FUSED, IN_TORCH = (WAYS[name] for name in ("fused", "fused in torch (cpu)"))


@pytest.mark.parametrize("compute", [FUSED, IN_TORCH], ids=["opencv", "torch"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_operation_is_near_torchvision(case: Case, compute: Callable[[Case], Tensor]) -> None:
    apart = (compute(case) - torchvision_views(case, floating=True)).abs()
    assert apart.mean() < 0.5
    if not case.values.startswith("drawn"):  # one operation alone: rounding only; solarize jumps by 1 at its threshold
        assert apart.max() <= 1.001


@pytest.mark.parametrize("order", range(len(JITTER_ORDERS)))
def test_every_order_of_the_jitter_is_torchvisions_where_nothing_clamps(order: int) -> None:
    rng = np.random.default_rng(order)
    images = 60 + rng.integers(0, 100, (3, SIZE, SIZE, 3), dtype=np.uint8)
    params = replace(
        neutral(3),
        jitter=np.ones(3, np.bool_),
        brightness=rng.uniform(0.8, 1.2, 3).astype(np.float32),
        contrast=rng.uniform(0.8, 1.2, 3).astype(np.float32),
        saturation=rng.uniform(0.8, 1.2, 3).astype(np.float32),
        hue=rng.uniform(-0.5, 0.5, 3).astype(np.float32),
        order=np.full(3, order, np.uint8),
    )
    case = Case("jitter", "unclamped", params, images)
    reference = torchvision_views(case, floating=True)
    assert reference.min() > 0
    assert reference.max() < 255
    assert (IN_TORCH(case) - reference).abs().max() < 0.01
    # Three roundings to uint8, the first two of them stretched by what follows (hue up to threefold).
    assert (FUSED(case) - reference).abs().max() < 3.5
    assert (FUSED(case) - reference).abs().mean() < 0.5


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.operation == "all four of the jitter"], ids=["byol", "simclr"]
)
def test_clamped_jitter_is_torchvisions_where_values_leave_the_range(case: Case) -> None:
    """Fused, a pixel that one operation drives past white and the next brings back is up to 50/255 off."""
    reference = torchvision_views(case, floating=True)
    assert (IN_TORCH(case) - reference).abs().max() > 5
    assert (WAYS["clamped in torch (cpu)"](case) - reference).abs().max() < 0.02
    apart = (WAYS["clamped"](case) - reference).abs()  # four roundings to uint8, each stretched by what follows
    assert apart.max() < 6 and apart.mean() < 0.5


def test_clamping_plans_a_map_for_each_operation_that_may_leave_the_range() -> None:
    """Brightness 1.5, contrast 0.5, saturation 1.2 and hue, in two orders."""
    orders = [JITTER_ORDERS.index(order) for order in ((0, 1, 2, 3), (1, 0, 3, 2))]
    params = replace(
        neutral(2),
        jitter=np.ones(2, np.bool_),
        brightness=np.full(2, 1.5, np.float32),
        contrast=np.full(2, 0.5, np.float32),
        saturation=np.full(2, 1.2, np.float32),
        hue=np.full(2, 0.1, np.float32),
        order=np.array(orders, np.uint8),
    )
    plan = plan_colour(params, clamp=True)
    assert [maps.active_V.tolist() for maps in plan.before] == [[True, True], [True, False], [False, False]]
    assert [maps.active_V.tolist() for maps in plan.after] == [[False, True], [False, False], [False, False]]


def test_without_operations_only_the_normalisation_is_left() -> None:
    crops = np.stack(edge_images(8))
    for function, given in ((fused, crops), (fused_on_device, torch.from_numpy(crops))):
        out = torch.full((len(crops), 3, 8, 8), torch.nan)
        function(given, neutral(len(crops)), out)
        mean, std = (np.array(values) for values in (MEAN, STD))
        expected = ((crops / 255 - mean) / std).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


def test_factors_of_a_view_without_jitter_are_not_read() -> None:
    params = replace(neutral(1), brightness=np.full(1, 2, np.float32), hue=np.full(1, 0.3, np.float32))
    crop, plain, other = (
        np.full((1, 4, 4, 3), (10, 60, 200), np.uint8),
        torch.empty(1, 3, 4, 4),
        torch.empty(1, 3, 4, 4),
    )
    fused(crop, neutral(1), plain)
    fused(crop, params, other)
    assert torch.equal(plain, other)


def test_a_view_does_not_depend_on_its_neighbours_threads_or_the_shape_of_the_parameters() -> None:
    case = next(case for case in CASES if case.operation == "whole policy")
    count = len(case.crops_VSS3)
    before = case.crops_VSS3.copy()
    together, threaded, alone = (torch.empty(count, 3, SIZE, SIZE) for _ in range(3))
    in_pairs = ViewParams(**{name: getattr(case.params, name).reshape(-1, 2) for name in FIELDS})
    fused(case.crops_VSS3, in_pairs, together)

    def one(out: Tensor, row: int) -> None:
        fused(case.crops_VSS3[row : row + 1], case.params[row : row + 1], out[row : row + 1])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(partial(one, threaded), range(count)))
    for row in range(count):
        one(alone, row)
    assert torch.equal(together, threaded)
    assert torch.equal(together, alone)
    assert np.array_equal(before, case.crops_VSS3)


def test_a_thread_can_change_the_size_of_its_views() -> None:
    large, small = (next(c for c in cases(size, 1) if c.operation == "whole policy") for size in (40, 24))
    first = FUSED(large)
    FUSED(small)
    assert torch.equal(FUSED(large), first)


def test_bfloat16_output_and_float_crops_on_the_device_path() -> None:
    case = next(case for case in CASES if case.operation == "whole policy")
    crops = torch.from_numpy(case.crops_VSS3)
    shape = (len(crops), 3, SIZE, SIZE)
    full, half, from_floats = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape)
    fused_on_device(crops, case.params, full)
    fused_on_device(crops, case.params, half)
    fused_on_device(crops.permute(0, 3, 1, 2) / 255, case.params, from_floats)
    assert torch.equal(full.bfloat16(), half)
    assert torch.equal(full, from_floats)


def test_the_plan_skips_what_changes_nothing() -> None:
    params = replace(
        neutral(3),
        jitter=np.array([True, True, False]),
        hue=np.array([0.1, 0, 0.1], np.float32),
        contrast=np.array([1, 0.5, 0.5], np.float32),
    )
    plan = plan_colour(params)
    (before,), (after,) = plan.before, plan.after
    assert before.active_V.tolist() == [False, True, False]
    assert not after.active_V.any()
    assert (plan.sextants_V != 0).tolist() == [True, False, False]
    assert not plan.exchange_V.any()


@pytest.mark.parametrize("compute", [FUSED, IN_TORCH, WAYS["exact (cpu)"]], ids=["opencv", "torch", "exact"])
@pytest.mark.parametrize("size", [16, 32, 96])
def test_a_blur_is_not_cut_off_in_small_views(compute: Callable[[Case], Tensor], size: int) -> None:
    """A window of a tenth of the view is 3 pixels at 32 pixels, up to 9/255 from a whole Gaussian of sigma 2."""
    crops = np.stack(edge_images(size))
    for sigma in (0.1, 0.7, 2.0):
        params = replace(neutral(len(crops)), blur=np.full(len(crops), sigma, np.float32))
        apart = torch.arange(-40, 41, dtype=torch.float64)
        weights = torch.exp(-0.5 * (apart / sigma).square())
        # The view continued by its reflections on and on, so that every place has all of its neighbours.
        around = np.pad(crops, ((0, 0), (40, 40), (40, 40), (0, 0)), "reflect").astype(np.float64)
        whole = torch.from_numpy(around).unfold(1, 81, 1) @ (weights / weights.sum())
        whole = whole.unfold(2, 81, 1) @ (weights / weights.sum())
        found = (compute(Case("blur", "", params, crops)) - whole.movedim(3, 1)).abs().max()
        assert found < (1.3 if compute is FUSED else 0.01)  # OpenCV's is rounded, and ends at 3 sigma
