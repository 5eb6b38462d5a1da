"""Pretraining end to end on a small data set: what it leaves behind, resume to the bit, ranks, health, mistakes."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_of_training import rows, same_run, weights

from jobs import cli
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.pretrain import pretrain
from jobs.run import checkpoint
from jobs.run.config import CheckpointConfig, PretrainConfig, ViewsConfig, from_plain, load_config, to_plain
from jobs.run.failure import TrainingFailedError
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.run.presets import PRESETS, preset
from models.objectives import Length, build_objective
from models.objectives.moby import MoBY
from models.selection import pairs
from pipelines.policies import IouScript
from shards.errors import InputError


def test_a_run_leaves_everything_behind(tiny: PretrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(tiny, run) == "finished"
    found = rows(run)
    np.testing.assert_array_equal(found["position_B"], np.arange(6 * 16))
    np.testing.assert_array_equal(found["step_B"], np.repeat(np.arange(6), 16))
    assert abs((found["source_B"] == 1).sum() - 0.25 * 96) <= 1
    np.testing.assert_array_equal(found["choice_B"], found["loss_BP"].argmax(1))
    lines = read_metrics(RunFolder(run).metrics)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    phases = {f"time/{name}" for name in ("data", "selection", "forward", "backward", "optimizer", "log", "step")}
    speed = {"train/images_per_second", "data/wait_share", "system/memory_gb", "system/mfu"}
    assert phases | speed <= lines[0].keys() and all(lines[0][name] > 0 for name in speed)
    assert any("health/rankme" in line for line in lines) and any(
        "grad/online.backbone.blocks.0" in line for line in lines
    )
    assert load_config(RunFolder(run).config) == tiny
    assert RunFolder(run).read_state()["state"] == "finished"
    assert [entry.step for entry in checkpoint.entries(RunFolder(run).checkpoints)] == [4, 6]
    backbone = checkpoint.load_backbone(run).backbone
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 32)


def test_the_log_opens_in_xarray(tiny: PretrainConfig, tmp_path: Path) -> None:
    import xarray

    pretrain(replace(tiny, steps=1), tmp_path / "run")
    with xarray.open_zarr(tmp_path / "run" / "log.zarr" / "rank-00000", consolidated=False) as log:
        assert log["blur"].dims == ("row", "view") and log["loss"].dims == ("row", "pair") and log.sizes["row"] == 16


@pytest.mark.parametrize("clip_by", ["all", "tensor"])
def test_layers_show_their_gradients_before_clipping(tiny: PretrainConfig, tmp_path: Path, clip_by: str) -> None:
    monitor = replace(tiny.monitor, every=1, health_every=1)
    pretrain(
        replace(tiny, monitor=monitor, optimizer=replace(tiny.optimizer, clip_norm=0.1), steps=2), tmp_path / "run"
    )
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    whole = [line["train/grad_norm"] for line in lines if "train/grad_norm" in line]
    layers = [[v for k, v in line.items() if k.startswith("grad/")] for line in lines if "health/rankme" in line]
    assert min(whole) > 0.1
    assert np.linalg.norm(layers, axis=1) == pytest.approx(whole, rel=1e-3)


def test_a_blur_too_strong_for_its_views_is_told_once(
    tiny: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pretrain(replace(tiny, steps=2), run)
    assert capsys.readouterr().err.count("views.blur_sigma: up to 2 pixels in views of 16") == 1
    pretrain(tiny, run, resume=True)
    pretrain(replace(tiny, steps=2, views=ViewsConfig("small")), tmp_path / "small")
    assert "views.blur_sigma" not in capsys.readouterr().err


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Makes MoBY's loss NaN at the steps that `bad` names."""
    loss = MoBY.loss

    def poisoned(self: MoBY, *arguments):
        value, metrics = loss(self, *arguments)
        return value * (torch.nan if bad(self.step) else 1.0), metrics

    monkeypatch.setattr(MoBY, "loss", poisoned)


