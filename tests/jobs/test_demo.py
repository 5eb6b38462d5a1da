"""The demo on small images: what it leaves, that it does not depend on the clock, which views it takes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_runs import image_folder
from PIL import Image

from jobs import cli, demo
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.demo import COLOUR_VIEWS, DIGIT_VIEWS, GRAY_VIEWS, DemoConfig, Setting
from jobs.run.config import load_config
from jobs.run.folder import RunFolder, write_json
from jobs.training.opening import make_objective
from models.objectives import Length
from pipelines.policies import ViewPolicy
from shards.manifest import Manifest, open_manifest

ARMS = {"random": 2, "hard": 2, "random_same_time": 4}
FLAGS = ["demo", "--steps", "2", "--diffusion-steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "colours", 10, classes=3, side=12)


@pytest.fixture(scope="module")
def out(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert cli.run([*FLAGS, "--images", str(images), "--out", str(folder)]) == 0
    return folder


def learned(out: Path) -> dict[str, Any]:
    """demo.json without what the clock says."""
    results = json.loads((out / "demo.json").read_text())
    assert results.pop("seconds") > 0
    for arm in results["arms"].values():
        assert arm.pop("seconds") > 0
    return results


def test_the_arms_differ_in_pairs_and_steps_alone(out: Path) -> None:
    configs = {name: load_config(RunFolder(out / name).config) for name in ARMS}
    assert {name: config.steps for name, config in configs.items()} == ARMS
    assert {config.seed for config in configs.values()} == {3}
    assert [(c.selection.views, c.selection.rule) for c in configs.values()] == [
        (2, "random"),
        (4, "hardest"),
        (2, "random"),
    ]
    changes: dict[str, Any] = {"selection": configs["random"].selection, "steps": 2}
    for config in configs.values():
        same = replace(config, monitor=configs["random"].monitor, checkpoint=configs["random"].checkpoint, **changes)
        assert same == configs["random"]


def test_figures_of_every_arm_are_written(out: Path) -> None:
    results = learned(out)
    for measure in ("knn", "linear"):
        assert list(results[measure]) == ["raw", "untrained", *ARMS]
        assert all(0 <= top1 <= 1 for top1 in results[measure].values())
    assert {name: arm["steps"] for name, arm in results["arms"].items()} == ARMS
    for loss in results["loss"].values():
        assert loss["chance"] == pytest.approx(2 * np.log(1025)) and loss["start"] > 0 and loss["end"] > 0
    assert results["verdict"].keys() == ARMS.keys() and None not in results["verdict"].values()
    page = (out / "report.html").read_text()
    assert "3 runs side by side" in page and all(f">{name}<" in page for name in ARMS)


def test_a_second_demo_ends_with_the_same_figures(out: Path, images: Path, tmp_path: Path) -> None:
    assert cli.run([*FLAGS, "--images", str(images), "--out", str(tmp_path / "again")]) == 0
    assert learned(tmp_path / "again") == learned(out)


def test_run_again_it_trains_nothing_anew(out: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, figures = [(out / name / "metrics.jsonl").read_bytes() for name in ARMS], learned(out)
    assert cli.run([*FLAGS, "--images", str(images), "--out", str(out)]) == 0
    assert [(out / name / "metrics.jsonl").read_bytes() for name in ARMS] == before and learned(out) == figures
    assert cli.run([*FLAGS[:1], "--steps", "3", *FLAGS[3:], "--images", str(images), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "was begun with other settings (steps); give them again, or another --out" in said


def test_a_run_s_own_verdict_is_shown(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, copy := tmp_path / "copy")
    folder = RunFolder(copy / "hard")
    write_json(folder.state, folder.read_state() | {"verdict": "learning"})
    results = demo.measure(copy, {name: load_config(RunFolder(copy / name).config) for name in ARMS})
    assert results["verdict"]["hard"] == "learning"
    shown = [list(column.cells) for column in demo.table(results).columns]
    assert shown[-1][3] == "learning"


def shards(root: Path, side: int, gray: bool) -> Manifest:
    (root / "images" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (side, side + 8, 1 if gray else 3), np.uint8)
        Image.fromarray(np.repeat(pixels, 3 if gray else 1, 2)).save(root / "images" / "a" / f"{number}.png")
    return build(BuildConfig(f"imagefolder:{root / 'images'}", root / "shards", workers=1))


@pytest.mark.parametrize(
    ("side", "gray", "views", "size", "cloned", "says"),
    [
        (14, True, GRAY_VIEWS, 32, 16, "about 14 pixels a side and gray"),
        (28, True, GRAY_VIEWS, 32, 0, "about 28 pixels a side and gray"),
        (32, False, COLOUR_VIEWS, 32, 0, "about 32 pixels a side and in colour"),
        (400, False, COLOUR_VIEWS, 64, 0, "about 400 pixels a side and in colour"),
        (200, True, GRAY_VIEWS, 64, 0, "Views of 64 pixels"),
    ],
)
def test_views_suit_size_and_colour(
    tmp_path: Path, side: int, gray: bool, views: object, size: int, cloned: int, says: str
) -> None:
    setting = demo.folder_setting(shards(tmp_path, side, gray))
    assert (setting.views, setting.side, setting.cloned) == (views, size, cloned) and says in setting.reason


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (64, 16)])
def test_the_backbone_takes_views_of_either_size(side: int, patch: int) -> None:
    config = demo.arm_config(DemoConfig(), demo.arms_of(2)["hard"], Setting(COLOUR_VIEWS, side, patch, 0, ""), False)
    objective = make_objective(config, Length(2, 1.0), torch.device("cpu"))
    assert objective.backbone(torch.zeros(2, 3, side, side)).shape == (2, 128)


def test_digits_are_neither_mirrored_nor_coloured_nor_blurred() -> None:
    assert set(DIGIT_VIEWS.build(32, 4).view_policies) == {
        ViewPolicy((0.5, 1.0), flip=0, brightness=0.3, contrast=0.3, saturation=0, hue=0, gray=0)
    }


def test_photographs_get_no_clone_of_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(COLOUR_VIEWS, 64, 16, 0, "")
    config = DemoConfig(out=tmp_path)
    assert not demo.make_clone(config, shards(tmp_path, 80, False), setting)
    assert f"hardviews generate --pipeline {demo.PRETRAINED} --like" in capsys.readouterr().err
    assert not (tmp_path / "diffusion").exists()


@pytest.mark.parametrize(("share", "mixed"), [(0.66, False), (0.67, True)])
def test_a_clone_is_trained_on_where_two_thirds_are_confirmed(
    out: Path, share: float, mixed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "confirmed", lambda *images: share)
    config, real = DemoConfig(out=out, diffusion_steps=2, seed=3), open_manifest(out / "shards" / "real")
    setting = demo.folder_setting(real)
    assert setting.cloned == 12 and demo.make_clone(config, real, setting) == mixed
    assert ("hardviews generate --pipeline" in capsys.readouterr().err) == (not mixed)
    data = demo.arm_config(config, demo.arms_of(2)["hard"], setting, mixed).data
    assert data.synthetic == ((str(out / "shards" / "synthetic"),) if mixed else ())


def test_the_words_follow_the_figures() -> None:
    arms = {"random": {"steps": 10, "seconds": 5.0}, "hard": {"steps": 10, "seconds": 9.0}}
    knn = {"raw": 0.9, "random": 0.7, "hard": 0.75, "random_same_time": 0.8}
    results = {"knn": knn, "arms": arms | {"random_same_time": {"steps": 20, "seconds": 10.0}}}
    results["verdict"] = dict.fromkeys(results["arms"], "learning") | {"hard": "collapsed"}
    said = demo.in_words(results, {"lowest_iou_share": 0.4, "chance": 1 / 6})
    assert "5.0 points above random pairs (kNN). A step costs 1.8 plain ones" in said[2]
    assert "they are 5.0 points below random pairs" in said[2] and "Raw pixels are better still" in said[3]
    assert said[4].startswith("The run with hard views, as many steps is collapsed: choose the hardest")
    assert said[5].startswith("What would help: more steps (--steps 40; ") and "weights to start from" in said[5]
    results["verdict"]["hard"] = "learning"
    results["knn"] = knn | {"raw": 0.5}
    said = demo.in_words(results, {"lowest_iou_share": 0.4, "chance": 1 / 6})
    assert len(said) == 4 and "(--steps 40), as all runs were learning" in said[3]


@pytest.mark.parametrize("flag", ["--steps", "--diffusion-steps"])
def test_no_steps_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", flag, "0", "--out", str(tmp_path / "out")]) == 2
    assert "must be at least 1" in capsys.readouterr().err and not (tmp_path / "out").exists()
