"""The published policies' numbers, and what a bad one says."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.draw import draw
from pipelines.policies import POLICIES, IouScript, Policy, ViewGroup, ViewPolicy, build_policy
from shards.errors import InputError


def test_byol_alternates_its_two_views() -> None:
    policy = build_policy("byol", 224, 5)
    assert [view.solarize for view in policy.view_policies] == [0, 0.2, 0, 0.2, 0]
    assert [view.blur for view in policy.view_policies] == [1, 0.1, 1, 0.1, 1]
    assert {view.scale for view in policy.view_policies} == {(0.08, 1.0)}
    jitters = {(v.brightness, v.contrast, v.saturation, v.hue, v.jitter, v.gray) for v in policy.view_policies}
    assert jitters == {(0.4, 0.4, 0.2, 0.1, 0.8, 0.2)}


def test_the_others_differ_where_the_papers_do() -> None:
    assert build_policy("moco_v3", 224).view_policies[1].scale == (0.08, 1.0)
    assert build_policy("moco_v2", 224).view_policies[0].saturation == 0.4
    simclr = build_policy("simclr", 224).view_policies[0]
    assert (simclr.brightness, simclr.hue, simclr.blur, simclr.scale) == (0.8, 0.2, 0.5, (0.08, 1.0))


def test_small_images_are_neither_blurred_nor_solarized() -> None:
    assert set(build_policy("small", 32, 4).view_policies) == {
        ViewPolicy((0.2, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, gray=0.2)
    }
    view = build_policy("small", 32).view_policies[0]
    assert (view.blur, view.solarize) == (0, 0)


def test_multi_crop_has_global_and_local_views() -> None:
    policy = build_policy("dino", 224, 4, 6)
    assert [(group.count, group.size) for group in policy.groups] == [(4, 224), (6, 96)]
    assert policy.spans == (slice(0, 4), slice(4, 10))
    assert policy.views == len(policy.view_policies) == 10
    assert policy.view_policies[3].scale == (0.4, 1.0) and policy.view_policies[4].scale == (0.05, 0.4)


@pytest.mark.parametrize(
    ("name", "colours", "areas"),
    [
        ("byol", (0.4, 0.4, 0.2, 0.1), [(0.08, 1.0)] * 2),
        ("moco_v2", (0.4, 0.4, 0.4, 0.1), [(0.2, 1.0)] * 2),
        ("moco_v3", (0.4, 0.4, 0.2, 0.1), [(0.08, 1.0)] * 2),
        ("simclr", (0.8, 0.8, 0.8, 0.2), [(0.08, 1.0)] * 2),
        ("dino", (0.4, 0.4, 0.2, 0.1), [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 8),
        ("ibot", (0.4, 0.4, 0.2, 0.1), [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 10),
    ],
)
def test_draws_fill_the_published_ranges(
    name: str, colours: tuple[float, float, float, float], areas: list[tuple[float, float]]
) -> None:
    """Factors from 1 − s to 1 + s, hue from −h to h, sigma from 0.1 to 2, areas of the image: by 400 images' draws."""
    ids = np.arange(400)
    params = draw(build_policy(name, 224), ids, np.zeros_like(ids), 0, np.full((400, 2), 400))
    jittered = params.jitter
    assert jittered.mean() == pytest.approx(0.8, abs=0.05) and params.gray.mean() == pytest.approx(0.2, abs=0.05)
    names = ("brightness", "contrast", "saturation", "hue")
    for field, strength, middle in zip(names, colours, (1, 1, 1, 0), strict=True):
        drawn = getattr(params, field)[jittered]
        assert drawn.min() == pytest.approx(middle - strength, abs=0.05 * strength)
        assert drawn.max() == pytest.approx(middle + strength, abs=0.05 * strength)
    sigmas = params.blur[params.blur > 0]
    assert (sigmas.min(), sigmas.max()) == pytest.approx((0.1, 2.0), abs=0.05)
    shares = params.height * params.width / 400**2
    for view, (least, most) in enumerate(areas):
        # Boxes are whole pixels, and large ones of another shape do not fit.
        assert least - 0.01 <= shares[:, view].min() <= least + 0.03
        assert most - 0.08 <= shares[:, view].max() <= most + 0.01
    assert shares.shape[1] == len(areas)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_builds_at_any_size_with_any_views(name: str) -> None:
    policy = build_policy(name, 32, 3)
    assert policy.groups[0].count == 3 and policy.groups[0].size == 32


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: build_policy("byoll", 224), "byol, moco_v2"),
        (lambda: build_policy("byol", 224, 1), "at least 2 views"),
        (lambda: build_policy("byol", 0), "size: 0"),
        (lambda: build_policy("byol", 224, 2, 2), "1 groups"),
        (lambda: ViewPolicy(flip=1.5), "flip: 1.5"),
        (lambda: ViewPolicy(scale=(0.5, 0.2)), "scale"),
        (lambda: ViewPolicy(ratio=(0, 1)), "ratio"),
        (lambda: ViewPolicy(hue=0.6), "hue: 0.6"),
        (lambda: ViewPolicy(contrast=-1), "contrast: -1"),
        (lambda: ViewPolicy(blur_sigma=(0, 2)), "blur_sigma"),
        (lambda: ViewGroup((), 2, 32), "views"),
        (lambda: Policy(()), "groups"),
        (lambda: replace(build_policy("dino", 224), interpolation="cubic"), "take bilinear or bicubic"),
        (lambda: IouScript(start=(0.5, 0.2)), "start"),
        (lambda: IouScript(tries=0), "tries: 0"),
        (lambda: IouScript(samples=-1), "samples: -1"),
        (lambda: IouScript(alternate=-1), "alternate: -1"),
    ],
)
def test_a_bad_policy_is_one_clear_line(make: object, says: str) -> None:
    with pytest.raises(InputError) as caught:
        make()  # type: ignore[operator]
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_policies_are_values() -> None:
    policy = build_policy("byol", 224)
    assert replace(policy, iou=IouScript(samples=5)) != policy == build_policy("byol", 224)
    assert len({policy, build_policy("byol", 224)}) == 1
