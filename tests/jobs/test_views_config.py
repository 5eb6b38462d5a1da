"""A run's own numbers for its policy, and what it is told of a blur that is too strong for its views."""

from dataclasses import fields, replace
from typing import Any

import pytest

from jobs.run.config import PretrainConfig, ViewsConfig, from_plain, to_plain
from jobs.run.data import strong_blur
from jobs.run.presets import PRESETS, preset
from jobs.studies.ready import STUDIES
from pipelines.policies import POLICIES, ViewPolicy
from shards.errors import InputError

# Every field of ViewPolicy, with a value that no policy has.
OTHERS: dict[str, Any] = {
    "scale": (0.3, 0.7),
    "ratio": (0.9, 1.1),
    "flip": 0.11,
    "jitter": 0.12,
    "brightness": 0.13,
    "contrast": 0.14,
    "saturation": 0.15,
    "hue": 0.16,
    "gray": 0.17,
    "blur": 0.18,
    "blur_sigma": (0.19, 0.21),
    "solarize": 0.22,
}
FLAGS = {"scale": "crop_scale", "jitter": "jitter_probability"}  # named otherwise in ViewsConfig


def test_every_field_of_a_policy_is_set_here() -> None:
    assert set(OTHERS) == {field.name for field in fields(ViewPolicy)}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_field_that_is_set_changes_all_views_and_nothing_else(policy: str, name: str) -> None:
    own = ViewsConfig(policy).build(56, 4)
    built = ViewsConfig(policy, **{FLAGS.get(name, name): OTHERS[name]}).build(56, 4)
    first = own.groups[0].count
    for index, (before, after) in enumerate(zip(own.view_policies, built.view_policies, strict=True)):
        changed = name != "scale" or index < first  # local crops keep their own area
        assert after == (replace(before, **{name: OTHERS[name]}) if changed else before)


def test_the_jitter_factor_leaves_strengths_that_are_set_alone() -> None:
    view = ViewsConfig("byol", jitter=0.5, brightness=0.3).build(32, 2).view_policies[0]
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.3, 0.2, 0.1, 0.05)


def test_set_fields_survive_the_run_folder() -> None:
    config = PretrainConfig(views=ViewsConfig("byol", flip=0, blur_sigma=(0.1, 0.3)))
    assert from_plain(to_plain(config)) == config


@pytest.mark.parametrize("name", set(OTHERS) - {"brightness", "contrast", "saturation"})
def test_every_field_is_refused_out_of_range(name: str) -> None:
    flag = FLAGS.get(name, name)
    bad: Any = (2.0, 1.0) if isinstance(OTHERS[name], tuple) else 1.5
    with pytest.raises(InputError, match=rf"^views\.{flag}: .*[^\n]*$"):
        ViewsConfig(**{flag: bad})


def at(size: int, views: ViewsConfig) -> PretrainConfig:
    config = preset("synby-deit-s")
    return replace(config, backbone=replace(config.backbone, image_size=size), views=views)


def test_a_blur_that_is_too_strong_in_proportion_is_told_with_the_remedy() -> None:
    assert strong_blur(at(32, ViewsConfig("byol"))) == (
        "views.blur_sigma: up to 2 pixels in views of 32 is 7.0 times the blur that byol means, in proportion; "
        "give --views.blur-sigma 0.0143 0.286, or --views.blur 0 for none"
    )
    assert strong_blur(at(32, ViewsConfig("byol", blur_sigma=(0.0143, 0.286)))) is None
    assert strong_blur(at(32, ViewsConfig("byol", blur=0))) is None
    assert strong_blur(at(32, ViewsConfig("small", blur=0.5))) is not None
    assert strong_blur(at(224, ViewsConfig("byol", blur_sigma=(1, 4)))) is not None
    assert strong_blur(at(384, ViewsConfig("byol"))) is None


def test_no_preset_or_study_blurs_too_much() -> None:
    for name in PRESETS:
        assert strong_blur(preset(name)) is None, name
    for name, study in STUDIES.items():
        assert study.base().views.policy == "small"
        assert strong_blur(study.base()) is None, name
