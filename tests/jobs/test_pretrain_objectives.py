"""Pretraining with every objective, multi-crop included: what trains is what the log says; presets build and step."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.log.writer import open_log
from jobs.pretrain import pretrain
from jobs.run import checkpoint
from jobs.run.config import PretrainConfig, ViewsConfig
from jobs.run.data import run_policy
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.run.optim import Schedule, build_optimizer, set_step
from jobs.run.presets import DEIT_S, PRESETS, preset
from jobs.training import loop as trainer
from models.backbones import BackboneConfig
from models.negatives import NONE, NegativesConfig
from models.objectives import (
    OBJECTIVES,
    BYOLConfig,
    DINOConfig,
    IBOTConfig,
    Length,
    MoBYConfig,
    MoCoV3Config,
    SimCLRConfig,
    SimSiamConfig,
    SwAVConfig,
    build_objective,
)
from models.selection import SelectionConfig, pairs
from shards.errors import InputError

LOCAL = 3
SMALL = {
    "moby": MoBYConfig(NONE, queue=32, hidden=16, width=12),
    "moco_v3": MoCoV3Config(hidden=16, width=12),
    "simclr": SimCLRConfig(hidden=16, width=12),
    "simsiam": SimSiamConfig(width=16, bottleneck=8),
    "byol": BYOLConfig(hidden=16, width=12),
    "swav": SwAVConfig(prototypes=10, hidden=16, width=12),
    "dino": DINOConfig(outputs=24, hidden=16, bottleneck=12, local_views=LOCAL),
    "ibot": IBOTConfig(outputs=24, hidden=16, bottleneck=12, local_views=LOCAL),
}


def of(tiny: PretrainConfig, name: str, **changes: object) -> PretrainConfig:
    """Two steps of an objective; DINO and iBOT with 3 of 5 local views."""
    views = ViewsConfig("dino", local_views=5, local_size=8) if name in ("dino", "ibot") else tiny.views
    return replace(tiny, objective=SMALL[name], views=views, steps=2, **changes)


def undocumented(names: set[str]) -> set[str]:
    """Scalars that docs/metrics.md does not name; those by source are marked there with a star."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()

    def entry(name: str) -> str:
        whole, by_source = re.subn("/(real|synthetic)$", "", name)
        kinds = {"grad": "`grad/LAYER`", "time": "`time/PHASE`"}
        return kinds.get(name.split("/")[0], f"`{whole}`" + " ★" * by_source)

    return {name for name in names - {"step", "time"} if entry(name) not in page}


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"moby"}))  # which test_pretrain.py trains
def test_every_objective_pretrains_and_its_log_marks_what_trained(
    name: str, tiny: PretrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pretrain(of(tiny, name, monitor=replace(tiny.monitor, health_every=2)), run) == "finished"
    watched = {key for line in read_metrics(run / "metrics.jsonl") for key in line}
    for kind in ("feature_std", "rankme", "alignment", "uniformity"):
        assert {f"health/{kind}{source}" for source in ("", "/real", "/synthetic")} <= watched
    assert undocumented(watched) == set()
    assert ("train/chance" in watched) == (name not in ("byol", "simsiam"))
    (part,) = open_log(RunFolder(run).log).chunks(1000)
    assert part.loss_BP.shape == (32, 6) and np.isfinite(part.loss_BP).all()
    np.testing.assert_array_equal(part.choice_B, part.loss_BP.argmax(1))
    multi_crop = name in ("dino", "ibot")
    assert part.chosen_BN.shape == (32, 9 if multi_crop else 4)
    wanted = np.zeros((32, 4), np.bool_)
    np.put_along_axis(wanted, np.array(pairs(4))[part.choice_B], True, 1)
    np.testing.assert_array_equal(part.chosen_BN[:, :4], wanted)
    if multi_crop:
        np.testing.assert_array_equal(part.chosen_BN[:, 4:].sum(1), np.full(32, LOCAL))
        assert (part.chosen_BN[:, 4:].sum(0) > 0).sum() > LOCAL  # not the first ones of every image
    assert np.isfinite(
        [line["train/loss"] for line in read_metrics(RunFolder(run).metrics) if "train/loss" in line]
    ).all()


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_multi_crop_with_a_random_pair_parts_and_smaller_scored_views(
    name: str, tiny: PretrainConfig, tmp_path: Path
) -> None:
    small = replace(tiny.backbone, patch_size=4)
    scored = of(tiny, name, backbone=small, accumulate=2, selection=SelectionConfig(resolution=8, encoder="target"))
    plain = of(tiny, name, selection=SelectionConfig(views=2, rule="random"))
    marks = []
    for number, config in enumerate((scored, plain)):
        run = tmp_path / str(number)
        assert pretrain(config, run) == "finished"
        (part,) = open_log(RunFolder(run).log).chunks(1000)
        marks.append(part.chosen_BN)
        np.testing.assert_array_equal(marks[-1].sum(1), np.full(32, 2 + LOCAL))
    np.testing.assert_array_equal(marks[1], np.tile([True] * 5 + [False] * 2, (32, 1)))  # draws are alike


def test_an_interrupted_run_goes_on_to_the_bit(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centres and the mask token come from the checkpoint, masks from the step."""
    config, step = of(tiny, "ibot"), trainer.train_step
    pretrain(config, tmp_path / "whole")

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert pretrain(config, tmp_path / "parts") == "interrupted"
    monkeypatch.undo()
    assert pretrain(config, tmp_path / "parts", resume=True) == "finished"
    one, two = (
        checkpoint.load_newest(RunFolder(tmp_path / run).checkpoints)["objective"] for run in ("whole", "parts")
    )
    tensors = [part for part, value in one.items() if torch.is_tensor(value)]
    assert one.keys() == two.keys() and all(torch.equal(one[part], two[part]) for part in tensors)
    assert all(one[part].abs().sum() > 0 for part in ("centre_K", "patch_centre_K", "mask_token_D"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": SMALL["simclr"], "selection": SelectionConfig(encoder="target")}, "selection.encoder: target"),
        ({"objective": SMALL["moby"], "selection": SelectionConfig(layer=3)}, "selection.layer: 3 blocks asked for"),
        ({"objective": SMALL["dino"], "views": ViewsConfig("dino")}, "views.local_size: crops of 7 pixels are not"),
        ({"selection": SelectionConfig(resolution=12)}, "selection.resolution: crops of 12 pixels are not tiled by"),
        (
            {"objective": SMALL["ibot"], "backbone": BackboneConfig("resnet10t", 16)},
            "backbone.name: iBOT masks patches",
        ),
        (
            {"objective": replace(SMALL["moco_v3"], negatives=NegativesConfig(8)), "accumulate": 2},
            "objective.negatives.hardest: 8 is more than the 7 negatives that 8 images at once give; lower it",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    changes: dict[str, object], message: str, tiny: PretrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(replace(tiny, **changes), tmp_path / "run")


SIX = NegativesConfig(8, 4, 4, 4, 4, 4, 4, start_epoch=0, last_epochs_without=0)


@pytest.mark.parametrize("name", ["moby", "moco_v3", "simclr"])
def test_contrastive_tasks_are_analysed_by_source_and_the_oracle_has_no_false_negatives(
    name: str, tiny: PretrainConfig, tmp_path: Path
) -> None:
    plain = replace(tiny, objective=replace(SMALL[name], negatives=SIX))
    lines = {}
    for run, config in {
        "plain": plain,
        "oracle": replace(plain, objective=replace(plain.objective, oracle=True)),
    }.items():
        pretrain(config, tmp_path / run)
        lines[run] = [line for line in read_metrics(tmp_path / run / "metrics.jsonl") if "contrast/proxy" in line]
    of_classes = ("false_negatives", "false_components", "false_pairs")
    assert undocumented(set(lines["plain"][-1])) == set()
    for kind in ("proxy", "proxy_synthetic", *of_classes):
        for source in ("", "/real", "/synthetic"):
            assert f"contrast/{kind}{source}" in lines["plain"][-1]
    for kind in of_classes:  # among so few images a single step may have none
        most = {run: max(line[f"contrast/{kind}"] for line in of_run) for run, of_run in lines.items()}
        assert most["oracle"] == 0 < most["plain"]
    curve = read_metrics(tmp_path / "plain" / "curves.jsonl")[-1]
    rows = {"moby": 32, "moco_v3": 15, "simclr": 30}[name]  # the queue; the other images; their two views
    for source in ("", "/real", "/synthetic"):
        assert curve[f"matching_probabilities{source}"]["rank"][-1] == rows
        assert curve[f"matching_probabilities{source}"]["value"][-1] > 0


def test_the_oracle_wants_the_same_labels_in_every_source(tiny: PretrainConfig, digits: Path, tmp_path: Path) -> None:
    images = digits / "images" / "test"
    build(BuildConfig(f"folder:{images}", tmp_path / "unknown", shard_samples=100, workers=1))
    (tmp_path / "other").symlink_to(images / "3", target_is_directory=True)
    build(BuildConfig(f"imagefolder:{tmp_path}", tmp_path / "one-class", shard_samples=100, workers=1))
    oracle = replace(tiny, objective=replace(SMALL["moco_v3"], oracle=True))
    for shards, message in {"unknown": "has no labels; build it from", "one-class": "have different classes"}.items():
        data = replace(tiny.data, synthetic=str(tmp_path / shards))
        with pytest.raises(InputError, match=f"objective.oracle: .*{message}"):
            pretrain(replace(oracle, data=data), tmp_path / f"run-{shards}")


def shrunk(config: PretrainConfig) -> PretrainConfig:
    """A preset's structure at a size for tests."""
    backbone = config.backbone
    if "resnet" in backbone.name:
        backbone = replace(backbone, name="resnet10t", image_size=32)
    elif "swin" in backbone.name:
        backbone = replace(backbone, image_size=56)
    else:
        backbone = replace(backbone, image_size=32, patch_size=8, width=48, depth=1)
    widths = {name: 16 for name in ("hidden", "width", "bottleneck") if hasattr(config.objective, name)}
    widths |= {name: 32 for name in ("outputs", "prototypes") if hasattr(config.objective, name)}
    local = {"local_size": 16} if config.views.policy == "dino" else {}
    return replace(
        config, backbone=backbone, objective=replace(config.objective, **widths), views=replace(config.views, **local)
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_and_takes_a_step(name: str) -> None:
    config = shrunk(preset(name))
    objective = build_objective(config.objective, config.backbone, Length(10, 1.0)).train()
    crops = tuple(torch.randn(4, group.count, 3, group.size, group.size) for group in run_policy(config).groups)
    scores = objective.pair_losses(crops, config.selection) if config.selection.scores(0) else None
    choice = torch.zeros(4, dtype=torch.int64) if scores is None else scores.losses_BP.argmax(1)
    assert (scores is not None) == ("hard" in name or name == "synby-vit-tiny")
    chosen = objective.take(crops, choice, scores)
    trained = 10 if name in ("dino-vit-s", "dino-hard-vit-s") else 2
    assert sum(views.shape[1] for views in chosen.crops) == trained
    loss, _ = objective.loss(chosen)
    loss.backward()
    optimizer = build_optimizer(config.optimizer, objective)
    set_step(optimizer, Schedule(config.optimizer, config.batch, 400, 1.0), 60)
    learned = {name: p for name, p in objective.online.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learned.items()}
    optimizer.step()
    objective.after_step()
    assert torch.isfinite(loss) and all(torch.isfinite(p).all() for p in learned.values())
    assert any(not torch.equal(p, before[name]) for name, p in learned.items() if name.startswith("backbone"))


def test_presets_have_the_papers_values() -> None:
    moco = preset("moco-v3-vit-s")
    assert moco.backbone == BackboneConfig(
        "vit_small_patch16_224", heads=12, fixed_patch=True, sincos=True, init="moco_v3"
    )
    assert (moco.optimizer.lr, moco.optimizer.lr_batch, moco.optimizer.weight_decay) == (1.5e-4, 256, 0.1)
    assert (moco.optimizer.warmup_epochs, moco.batch, moco.epochs) == (40, 4096, 300)
    assert [preset(f"{name}-vit-s").objective for name in ("simclr", "byol", "swav")] == [
        SimCLRConfig(hidden=4096, width=256, layers=3),
        BYOLConfig(),
        SwAVConfig(head_norm=False),
    ]
    for name in ("moby-deit-s", "synby-swin-t", "synby-hard-deit-s"):
        moby = preset(name)
        assert {view.scale for view in run_policy(moby).view_policies} == {(0.08, 1.0)}
        assert moby.optimizer.clip_norm == 5.0
        schedule = Schedule(moby.optimizer, 1024, 300 * 10, 10)
        assert (schedule.peak, schedule.lr(3000)) == pytest.approx((2e-3, 1e-5))
    assert {view.scale for view in run_policy(preset("moby-vit-tiny")).view_policies} == {(0.2, 1.0)}
    assert preset("synby-deit-s").backbone == BackboneConfig("deit_small_patch16_224", drop_path=0.05)
    synco = preset("synco-v2-vit-s")
    assert synco.backbone == BackboneConfig(
        "vit_small_patch16_224", heads=12, sincos=True, init="moco_v3", drop_path=0.2
    )
    assert replace(synco, backbone=DEIT_S) == replace(preset("synby-deit-s"), backbone=DEIT_S)
    assert preset("dino-vit-s").backbone.positions == preset("ibot-hard-vit-s").backbone.positions == "plain"
    colours = {name: preset(name).views.colour for name in PRESETS}
    assert {name for name, colour in colours.items() if colour != "clamped"} == {"synby-vit-tiny", "moby-vit-tiny"}
    bicubic = {name for name in PRESETS if preset(name).views.interpolation == "bicubic"}
    assert bicubic == {f"{name}-vit-s" for name in ("dino", "dino-hard", "ibot", "ibot-hard")}
    simsiam = preset("simsiam-rn50")
    assert (simsiam.optimizer.lr, simsiam.optimizer.constant_predictor, simsiam.batch) == (0.05, True, 512)
    dino = preset("dino-hard-vit-s")
    assert [group.count for group in run_policy(dino).groups] == [4, 16]
    assert [group.size for group in run_policy(dino).groups] == [224, 96]
    assert dino.objective == DINOConfig() and dino.optimizer.clip_norm == 3.0
    ibot = preset("ibot-hard-vit-s")
    assert len(run_policy(ibot).groups) == 1  # HVP trains iBOT on global views only
    assert {view.scale for view in run_policy(ibot).view_policies} == {(0.14, 1.0)}
    assert ibot.objective == IBOTConfig(norm_last_layer=False, local_views=0)
    mochi = preset("mochi-rn50").objective
    assert isinstance(mochi, MoBYConfig) and mochi.queue == 16_384
    assert (mochi.negatives.hardest, mochi.negatives.mixing, mochi.negatives.interpolation) == (1024, 512, 256)
    assert mochi.negatives.total == 768 and mochi.negatives.active(10, 200) and not mochi.negatives.active(9, 200)
