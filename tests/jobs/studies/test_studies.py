"""Studies as configurations: arms, axes, changes, and what is said of those that do not fit."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch

from jobs.run.config import PretrainConfig, to_plain
from jobs.run.presets import preset
from jobs.studies.difference import Difference, difference, in_points
from jobs.studies.output import table_of
from jobs.studies.plan import arms_of, changed, differences, members, shared_changes
from jobs.studies.plot import axis_of_numbers
from jobs.studies.ready import STUDIES, study
from jobs.studies.results import RunResult, seconds_left, span
from jobs.studies.summary import compared, spread, summarise
from jobs.training.opening import make_objective
from models.objectives import Length, MoBYConfig, SimCLRConfig
from models.selection import SelectionConfig
from shards.errors import InputError

# Every ablation of the papers as an axis: field → values, and presets that have the field.
KNOBS = {
    "objective.negatives.hardest=256,512,1024": "synby-deit-s",
    "objective.negatives.share=0.1,0.25,0.5": "synby-deit-s",
    "objective.queue=1024,2048,4096,8192,16384": "synby-deit-s",
    "objective.temperature=0.07,0.1,0.2,0.3": "synby-swin-t",
    "objective.momentum=0.99,0.993,0.996,0.999": "synby-deit-s",
    "backbone.drop_path=0.0,0.05,0.1,0.2": "synby-deit-s",
    "backbone.target-drop-path=0.0,0.1": "synby-deit-s",
    "backbone.fixed_patch=false,true": "synby-deit-s",
    "backbone.batchnorm_mlp=false,true": "synby-swin-t",
    "backbone.heads=6,12": "moco-v3-vit-s",
    "objective.negatives.start_epoch=0,10,30": "synby-deit-s",
    "objective.negatives.stop_epoch=null,150,200": "synby-deit-s",
    "objective.negatives.last_epochs_without=0,100": "synby-deit-s",
    "objective.negatives.gradient=dot,cosine": "synby-deit-s",
    "objective.negatives.sigma=0.01,0.1": "synby-deit-s",
    "objective.negatives.adversarial=0,128": "synby-deit-s",
    "data.synthetic_share=0,0.25,0.5,0.75,1": "synby-deit-s",
    "selection.encoder=online,target": "synby-hard-deit-s",
    "selection.rule=hardest,random,lowest-iou": "synby-hard-deit-s",
    "selection.every=1,2,4": "simsiam-hard-rn50",
    "optimizer.name=adamw,lamb": "moco-v3-vit-s",
    "optimizer.lr=1.5e-4,3e-4": "moco-v3-vit-s",
    "objective.candidates=0,128": "dino-hard-vit-s",
}


@pytest.mark.parametrize("axis", KNOBS)
def test_every_ablation_of_the_papers_is_an_axis(axis):
    field, values = axis.replace("-drop-", "_drop_").split("=")
    base = preset(KNOBS[axis])
    planned = members(base, arms_of([axis]), 1)
    assert len(planned) == len(values.split(","))
    changes = [differences(base, member.config) for member in planned]
    assert all(found in ([field], []) for found in changes)  # one value may be the preset's own
    assert sum(not found for found in changes) <= 1


def test_the_study_s_arms_differ_in_views_negatives_and_encoder_alone():
    chosen = STUDIES["cifar10-study"]
    found = {m.arm: m.config for m in members(chosen.base(), chosen.arms, 1)}
    selections = {arm: (c.selection.views, c.selection.rule, c.selection.encoder) for arm, c in found.items()}
    assert selections == {
        "moby": (2, "random", "online"),
        "synby": (2, "random", "online"),
        "moby-hard": (4, "hardest", "online"),
        "synby-hard": (4, "hardest", "online"),
        "moby-hard-target": (4, "hardest", "target"),
        "synby-hard-target": (4, "hardest", "target"),
    }
    synby = found["synby"].objective
    assert isinstance(synby, MoBYConfig) and (synby.negatives.total, synby.negatives.hardest) == (768, 256)
    for arm, config in found.items():
        assert config.objective.negatives.total == (768 if arm.startswith("synby") else 0)
        changed_fields = {name.rsplit(".", 1)[0] for name in differences(found["moby"], config)}
        assert changed_fields <= {"selection", "objective.negatives"}
    assert all(c.backbone.image_size == 32 for c in found.values())


def test_the_small_study_has_the_same_arms():
    assert STUDIES["cifar10-study-small"].arms == STUDIES["cifar10-study"].arms


def test_seeds_come_one_after_the_other_so_that_early_ends_leave_whole_comparisons():
    chosen = STUDIES["cifar10-study"]
    planned = members(chosen.base(), chosen.arms, 2)
    assert [m.config.seed for m in planned] == [0] * 6 + [1] * 6
    assert len({m.name for m in planned}) == 12 and planned[7].name == "synby-seed1"


def test_axes_cross_and_are_named_by_their_values():
    arms = arms_of(["backbone.width=64,128", "objective.width=16", "views.crop-scale=[0.2,1],null"])
    assert list(arms) == [
        "backbone.width=64-objective.width=16-crop_scale=0.2_1",
        "backbone.width=64-objective.width=16-crop_scale=null",
        "backbone.width=128-objective.width=16-crop_scale=0.2_1",
        "backbone.width=128-objective.width=16-crop_scale=null",
    ]
    assert arms_of([]) == {"base": {}}
    assert list(arms_of(["data.real=s3://bucket/a,b"])) == ["real=s3_bucket_a", "real=b"]
    assert arms_of(["backbone.sincos=True,False"])["sincos=true"] == {"backbone.sincos": True}


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("objective.temperature=0", "objective.temperature: 0.0 must be above 0; raise it"),
        ("objective.temperature=low", "objective.temperature: 'low' is not a number"),
        ("objective.temperature=NaN", "objective.temperature: nan is not finite; give a number"),
        ("objective.negatives.hardest=9999", "objective.negatives.hardest: 9999 is more than the queue's 4096 rows"),
        ("objective.negatives.mixing=-1", "negatives.mixing: -1 must be 0 or above"),
        ("objective.name=byol", "objective.name: an objective comes with its preset"),
        ("objective.temprature=1", "no such field; did you mean objective.temperature"),
        ("temperature=0.1", "no such field; did you mean objective.temperature?"),
        ("selection=hard", "selection: has fields of its own; name one, such as selection.views"),
        ("selection.rule=hard", "selection.rule: 'hard' is not known; choose one of hardest, easiest"),
        ("selection.views=1", "selection.views: 1 leaves no pair to choose; give 2 or more"),
        ("batch=0.5", "batch: 0.5 is not a whole number"),
        ("backbone.fixed_patch=no", "backbone.fixed_patch: 'no' is not true or false"),
        ("views.policy=7", "views.policy: 7 is not text"),
        ("views.crop_scale=0.2", r"views.crop_scale: 0.2 is not a list of 2; write it as \[a,b\]"),
        ("monitor.loggers=json", "monitor.loggers: 'json' is not a list; write it as"),
        ("optimizer.lr", "axis: 'optimizer.lr' is not of the form field=value; for example"),
        ("optimizer.lr=", "axis: 'optimizer.lr=' is not of the form"),
        ("optimizer.lr=1,1.0", "axis: lr=1 and lr=1.0 are the same configuration; leave one out"),
        ("optimizer.lr=1,1", "axis: the values of lr=1 are given twice"),
        ("seed=0,1", "axis seed: .*say how many by --seeds"),
    ],
)
def test_what_an_axis_cannot_be_says_field_value_and_remedy(axis, message):
    with pytest.raises(InputError, match=message):
        members(preset("synby-deit-s"), arms_of([axis]), 1)


def test_changes_and_studies_refuse_what_would_be_ignored():
    with pytest.raises(InputError, match=r"change optimizer.lr: 2 values; give one, or vary the field by --axis"):
        shared_changes(["optimizer.lr=1,2"])
    with pytest.raises(InputError, match="axis batch: given 2 times"):
        arms_of(["batch=1", "batch=2"])
    with pytest.raises(InputError, match="axis: cifar10-study has its own arms"):
        study("cifar10-study", ["batch=1,2"])
    with pytest.raises(InputError, match=r"study: 'cifar-study' is not known; did you mean cifar10-study\? studies: "):
        study("cifar-study")
    with pytest.raises(InputError, match="seeds: 0 must be at least 1"):
        members(preset("moby-vit-tiny"), {"base": {}}, 0)
    assert changed(PretrainConfig(), shared_changes(["selection.audit-every=5"])).selection.audit_every == 5


def result(arm: str, seed: int, state: str, **facts: object) -> RunResult:
    return RunResult(f"{arm}-seed{seed}", arm, seed, state, **facts)


def test_means_and_deviations_are_of_finished_runs():
    done = [result("a", s, "done", scores={"knn": v}, images_per_second=100.0) for s, v in enumerate((0.5, 0.7))]
    found = summarise([*done, result("a", 2, "trained", images_per_second=1.0), result("b", 0, "failed")])
    assert found["a"]["knn"]["mean"] == pytest.approx(0.6) and found["a"]["knn"]["std"] == pytest.approx(0.02**0.5)
    assert found["a"]["knn"]["values"] == [0.5, 0.7] and found["a"]["images_per_second"]["mean"] == 100
    assert found["b"] == {"images_per_second": None, "verdicts": {}} and spread({4: 0.3})["std"] is None


def test_the_time_left_counts_each_arm_at_its_own_speed():
    config = replace(PretrainConfig(), batch=10, selection=SelectionConfig())
    planned = members(config, {"a": {}, "b": {"selection.views": 2}}, 2)
    assert seconds_left(planned, [result(m.arm, m.config.seed, "new") for m in planned]) is None
    results = [
        result("a", 0, "done", steps=100, step=100, images_per_second=50.0, scoring_s=7.0),
        result("b", 0, "interrupted", steps=100, step=40, images_per_second=100.0),
        result("a", 1, "new"),
        result("b", 1, "trained", steps=100, step=100, images_per_second=100.0),
    ]
    assert seconds_left(planned, results) == pytest.approx((60 * 10 / 100 + 7) + (100 * 10 / 50 + 7) + 7)
    assert [span(s) for s in (45, 300, 9000, 200_000)] == ["45 s", "5 min", "2.5 h", "2.3 days"]


def test_an_axis_of_numbers_is_drawn_along_its_values():
    assert axis_of_numbers(arms_of(["optimizer.lr=0.1,0.2"])) == ("optimizer.lr", {"lr=0.1": 0.1, "lr=0.2": 0.2})
    assert axis_of_numbers(arms_of(["optimizer.lr=0.1,0.2", "batch=1,2"])) is None
    assert axis_of_numbers(arms_of(["backbone.sincos=false,true"])) is None


def test_a_difference_is_paired_over_shared_seeds_with_student_s_interval():
    one, other = {0: 0.5, 1: 0.7, 2: 0.9, 5: 0.1}, {0: 0.4, 1: 0.5, 2: 0.6, 7: 0.9}
    found = difference(one, other)
    reference = scipy.stats.ttest_rel([0.5, 0.7, 0.9], [0.4, 0.5, 0.6]).confidence_interval(0.95)
    assert found == Difference(pytest.approx(0.2), pytest.approx(reference.low), pytest.approx(reference.high), 3)
    assert in_points(found) == "+20.0 (-4.8 to +44.8, 3 seeds)"
    assert difference({0: 0.5}, other) == Difference(pytest.approx(0.1), None, None, 1)
    assert difference({0: 0.5}, {1: 0.5}) is None


def test_a_study_of_costs_compares_at_the_same_steps_and_at_the_same_time():
    chosen = STUDIES["cost-small"]
    values = {"random-240": (0.6, 0.7), "random-390": (0.8, 0.9), "hard-240": (0.75, 0.8), "lowest-iou-480": (0.9,)}
    results = [
        result(arm, seed, "done", scores={"knn": value}, verdict="learning")
        for arm, own in values.items()
        for seed, value in enumerate(own)
    ]
    found = compared(summarise(results), chosen)
    assert found["random-240"] == {}
    assert found["hard-240"]["random-240"]["knn"].mean == pytest.approx((0.15 + 0.1) / 2)
    at = chosen.time["hard-240"]
    share = math.log(at / 240) / math.log(390 / 240)
    plain = [0.6 + 0.2 * share, 0.7 + 0.2 * share]
    assert found["hard-240"]["same time"]["knn"].mean == pytest.approx(0.775 - sum(plain) / 2)
    assert found["lowest-iou-480"] == {"random-480": {}, "same time": {}}  # nothing of that length to compare with
    cells = [list(column.cells) for column in table_of(results, chosen).columns]
    assert cells[1][2] == "77.5 ± 3.5 % (2)" and cells[-2][2] == "2 learning"


def test_the_ready_studies_are_configurations_that_can_be_built():
    for name in ("objectives-small", "claims-small", "cost-small"):
        chosen = STUDIES[name]
        for member in members(chosen.base(), chosen.arms, 1):
            length = Length(member.config.steps, 11.2)
            make_objective(member.config, length, torch.device("meta"))
        assert set(chosen.against) <= set(chosen.arms) and set(chosen.against.values()) <= set(chosen.arms)
        assert set(chosen.plain) <= set(chosen.time) <= set(chosen.arms)


def test_a_change_can_be_a_whole_objective():
    plain = to_plain(replace(PretrainConfig(), objective=SimCLRConfig(width=64)))["objective"]
    assert changed(PretrainConfig(), {"objective": plain}).objective == SimCLRConfig(width=64)
    with pytest.raises(InputError, match="objective: has fields of its own; name one, such as objective"):
        changed(PretrainConfig(), {"objective": "simclr"})
