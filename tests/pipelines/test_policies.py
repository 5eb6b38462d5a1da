"""The published policies' numbers, and what a bad one says."""

from dataclasses import replace

import pytest

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