def test_a_step_that_is_not_finite_is_skipped(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step == 2)
    assert pretrain(tiny, tmp_path / "run") == "finished"
    skipped = [
        line["train/skipped_steps"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "train/lr" in line
    ]
    assert skipped == [0, 1, 1]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_too_many_steps_that_are_not_finite_stop_the_run(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step >= 2)
    monitor = replace(tiny.monitor, max_bad_steps=3)
    config = replace(tiny, monitor=monitor, checkpoint=CheckpointConfig(every=1, keep=3))
    good = r"last good checkpoint: \S*step-00000002\.pt;"
    with pytest.raises(TrainingFailedError, match=rf"step 4: .*3 steps in a row.*{good}"):
        pretrain(config, tmp_path / "run")
    state = RunFolder(tmp_path / "run").read_state()
    assert state["state"] == "failed" and "first layer" in state["reason"]
    assert checkpoint.load_newest(RunFolder(tmp_path / "run").checkpoints)["step"] == 4


def test_what_a_run_says_that_ends_so_is_what_helps(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = f"--data.real {digits / 'train'} --backbone.depth 1 --batch 16 --steps 4 --monitor.max-bad-steps 1".split()
    command = ["pretrain", "moby-vit-tiny", "--run", "run", *flags, "--monitor.bank", "0", "--optimizer.clip-norm", "1"]
    hasty = [*command, "--optimizer.lr", "1e30"]
    for argv in (hasty, [*hasty, "--resume"]):
        assert cli.run(argv) == 1
        assert "--resume keeps the settings and so meets the same again: begin anew" in capsys.readouterr().err
    calm = [*command, "--optimizer.lr", "1e-4"]
    assert cli.run([*calm, "--resume"]) == 2
    assert "optimizer.lr: 0.0001 is not what the run was begun with, and a resumed" in capsys.readouterr().err
    for other in ("byol-vit-s", "synby-vit-tiny"):
        assert cli.run(["pretrain", other, "--run", "run", "--resume"]) == 2
        said = capsys.readouterr().err
        assert f"preset: {other} is not what the run was begun with, which is moby-vit-tiny, and a resumed" in said
    assert cli.run([*calm, "--overwrite"]) == 0


def constant(tiny: PretrainConfig) -> PretrainConfig:
    """Without any schedule."""
    optimizer = replace(tiny.optimizer, warmup_share=0.0, final_lr=tiny.optimizer.lr)
    return replace(tiny, optimizer=optimizer, objective=replace(tiny.objective, momentum=1.0))


def test_a_finished_run_goes_on_as_if_it_had_been_meant_so(
    tiny: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit where nothing follows a schedule; else by the longer run's schedules."""
    config = constant(tiny)
    pretrain(replace(config, steps=4), tmp_path / "short")
    assert pretrain(config, tmp_path / "short", resume=True) == "finished"
    assert "the run has 6 steps instead of 4, with all schedules as if" in " ".join(capsys.readouterr().err.split())
    pretrain(config, tmp_path / "long")
    same_run(tmp_path / "short", tmp_path / "long")
    assert load_config(tmp_path / "short" / "config.json") == config


def test_flags_lengthen_a_run_and_change_nothing_else(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = f"--data.real {digits / 'train'} --backbone.depth 1 --batch 16 --monitor.bank 0".split()
    command = ["pretrain", "moby-vit-tiny", "--run", "run"]
    assert cli.run([*command, *flags, "--steps", "2", "--epochs", "7"]) == 0
    for more, message in (
        (["--steps", "1"], "steps: 1 are 1 steps, and the run has done 2; give more, or begin another run"),
        (
            ["--steps", "3", "--seed", "1"],
            "seed: 1 is not what the run was begun with, and a resumed run keeps all but",
        ),
    ):
        assert cli.run([*command, "--resume", *more]) == 2
        assert message in capsys.readouterr().err
    assert load_config(tmp_path / "run" / "config.json").steps == 2
    assert cli.run([*command, "--resume"]) == 0
    assert cli.run([*command, "--resume", "--epochs", "0.05"]) == 0  # of 1,437 images: 5 steps
    assert RunFolder(tmp_path / "run").read_state()["step"] == 5
    own = load_config(tmp_path / "run" / "config.json")
    assert (own.steps, own.epochs, own.preset) == (None, 0.05, "moby-vit-tiny")


def test_a_run_whose_order_depends_on_its_length_keeps_it(tiny: PretrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, data=replace(tiny.data, final_synthetic_share=0.5), steps=2)
    pretrain(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"steps: 6 is another length, and with data\.final_synthetic_share"):
        pretrain(replace(config, steps=6), tmp_path / "run", resume=True)


def test_held_out_knn_is_measured_at_start_and_end(tiny: PretrainConfig, digits: Path, tmp_path: Path) -> None:
    monitor = replace(tiny.monitor, knn_train=str(digits / "train"), knn_test=str(digits / "test"), knn_every=4)
    pretrain(replace(tiny, monitor=monitor), tmp_path / "run")
    found = [
        (line["step"], line["knn/top1"])
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "knn/top1" in line
    ]
    assert [step for step, _ in found] == [0, 4, 6]
    assert all(0.2 < top1 <= 1 for _, top1 in found)  # digits are far from chance even untrained


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert from_plain(json.loads(json.dumps(to_plain(config)))) == config


@pytest.mark.parametrize("name", ["synby-vit-tiny", "synby-hard-deit-s", "moby-swin-t"])
def test_presets_build(name: str) -> None:
    config = preset(name)
    build_objective(config.objective, config.backbone, Length(10, 1.0))


def test_a_key_that_nothing_reads_is_an_error() -> None:
    plain = to_plain(preset("synby-vit-tiny"))
    plain["selection"]["veiws"] = 3
    with pytest.raises(InputError, match="veiws"):
        from_plain(plain)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "preset": (["synby-vit-tinny"], "preset: 'synby-vit-tinny' is not known; did you mean synby-vit-tiny? "),
    "flag": (["synby-vit-tiny", "--run", "R", "--selection.veiws", "3"], "did you mean --selection.views"),
    "views": (["synby-vit-tiny", "--run", "R", "--data.real", "S", "--selection.views", "1"], "selection.views: 1"),
    "no data": (["synby-vit-tiny", "--run", "R"], "data.real: no shards given"),
    "no shards": (["synby-vit-tiny", "--run", "R", "--data.real", "nowhere"], "nowhere"),
    "temperature": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--objective.temperature", "0"],
        "temperature",
    ),
    "hardest": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--objective.queue", "64"],
        "negatives.hardest: 256 is more than the queue's 64",
    ),
    "accumulate": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--accumulate", "3"],
        "batch: 128 images do not divide into 3 equal parts (1 processes, accumulate 3); take a multiple of 3",
    ),
    "not a number": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--objective.temperature", "nan"],
        "objective.temperature: nan is not finite; give a number",
    ),
    "momentum": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--optimizer.momentum", "1.5"],
        "optimizer.momentum: 1.5 must lie in [0, 1)",
    ),
    "beta2": (["synby-vit-tiny", "--run", "R", "--data.real", "S", "--optimizer.beta2", "1"], "optimizer.beta2: 1.0"),
    "final decay": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--optimizer.final-weight-decay", "-1"],
        "optimizer.final_weight_decay: -1.0 must be 0 or above",
    ),
    "target": (
        ["simsiam-rn50", "--run", "R", "--data.real", "S", "--selection.encoder", "target"],
        "selection.encoder: target asked of an objective without a target encoder; take online",
    ),
    "no target": (
        ["simclr-vit-s", "--run", "R", "--data.real", "S", "--objective.momentum", "0.99"],
        "--objective.momentum: hardviews pretrain simclr-vit-s has no such argument",
    ),
    "crop": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.crop-scale", "0.9", "0.2"],
        "views.crop_scale: (0.9, 0.2) is out of range; give 0 < least ≤ greatest ≤ 1",
    ),
    "flip": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.flip", "1.5"],
        "views.flip: 1.5 is out of range; a probability is between 0 and 1",
    ),
    "jitter probability": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.jitter-probability", "-1"],
        "views.jitter_probability: -1.0 must lie between 0 and 1",
    ),
    "hue": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.hue", "0.6"],
        "views.hue: 0.6 is out of range; give a shift between 0 and 0.5 turns",
    ),
    "saturation": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.saturation", "-1"],
        "views.saturation: -1.0 is out of range; give a strength of 0 or more",
    ),
    "sigma": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.blur-sigma", "2", "1"],
        "views.blur_sigma: (2.0, 1.0) is out of range; give 0 < least ≤ greatest",
    ),
    "ratio": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.ratio", "0", "1"],
        "views.ratio: (0.0, 1.0) is out of range; give 0 < least ≤ greatest",
    ),
    "local": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--views.local-views", "4"],
        "views.local_views: small has no local views; leave it out, or take dino or ibot",
    ),
    "threads": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--data.threads", "-2"],
        "data.threads: -2 must be 0 or above; 0 = one per core",
    ),
    "counts": (
        ["synby-vit-tiny", "--run", "R", "--data.real", "S", "--objective.negatives.mixing", "-3"],
        "negatives.mixing: -3 must be 0 or above",
    ),
    "swin": (
        ["moby-swin-t", "--run", "R", "--data.real", "S", "--backbone.image-size", "30"],
        "backbone.image_size: 30 is no multiple of swin_tiny_patch4_window7_224's patches of 4; take one",
    ),
    "device": (["synby-vit-tiny", "--run", "R", "--data.real", "S", "--device", "cuda"], "device: cuda"),
    "resume": (["synby-vit-tiny", "--run", "R", "--data.real", "S", "--resume"], "no run to resume"),
}


