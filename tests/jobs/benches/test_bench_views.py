"""The views benchmark: its sides are measured in the steady state, its figures are complete, its baseline is honest."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.benches import gpu, views
from jobs.benches.accuracy import Difference, markdown
from jobs.benches.ordinary import PillowBlur, ViewsOfFiles, transform
from jobs.benches.photographs import jpeg, photograph
from pipelines.colour import MEAN, STD
from pipelines.host import CHUNK
from pipelines.policies import ViewPolicy, build_policy
from shards.errors import InputError


@pytest.fixture(autouse=True)
def torchs_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_photographs_weigh_what_imagenets_do() -> None:
    sizes = [photograph(seed).shape for seed in range(8)]
    assert 440 <= np.mean([width for _, width, _ in sizes]) <= 500
    assert 370 <= np.mean([height for height, _, _ in sizes]) <= 430
    assert 100_000 <= np.mean([len(jpeg(seed)) for seed in range(8)]) <= 120_000
    assert jpeg(3) == jpeg(3)


def test_what_was_made_while_resting_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = [0.0], []

    def step() -> int:
        taken.append(now[0])
        now[0] += 0.5 if len(taken) > 3 else 0.0  # the first three batches were waiting
        return 10

    monkeypatch.setattr(views.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(views.time, "sleep", taken.append)
    side = views.Side(step, ahead=2)
    assert side.measure(4.0) == pytest.approx(20)
    side.rest()
    assert taken[-1] == pytest.approx(1.5)


def test_a_part_alone_does_every_chunk_once_and_in_order() -> None:
    done: list[int] = []

    def work(position: int) -> int:
        done.append(position)
        return position

    part = views.Parts(views.ViewsBench(batch=40, threads=1), work)
    assert [part.step() for _ in range(5)] == [0, CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK]
    part.pool.shutdown()
    assert sorted(done) == [CHUNK * place for place in range(5 + part.ahead)]


def test_the_ordinary_loaders_views_are_the_policys(tmp_path: Path) -> None:
    policy = build_policy("byol", 32, 3)
    steps = [[type(step).__name__ for step in transform(view, 32).transforms] for view in policy.view_policies]
    assert steps[0] == steps[2]
    assert "RandomSolarize" not in steps[0]
    assert "RandomSolarize" in steps[1]
    path = tmp_path / "image.png"
    Image.fromarray(photograph(0)).save(path)
    made = ViewsOfFiles([path], policy)[0]
    assert [view.shape for view in made] == [(3, 32, 32)] * 3
    plain = ViewPolicy(scale=(1, 1), ratio=(47 / 40, 47 / 40), flip=0, jitter=0, gray=0)
    flat = Image.new("RGB", (470, 400), (10, 200, 30))
    expected = (np.array([10, 200, 30]) / 255 - MEAN) / STD
    np.testing.assert_allclose(transform(plain, 8)(flat).mean((1, 2)), expected, atol=1e-4)


def test_pillows_blur_blurs() -> None:
    image = Image.fromarray(photograph(1))
    assert np.asarray(PillowBlur((2, 2))(image)).std() < np.asarray(image).std()


def test_a_run_gives_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(6):
        Image.fromarray(photograph(seed)).resize((60, 50)).save(folder / f"{seed}.jpg")
    flags = "--views 3 --size 24 --batch 4 --threads 1 --rounds 1 --seconds 0.05 --json --images"
    views.main([*flags.split(), str(folder)])
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["baseline_images_per_second"])
    assert figures["decode_images_per_second"] > 0
    assert figures["decode_and_crop_images_per_second"] > 0
    assert set(figures["profile"]) == {"draw", "read", "decode", "crop", "colour", "copy", "log"}
    assert figures["bound_by"] in figures["profile"]
    assert 0 < figures["log_share_of_step"] < 1
    assert (figures["images"], figures["views"], figures["size"], figures["threads"]) == (6, 3, 24, 1)


def test_a_folder_with_unreadable_files_is_refused(tmp_path: Path) -> None:
    Image.fromarray(photograph(0)).resize((60, 50)).save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    config = replace(views.ViewsBench(), images=tmp_path, threads=1)
    with pytest.raises(InputError, match="1 of 2 image files can be read"):
        views.views_figures(config)


def test_a_missing_device_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: cuda asked for"):
        views.main(["--device", "cuda"])


def test_the_table_of_differences_has_a_column_for_each_way() -> None:
    found = [Difference("hue", "photographs", way, mean, 1.5) for way, mean in (("fused", 0.1), ("exact", 0.0))]
    assert markdown(found).splitlines() == [
        "| operation | inputs | fused | exact |",
        "| --- | --- | --- | --- |",
        "| hue | photographs | 0.100 / 1.50 | 0.000 / 1.50 |",
    ]


def test_without_a_gpu_the_gpu_check_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert gpu.main([]) == 2
