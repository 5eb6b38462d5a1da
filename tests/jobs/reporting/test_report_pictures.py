"""The report's pictures from a real log and real shards: what is shown is what was logged."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import write_logged_run

from jobs import report
from jobs.log.reader import open_log
from jobs.log.replaying import replay_step
from jobs.reporting.pictures import by_class, caption, pictures, step_cards
from jobs.reporting.rundata import read_run
from jobs.run.folder import RunFolder
from pipelines.params import pair_iou


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    yield write_logged_run(tmp_path_factory.mktemp("logged"))


def test_cards_hold_what_the_log_holds(run: RunFolder) -> None:
    log = open_log(run.log)
    (rows,) = log.chunks(steps=(2, 3))
    cards = step_cards(replay_step(run, 2), log.sources)
    assert len(cards) == len(rows) == 6
    for i, card in enumerate(cards):
        assert card.boxes_V4[:, 0].tolist() == rows.params.top[i].tolist()
        assert card.boxes_V4[:, 3].tolist() == rows.params.width[i].tolist()
        assert card.chosen == rows.loss_BP[i].argmax()
        assert card.overlaps_P is not None
        assert card.overlaps_P == pytest.approx(pair_iou(rows.params)[i])
        assert card.original.shape[:2] == tuple(rows.sizes_B2[i])
        assert [view.shape for view in card.views] == [(16, 16, 3)] * 3
        assert log.sources[rows.source_B[i]] in card.note


def test_captions_name_what_was_done(run: RunFolder) -> None:
    (rows,) = open_log(run.log).chunks(steps=(0, 1))
    for i in range(6):
        for v in range(3):
            words = caption(rows.params[i], v, int(rows.sizes_B2[i].prod())).replace("\N{NO-BREAK SPACE}", " ")
            share = rows.params.height[i, v] * rows.params.width[i, v] / rows.sizes_B2[i].prod()
            assert words.startswith(f"{100 * share:.0f} % area")
            assert ("gray" in words) == rows.params.gray[i, v]
            hue = abs(rows.params.hue[i, v]) >= 0.005
            assert ("h " in words) == (rows.params.jitter[i, v] and hue) and "1.00" not in words
            assert ("blur" in words) == (rows.params.blur[i, v] > 0)


def test_the_report_has_every_picture(run: RunFolder, tmp_path: Path) -> None:
    text = report.write_report([run.path], tmp_path / "report.html", images=4).read_text()
    for part in ("Step 2", "Step 0", "Real", "Synthetic", "Grad-CAM", "untrained", "step 4"):
        assert part in text
    alts = re.findall(r'<img[^>]* alt="([^"]*)"', text)
    assert len([a for a in alts if a.startswith("Original image")]) == 4
    assert len([a for a in alts if re.match(r"View \d of", a)]) == 12
    assert len([a for a in alts if a.startswith("Real image")]) == 8
    assert len([a for a in alts if a.startswith("Attention of")]) == 4 * 3
    assert "could not be made" not in text


def test_both_sources_stand_in_the_gallery(run: RunFolder) -> None:
    views = str(pictures(read_run(run.path), 4)["views"])
    assert {"real", "synthetic"} == set(re.findall(r"<span>(real|synthetic), ", views))


def test_pictures_that_cannot_be_made_say_why(run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "log.zarr")
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    found = pictures(read_run(copy), 2)
    assert "no augmentation log" in found["views"]
    assert "no checkpoint" in found["attention"]
    assert "Real image" in found["samples"]
    assert set(pictures(read_run(copy), 0).values()) == {"Pictures were not asked for."}
    text = report.write_report([copy], tmp_path / "report.html").read_text()
    assert "no augmentation log" in text


def test_images_are_halved_until_the_file_is_small(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report.write_report([run.path], tmp_path / "whole.html", images=2).stat().st_size
    monkeypatch.setattr(report, "LARGEST", whole - 1)
    small = report.write_report([run.path], tmp_path / "small.html", images=2)
    assert small.stat().st_size < whole
    assert len(re.findall(r'alt="Original image', small.read_text())) == 1


def test_samples_are_spread_over_classes() -> None:
    class Images:
        labels = np.array([2, 0, 1, -1, 0, 2, 1])

    assert by_class(Images(), 3) == [1, 2, 5]
    assert sorted(by_class(Images(), 99)) == [0, 1, 2, 4, 5, 6]