@pytest.mark.parametrize("case", sorted(MISTAKES))
def test_mistakes_are_one_line_and_exit_code_2(
    case: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[case]
    if case == "device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    words = [str(digits / "train") if word == "S" else word for word in words]
    assert cli.run(["pretrain", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hardviews: ") and expected in error and error.count("\n") == 1


def test_an_existing_run_is_refused(tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(replace(tiny, steps=1), tmp_path / "run")
    with pytest.raises(InputError, match="--resume or replace it with --overwrite"):
        pretrain(tiny, tmp_path / "run")
    assert pretrain(replace(tiny, steps=2), tmp_path / "run", overwrite=True) == "finished"


@pytest.mark.parametrize("mistake", ["data", "batch", "logger", "unlabelled", "missing"])
def test_a_mistake_leaves_no_folder_behind_and_costs_no_old_run(
    mistake: str, tiny: PretrainConfig, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    plain = tmp_path / "plain"
    build(BuildConfig(f"folder:{digits / 'images' / 'test'}", plain, workers=1))
    train, monitor = str(digits / "train"), tiny.monitor
    mistaken = {
        "data": replace(tiny, data=replace(tiny.data, real=str(tmp_path / "nowhere"))),
        "batch": replace(tiny, batch=17, accumulate=2),
        "logger": replace(tiny, monitor=replace(monitor, loggers=("json", "wandb"))),
        "unlabelled": replace(tiny, monitor=replace(monitor, knn_train=train, knn_test=str(plain))),
        "missing": replace(tiny, monitor=replace(monitor, knn_train=train, knn_test=str(tmp_path / "nowhere"))),
    }[mistake]
    with pytest.raises(InputError):
        pretrain(mistaken, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    pretrain(replace(tiny, steps=1), tmp_path / "run")
    before = rows(tmp_path / "run")
    with pytest.raises(InputError):
        pretrain(mistaken, tmp_path / "run", overwrite=True)
    np.testing.assert_array_equal(rows(tmp_path / "run")["sample_B"], before["sample_B"])


def test_a_run_goes_on_with_its_own_shards_wherever_they_lie(
    tiny: PretrainConfig, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    config = replace(tiny, data=replace(tiny.data, real="train", synthetic="test"))
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000006.*"):
        path.unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def resume(**places: str) -> str:
        given = replace(tiny, data=replace(tiny.data, **{"real": "", "synthetic": "", **places}))
        return pretrain(given, tmp_path / "run", resume=True)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"test has changed since .* with --data\.real and --data\.synthetic"):
        resume(real=str(digits / "test"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    shutil.copytree(digits / "train", tmp_path / "moved")
    assert resume(real="moved") == "finished"
    same_run(tmp_path / "whole", tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.json").data.real == (str(tmp_path / "moved"),)


def test_a_scripted_overlap_reaches_the_draws() -> None:
    script = IouScript(start=(0.1, 0.2), samples=8)
    assert ViewsConfig("dino", local_views=3, iou=script).build(16, 4).iou == script


def every_selection() -> dict[str, Callable[[PretrainConfig], PretrainConfig]]:
    def selecting(**changes):
        return lambda config: replace(config, selection=replace(config.selection, **changes))

    return {
        "easiest": selecting(rule="easiest"),
        "random": selecting(rule="random"),
        "lowest-iou": selecting(rule="lowest-iou"),
        "target": selecting(encoder="target"),
        "every": selecting(every=3),
        "bf16": selecting(precision="bf16"),
        "cross": selecting(cross_policy=True),
        "static": selecting(static_colour=True),
        "resolution": lambda c: replace(
            c, selection=replace(c.selection, resolution=8), backbone=replace(c.backbone, patch_size=8)
        ),
        "layer": lambda c: replace(c, selection=replace(c.selection, layer=1), backbone=replace(c.backbone, depth=2)),
        "two views": selecting(views=2),
    }


@pytest.mark.parametrize("name", sorted(every_selection()))
def test_every_variant_of_selection_trains(name: str, tiny: PretrainConfig, tmp_path: Path) -> None:
    config = every_selection()[name](replace(tiny, steps=3))
    assert pretrain(config, tmp_path / "run") == "finished"
    found = rows(tmp_path / "run")
    scored = ~np.isnan(found["loss_BP"]).all(1)
    expected = {"random": [], "lowest-iou": [], "two views": [], "every": [0]}.get(name, [0, 1, 2])
    assert sorted(set(found["step_B"][scored])) == expected
    # HVP offers seven ways to select, of which two run: each of ours has to make a difference, and the right one.
    if name in ("static", "resolution", "layer", "bf16"):
        pretrain(replace(config, selection=tiny.selection, steps=1), tmp_path / "full")
        full_BP = rows(tmp_path / "full")["loss_BP"]
        assert np.abs(found["loss_BP"][: len(full_BP)] - full_BP).max() > 1e-3  # rounding gives 1e-6
    if name == "easiest":
        np.testing.assert_array_equal(found["choice_B"], found["loss_BP"].argmin(1))
    if name == "lowest-iou":
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert {line["selection/lowest_iou_share"] for line in lines if "train/loss" in line} == {1.0}
    if name == "cross":
        first_B, second_B = np.array(pairs(4))[found["choice_B"]].T
        assert ((first_B + second_B) % 2 == 1).all()


def test_a_warm_up_longer_than_the_run_is_refused_before_anything_is_written(
    tiny: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny, optimizer=replace(tiny.optimizer, warmup_share=None, warmup_epochs=40.0))
    with pytest.raises(InputError, match=r"optimizer.warmup_epochs: 40 epochs are .* and the run has 6; train longer"):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
