"""Colour in torch on CPU tensors; how near it is to torchvision is in test_colour_host.py, the GPU in test_gpu.py."""

import numpy as np
import pytest
import torch

from jobs.benches.accuracy import cases
from pipelines import colour_device
from pipelines.colour import plan_colour
from pipelines.colour_device import blur_groups, even_chunks, fused_on_device, table

CASE = next(case for case in cases(32, 2) if case.operation == "whole policy")
CROPS = torch.from_numpy(CASE.crops_VSS3)


def coloured(rows: slice = slice(None), compiled: bool = False, clamp: bool = False) -> torch.Tensor:
    crops = CROPS[rows]
    out = torch.full((len(crops), 3, 32, 32), torch.nan)
    fused_on_device(crops, CASE.params[rows], out, compiled=compiled, clamp=clamp)
    return out


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 8), slice(5, 24)])
def test_a_view_is_the_same_to_the_bit_in_any_batch(rows: slice) -> None:
    assert torch.equal(coloured(rows), coloured()[rows])
    assert torch.equal(coloured(rows, clamp=True), coloured(clamp=True)[rows])


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = coloured()
    monkeypatch.setattr(colour_device, "_CHUNK", chunk)
    assert torch.equal(coloured(), whole)


@pytest.mark.slow
def test_compiled_colour_is_the_same() -> None:
    """Compiles for two shapes: some minutes on a slow machine."""
    whole = coloured(compiled=True)
    torch.testing.assert_close(whole, coloured(), rtol=0, atol=1e-5)
    assert torch.equal(coloured(slice(3, 8), compiled=True), whole[3:8])


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (512, [512]), (513, [257, 256]), (1300, [434, 434, 432])]
)
def test_chunks_are_as_long_as_each_other(count: int, sizes: list[int]) -> None:
    chunks = even_chunks(count, 512)
    assert [rows.stop - rows.start for rows in chunks] == sizes
    assert [row for rows in chunks for row in range(rows.start, rows.stop)] == list(range(count))


@pytest.mark.parametrize("blurred", [0, 1, 63, 64, 65])
def test_groups_hold_every_blurred_view_and_no_other(blurred: int) -> None:
    sigma_V = np.zeros(200, np.float32)
    sigma_V[np.random.default_rng(0).permutation(200)[:blurred]] = 0.5
    groups_GR = blur_groups(sigma_V)
    assert groups_GR.shape == (-(-blurred // 64), 64)
    assert set(groups_GR.ravel()) == set(np.flatnonzero(sigma_V))


def test_the_table_holds_what_the_plan_says() -> None:
    plan = plan_colour(CASE.params)
    table_VC = table(plan)
    assert table_VC.shape == (len(CROPS), 28) and table_VC.dtype == np.float32
    assert np.array_equal(table_VC[:, :9].reshape(-1, 3, 3), plan.before[0].matrix_V33)
    assert table(plan_colour(CASE.params, clamp=True)).shape == (len(CROPS), 76)
    assert np.array_equal(
        table_VC[:, 24:].T, np.stack([plan.exchange_V, plan.sextants_V, plan.gray_V, plan.solarize_V])
    )
