"""Drawn parameters: torchvision's distributions, purity, static colour, scripted overlap."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from pipelines.draw import centre_boxes, draw, iou_bounds, static_colour
from pipelines.params import FIELDS, JITTER_ORDERS, ViewParams, pair_iou
from pipelines.policies import POLICIES, IouScript, Policy, ViewGroup, ViewPolicy, build_policy

COUNT = 2000
IMAGES = {"photo": (400, 470), "tiny": (32, 32), "wide": (60, 900), "tall": (1200, 90), "line": (1, 500), "dot": (1, 1)}


def crops(view: ViewPolicy, height: int, width: int, seed: int = 0) -> ViewParams:
    policy = Policy((ViewGroup((view,), 2, 32),))
    ids = np.arange(COUNT // 2)
    return draw(policy, ids, np.zeros_like(ids), seed, np.tile([[height, width]], (len(ids), 1))).flat()


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.05, 0.4), (0.9, 1.0)])
@pytest.mark.parametrize("image", IMAGES)
def test_boxes_have_torchvisions_distribution(image: str, scale: tuple[float, float]) -> None:
    height, width = IMAGES[image]
    ours = crops(ViewPolicy(scale=scale), height, width)
    box_N4 = np.stack([ours.top, ours.left, ours.height, ours.width], 1)
    blank = torch.empty(1, height, width)
    torch.manual_seed(1)
    theirs_N4 = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(COUNT)])
    measures = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "row": lambda b: (b[:, 0] + 0.5) / (height - b[:, 2] + 1),
        "column": lambda b: (b[:, 1] + 0.5) / (width - b[:, 3] + 1),
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(box_N4), measure(theirs_N4), method="asymp").pvalue > 1e-4, name
    assert (box_N4[:, :2] >= 0).all() and (box_N4[:, 2:] >= 1).all()
    assert (box_N4[:, 0] + box_N4[:, 2] <= height).all() and (box_N4[:, 1] + box_N4[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(30, 3000), (3000, 31), (100, 134), (101, 75), (1, 5), (7, 1), (50, 50)])
def test_the_fallback_is_torchvisions(height: int, width: int) -> None:
    blank = torch.empty(1, height, width)
    ours = centre_boxes(np.array([[3 / 4, 4 / 3]]), np.array([[height, width]]))
    # A scale that never fits: an area of four images.
    theirs = RandomResizedCrop.get_params(blank, [4.0, 4.0], [3 / 4, 4 / 3])
    assert tuple(int(value[0, 0]) for value in ours) == theirs


def test_the_fallback_is_as_frequent_as_torchvisions() -> None:
    view, (height, width) = ViewPolicy(scale=(0.2, 1.0)), (100, 280)
    ours = crops(view, height, width)
    centre = [int(value[0, 0]) for value in centre_boxes(np.array([view.ratio]), np.array([[height, width]]))]
    same = (np.stack([ours.top, ours.left, ours.height, ours.width], 1) == centre).all(1).sum()
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    boxes = [RandomResizedCrop.get_params(blank, list(view.scale), list(view.ratio)) for _ in range(COUNT)]
    theirs = sum(list(box) == centre for box in boxes)
    assert theirs > 30
    assert stats.fisher_exact([[same, COUNT - same], [theirs, COUNT - theirs]]).pvalue > 1e-4


def test_colour_has_torchvisions_distribution_and_the_policys_rates() -> None:
    view = ViewPolicy(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, gray=0.2, blur=0.3, solarize=0.1, flip=0.5)
    ours = crops(view, 100, 100)
    for name, rate in (("jitter", 0.8), ("gray", 0.2), ("solarize", 0.1), ("flip", 0.5)):
        assert stats.binomtest(int(getattr(ours, name).sum()), COUNT, rate).pvalue > 1e-4, name
    assert stats.binomtest(int((ours.blur > 0).sum()), COUNT, 0.3).pvalue > 1e-4
    sigma = ours.blur[ours.blur > 0]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4
    jitter = ColorJitter(0.4, 1.5, 0.2, 0.1)
    torch.manual_seed(0)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(COUNT)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        theirs = np.array([row[column] for row in drawn])
        assert stats.ks_2samp(getattr(ours, name)[ours.jitter], theirs, method="asymp").pvalue > 1e-4, name
    orders = np.bincount(ours.order[ours.jitter], minlength=len(JITTER_ORDERS))
    assert stats.chisquare(orders).pvalue > 1e-4


def test_what_is_not_applied_has_neutral_values() -> None:
    params = crops(ViewPolicy(blur=0.5), 50, 50)
    off = ~params.jitter
    assert off.any()
    for name, neutral in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "order": 0}.items():
        assert (getattr(params, name)[off] == neutral).all()


def test_flags_of_a_view_are_independent() -> None:
    params = crops(ViewPolicy(gray=0.5, blur=0.5, solarize=0.5, jitter=0.5), 100, 100)
    columns = [
        params.flip,
        params.jitter,
        params.gray,
        params.blur > 0,
        params.solarize,
        params.top > params.top.mean(),
    ]
    apart = np.corrcoef(np.array(columns, float)) - np.eye(len(columns))
    assert np.abs(apart).max() * np.sqrt(COUNT) < 4.5


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 2**63),
    scripted=st.booleans(),
    data=st.data(),
)
def test_parameters_are_the_same_in_any_batch_and_order(
    name: str, seed: int, scripted: bool, data: st.DataObject
) -> None:
    policy = build_policy(name, 32, 3)
    if scripted:
        policy = replace(policy, iou=IouScript((0, 0.2), (0.1, 0.5), samples=40, tries=3, alternate=5))
    rng = np.random.default_rng(0)
    ids, epochs, positions = rng.integers(0, 1 << 40, 24), rng.integers(0, 9, 24), rng.permutation(60)[:24]
    sizes = rng.integers(1, 500, (24, 2))
    whole = draw(policy, ids, epochs, seed, sizes, positions)
    rows = np.array(data.draw(st.lists(st.integers(0, 23), min_size=1, max_size=24)))
    part = draw(policy, ids[rows], epochs[rows], seed, sizes[rows], positions[rows])
    for field in FIELDS:
        assert np.array_equal(getattr(part, field), getattr(whole, field)[rows]), field


def test_seeds_epochs_and_samples_give_other_views() -> None:
    policy, sizes = build_policy("byol", 32, 4), np.tile([[300, 300]], (50, 1))
    first = draw(policy, np.arange(50), np.zeros(50, int), 0, sizes)
    for other in (
        draw(policy, np.arange(50), np.zeros(50, int), 1, sizes),
        draw(policy, np.arange(50), np.ones(50, int), 0, sizes),
        draw(policy, np.arange(50) + 50, np.zeros(50, int), 0, sizes),
    ):
        assert (first.top != other.top).mean() > 0.9
    assert (first.top[:, 0] != first.top[:, 2]).mean() > 0.9


def test_more_views_leave_the_first_ones_as_they_are() -> None:
    ids, sizes = np.arange(9), np.tile([[64, 80]], (9, 1))
    few, many = (draw(build_policy("byol", 32, n), ids, ids * 0, 0, sizes) for n in (2, 6))
    assert all(np.array_equal(getattr(many, name)[:, :2], getattr(few, name)) for name in FIELDS)


def test_static_colour_is_one_draw_for_all_views_of_an_image() -> None:
    policy, ids = build_policy("byol", 32, 4), np.arange(200)
    params = draw(policy, ids, ids * 0, 0, np.tile([[300, 400]], (200, 1)))
    static = static_colour(policy, params, ids, ids * 0, 0)
    geometry = ("top", "left", "height", "width", "flip")
    assert all(np.array_equal(getattr(static, name), getattr(params, name)) for name in geometry)
    for name in set(FIELDS) - set(geometry):
        values = getattr(static, name)
        assert (values == values[:, :1]).all(), name
    assert len(np.unique(static.brightness[:, 0])) > 100
    assert (static.brightness[:, 0] != params.brightness[:, 0]).mean() > 0.7


def test_a_scripted_overlap_is_kept_to_where_it_can_be() -> None:
    script = IouScript((0.0, 0.3), (0.3, 0.6), samples=1000, tries=60)
    policy = replace(build_policy("byol", 32), iou=script)
    ids = np.arange(500)
    sizes = np.tile([[300, 400]], (500, 1))
    plain = pair_iou(draw(replace(policy, iou=IouScript()), ids, ids * 0, 0, sizes))[:, 0]
    assert (plain > 0.3).mean() > 0.3
    early = pair_iou(draw(policy, ids, ids * 0, 0, sizes, np.zeros(500, int)))[:, 0]
    assert (early <= 0.3).all()
    late = pair_iou(draw(policy, ids, ids * 0, 0, sizes, np.full(500, 5000)))[:, 0]
    assert (late >= 0.3).all() and (late <= 0.6).all()


def test_where_no_draw_fits_the_nearest_is_kept() -> None:
    script = IouScript((1.0, 1.0), (1.0, 1.0), samples=1, tries=8)
    policy = replace(build_policy("byol", 32), iou=script)
    ids = np.arange(300)
    sizes = np.tile([[300, 400]], (300, 1))
    drawn = pair_iou(draw(policy, ids, ids * 0, 0, sizes, ids))[:, 0]
    plain = pair_iou(draw(replace(policy, iou=IouScript()), ids, ids * 0, 0, sizes))[:, 0]
    assert (drawn >= plain).all() and drawn.mean() > plain.mean() + 0.1


def test_the_script_is_linear_and_takes_turns() -> None:
    script = IouScript((0.0, 0.2), (0.4, 0.8), samples=100, alternate=10)
    expected = {0: (0, 0.2), 5: (0.02, 0.23), 10: (0, 1), 19: (0, 1), 25: (0.1, 0.35), 120: (0.4, 0.8), 130: (0, 1)}
    for position, bounds in expected.items():
        found = iou_bounds(script, np.array([position]))
        assert (found[0][0], found[1][0]) == pytest.approx(bounds)
