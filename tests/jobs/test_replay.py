"""Replay: the views of a logged step are those that were trained on, bit for bit, or it says why not."""

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.log import replaying
from jobs.log.replaying import replay_step
from jobs.log.writer import AugmentationLog, batch_rows
from jobs.replay import ReplayConfig, figure, main, replay
from jobs.run.config import DataConfig, PretrainConfig, ViewsConfig, save_config
from jobs.run.data import open_data, open_stream, run_policy
from jobs.run.folder import RunFolder
from jobs.run.world import World
from models.backbones import BackboneConfig
from models.selection import SelectionConfig
from pipelines.batch import ViewBatch
from pipelines.policies import IouScript
from shards.errors import InputError
from shards.manifest import Manifest
from shards.writer import Sample, finish, shard_name, write_shard

BATCH, STEPS = 6, 4


def write_data(folder: Path, seed: int = 0) -> Manifest:
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(16):
        height, width = 40 + number, 70 - 2 * number
        buffer = io.BytesIO()
        pixels = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height))
        pixels.save(buffer, "JPEG")
        samples.append(Sample(f"{number:04d}", buffer.getvalue(), "jpg", height, width, label=number % 2))
    folder.mkdir(parents=True)
    results = [write_shard(folder, shard_name(i), samples[8 * i : 8 * i + 8], {}) for i in range(2)]
    return finish(folder, results, source="real", classes=("cat", "dog"), provenance={})


def write_run(folder: Path, views: ViewsConfig, **facts: str) -> tuple[RunFolder, list[ViewBatch]]:
    """A run of four steps: the log as training writes it, and the batches that training saw."""
    write_data(folder / "shards")
    config = PretrainConfig(
        data=DataConfig(real=str(folder / "shards")),
        views=views,
        selection=SelectionConfig(views=3),
        backbone=replace(BackboneConfig(), image_size=24),
        batch=BATCH,
        device="cpu",
        seed=11,
    )
    run = RunFolder(folder / "run")
    run.clear()
    save_config(config, run.config)
    data = open_data(config)
    shards = [{"root": m.root, "source": m.source, "fingerprint": m.fingerprint} for m in data.manifests]
    views_N = run_policy(config).views
    log = AugmentationLog(run.log, 0, views_N, scored=3, sources=data.sources, facts={"shards": shards, **facts})
    world = World(0, 1, torch.device("cpu"))
    with open_stream(config, data, world, 0, lambda error: None) as stream:
        batches = list(itertools.islice(stream, STEPS))
    rng = np.random.default_rng(0)
    for step, batch in enumerate(batches):
        losses = rng.random((BATCH, 3), np.float32)
        log.append(batch_rows(batch, step, log.scored, losses, losses.argmax(1)))
    log.close()
    data.reader.close()
    return run, batches


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[ViewBatch]]:
    script = IouScript((0.0, 0.5), (0.2, 0.8), samples=20, tries=3, alternate=7)
    return write_run(tmp_path_factory.mktemp("single"), ViewsConfig(iou=script))


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[ViewBatch]]:
    return write_run(
        tmp_path_factory.mktemp("multi"),
        ViewsConfig(policy="dino", local_views=2, interpolation="bicubic", colour="clamped"),
    )


@pytest.mark.parametrize("which", ["single", "multi"])
def test_views_are_those_of_training_bit_for_bit(which: str, request: pytest.FixtureRequest) -> None:
    run, batches = request.getfixturevalue(which)
    for step in (0, 3):
        replayed = replay_step(run, step)
        assert np.array_equal(replayed.rows.sample_B, batches[step].sample_B)
        assert replayed.redrawn_B.all()
        for again, then in zip(replayed.crops, batches[step].crops, strict=True):
            assert torch.equal(again, then)
    one = replay_step(run, 2, [4])
    assert torch.equal(one.crops[0][0], batches[2].crops[0][4])
    assert [view.shape for view in one.views(0)][:3] == [(24, 24, 3)] * 3
    size = tuple(batches[2].sizes_B2[4])
    assert one.originals[0].shape == (*size, 3) and one.classes[0] == ("cat", "dog")[batches[2].label_B[4]]


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cuda", "bf16", torch.bfloat16),
        ("cuda", "tf32", torch.float32),
        ("cuda", "fp32", torch.float32),
        ("cpu", "bf16", torch.float32),
        ("cpu", None, torch.float32),  # a log from before precision was in it
    ],
)
def test_views_have_the_dtype_that_the_run_trained_on(
    device: str, precision: str | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batches = write_run(tmp_path, ViewsConfig(), **({"precision": precision} if precision else {}))
    replayed, made = replaying.replay, []

    def on_the_cpu(*rows: Any, **how: Any) -> ViewBatch:
        made.append(how["device"].type)
        return replayed(*rows, **how | {"device": torch.device("cpu")})

    monkeypatch.setattr(replaying, "replay", on_the_cpu)
    monkeypatch.setattr(replaying, "pick_device", torch.device)
    again = replay_step(run, 1, device=device).crops[0]
    assert made == [device] and again.dtype == dtype
    assert torch.equal(again, batches[1].crops[0].to(dtype))


@pytest.mark.parametrize("which", ["single", "multi"])
def test_the_picture_shows_every_view_and_outlines_what_trained(which: str, request: pytest.FixtureRequest) -> None:
    run, batches = request.getfixturevalue(which)
    replayed = replay_step(run, 1, [0, 3])
    views = batches[1].params.shape[1]
    drawn = figure(replayed)
    assert len(drawn.axes) == 2 * (views + 1)
    for image, row in enumerate((0, 3)):
        original, *frames = drawn.axes[image * (views + 1) : (image + 1) * (views + 1)]
        chosen = np.flatnonzero(replayed.rows.chosen_BN[image])
        assert [view for view, axes in enumerate(frames) if "chosen" in axes.get_title()] == chosen.tolist()
        boxes = {
            tuple(np.round([*patch.get_xy(), patch.get_width(), patch.get_height()], 1)) for patch in original.patches
        }
        params = batches[1].params[row]
        assert boxes == {
            (params.left[v] - 0.5, params.top[v] - 0.5, float(params.width[v]), float(params.height[v]))
            for v in range(views)
        }


def test_the_command_writes_a_picture(
    single: tuple[RunFolder, list[ViewBatch]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(single[0].path), "--step", "2", "--image", "1", "--out", str(tmp_path / "one.png")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert min(picture.size) > 150
    assert replay(ReplayConfig(single[0].path, 0, images=2)) == single[0].path / "analysis" / "replay-00000000.png"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"step": 99}, "holds steps 0 to 3"),
        ({"step": 0, "image": BATCH}, "has images 0 to 5"),
        ({"step": 0, "images": 0}, "at least 1"),
        ({"step": 0, "real": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_is_not_there_is_named(single: tuple[RunFolder, list[ViewBatch]], options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        replay(ReplayConfig(single[0].path, **options))
    assert "\n" not in str(caught.value)


def test_changed_shards_are_noticed(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, ViewsConfig())
    other = write_data(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="has changed since the log was written"):
        replay_step(run, 0, real=other.root)
    (tmp_path / "shards").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="if the shards have moved, name where with --real"):
        replay_step(run, 0)
    assert replay_step(run, 0, real=str(tmp_path / "moved")).redrawn_B.all()
    tar = tmp_path / "moved" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    for place in range(700, len(content), 300):
        content[place] ^= 1
    tar.write_bytes(content)
    with pytest.raises(InputError, match="they have changed since the log was written"):
        replay_step(run, 0, real=str(tmp_path / "moved"))
