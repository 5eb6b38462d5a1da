"""View parameters as arrays, and the geometry of pairs against a naive count of pixels."""

import itertools
from dataclasses import fields

import numpy as np
import pytest

from pipelines.draw import draw
from pipelines.params import (
    FIELDS,
    PARAMETERS,
    ViewParams,
    pair_colour_distance,
    pair_distance,
    pair_iou,
    pairs,
)
from pipelines.policies import build_policy

SIZES = np.array([[40, 60], [33, 21], [64, 64]], np.int32)


@pytest.fixture
def params() -> ViewParams:
    return draw(build_policy("byol", 32, 4), np.arange(3), np.zeros(3, np.int32), 5, SIZES)


def test_fields_have_their_types_and_shape(params: ViewParams) -> None:
    assert tuple(field.name for field in fields(ViewParams)) == FIELDS
    for name in FIELDS:
        assert getattr(params, name).dtype == PARAMETERS[name].dtype
        assert getattr(params, name).shape == params.shape == (3, 4)
    assert len(params) == 3


@pytest.mark.parametrize("views", [2, 3, 4, 8])
def test_pairs_are_lexicographic(views: int) -> None:
    table = pairs(views)
    assert table.tolist() == [list(pair) for pair in itertools.combinations(range(views), 2)]
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


def test_indexing_flattening_and_joining_agree(params: ViewParams) -> None:
    assert np.array_equal(params[1:].hue, params.hue[1:])
    assert np.array_equal(params[:, 2:].top, params.top[:, 2:])
    assert np.array_equal(params.flat().blur, params.blur.ravel())
    joined = ViewParams.concatenate([params[:, :1], params[:, 1:]], axis=1)
    assert all(np.array_equal(getattr(joined, name), getattr(params, name)) for name in FIELDS)


def test_iou_is_a_count_of_pixels(params: ViewParams) -> None:
    iou = pair_iou(params)
    assert iou.shape == (3, 6) and iou.dtype == np.float32
    for row, (height, width) in enumerate(SIZES):
        masks = np.zeros((4, height, width), bool)
        for view, mask in enumerate(masks):
            top, left = params.top[row, view], params.left[row, view]
            mask[top : top + params.height[row, view], left : left + params.width[row, view]] = True
        for pair, (a, b) in enumerate(pairs(4)):
            assert iou[row, pair] == pytest.approx((masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum())


def test_iou_of_equal_and_of_distant_boxes() -> None:
    boxes = [np.array([[0, 0, 50]]), np.array([[0, 0, 50]]), np.array([[9, 9, 4]]), np.array([[7, 7, 4]])]
    assert pair_iou(ViewParams.identity(*boxes)).tolist() == [[1, 0, 0]]


def test_distances_against_a_loop(params: ViewParams) -> None:
    distance, colour = pair_distance(params, SIZES), pair_colour_distance(params)
    for row in range(3):
        for pair, (a, b) in enumerate(pairs(4)):
            ends = [
                np.array(
                    [params.top[row, v] + params.height[row, v] / 2, params.left[row, v] + params.width[row, v] / 2]
                )
                for v in (a, b)
            ]
            expected = np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(SIZES[row])
            assert distance[row, pair] == pytest.approx(expected, rel=1e-5)
            strengths = [
                np.array([getattr(params, name)[row, v] for name in ("brightness", "contrast", "saturation", "hue")])
                for v in (a, b)
            ]
            assert colour[row, pair] == pytest.approx(np.linalg.norm(strengths[0] - strengths[1]), rel=1e-5)
