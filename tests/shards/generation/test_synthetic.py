"""Which images a clone holds, their seeds, and shards that a stopped generation goes on with."""

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_folders import build_at, contents, imagefolder
from PIL import Image

from shards.errors import InputError
from shards.generation.diffusion import fingerprint, save, small_pipeline
from shards.generation.request import Request
from shards.generation.synthetic import (
    Task,
    draw,
    generate,
    generate_shard,
    image_seeds,
    match_counts,
    plan,
    resized,
    sampler_of,
    spread_labels,
)
from shards.manifest import Manifest, open_manifest
from shards.writer import Rejected

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """For an untrained pipeline of three classes."""
    folder = tmp_path_factory.mktemp("pipeline") / "own"
    torch.manual_seed(0)
    save(small_pipeline(8, 8, 3, CLASSES), folder, {})
    return request_for(folder)


def request_for(folder: Path, **changes) -> Request:
    request = Request(
        pipeline=str(folder),
        fingerprint=fingerprint(folder),
        names=CLASSES,
        prompt="a {class}",
        steps=2,
        guidance=None,
        size=None,
        seed=0,
        batch=4,
        format="png",
        quality=None,
        device="cpu",
        precision="fp32",
    )
    return dataclasses.replace(request, **changes)


def run_here(function, tasks):
    return map(function, tasks)


def generated(
    request: Request, out: Path, counts=(4, 3, 2, 1), shard_samples: int = 4, run=run_here, **options
) -> Manifest:
    tasks = plan(request, out, counts, shard_samples)
    facts = {"generator": "tiny"}
    return generate(tasks, out, run, source="synthetic", classes=CLASSES, provenance=facts, **options)


def images_in(folder: Path) -> dict[str, bytes]:
    """Image bytes by key over all shards of a folder."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".png")}
    return found


@given(seed=st.integers(0, 2**63), first=st.integers(0, 2**31), count=st.integers(1, 300))
def test_seeds_follow_from_seed_and_number(seed: int, first: int, count: int) -> None:
    numbers = np.arange(first, first + count)
    seeds = image_seeds(seed, numbers)
    assert len(np.unique(seeds)) == count
    assert seeds.min() >= 0
    assert seeds.max() < 2**32  # what torch's generator reads of a seed
    assert np.array_equal(seeds[count // 2 :], image_seeds(seed, numbers[count // 2 :]))


def test_no_two_of_a_million_images_share_a_seed_and_seeds_are_pinned() -> None:
    assert len(np.unique(image_seeds(5, np.arange(1_000_000)))) == 1_000_000
    # A change of these would silently redraw every data set.
    assert image_seeds(0, np.arange(3)).tolist() == [0, 1364076727, 821347078]
    assert not np.isin(image_seeds(1, np.arange(1000)), image_seeds(0, np.arange(1000))).any()


@given(counts=st.lists(st.integers(0, 50), min_size=2, max_size=6), seed=st.integers(0, 100))
def test_labels_are_spread_and_counted(counts: list[int], seed: int) -> None:
    labels = spread_labels(counts, seed)
    known = labels[labels >= 0]
    assert np.bincount(known, minlength=len(counts) - 1).tolist() == counts[:-1]
    assert (labels == -1).sum() == counts[-1]
    assert np.array_equal(labels, spread_labels(counts, seed))


def test_every_shard_holds_all_classes() -> None:
    labels = spread_labels([500] * 4 + [0], 3).reshape(-1, 100)
    assert all(len(np.unique(shard)) == 4 for shard in labels)


def test_counts_are_matched(tmp_path: Path) -> None:
    like = build_at(f"imagefolder:{imagefolder(tmp_path / 'images', 10)}", tmp_path / "real")
    assert match_counts(like) == [4, 3, 3, 0]
    assert match_counts(like, per_class=7) == [7, 7, 7, 0]
    assert match_counts(like, count=101) == [41, 30, 30, 0]
    for total in range(1, 40):
        assert sum(match_counts(like, count=total)) == total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 5, "per_class": 1}, "exclude each other"),
        ({"count": 0}, "--count 0"),
        ({"per_class": -1}, "--per-class -1"),
    ],
)
def test_wrong_counts(options: dict[str, int], message: str, tmp_path: Path) -> None:
    like = build_at(f"imagefolder:{imagefolder(tmp_path / 'images', 3)}", tmp_path / "real")
    with pytest.raises(InputError, match=message):
        match_counts(like, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch": 0}, "--batch 0"),
        ({"size": 0}, "--size 0"),
        ({"quality": 80}, "--quality 80"),
        ({"quality": 101, "format": "jpg"}, "--quality 101"),
    ],
)
def test_wrong_requests(changes: dict[str, int], message: str, request_: Request, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plan(dataclasses.replace(request_, **changes), tmp_path, [1, 0])


def test_a_clone_records_class_seed_and_generator(request_: Request, tmp_path: Path) -> None:
    manifest = generated(request_, tmp_path / "out")
    assert manifest.source == "synthetic"
    assert manifest.classes == CLASSES
    assert manifest.class_counts.tolist() == [4, 3, 2]
    assert manifest.unlabelled == 1
    assert manifest.counts.tolist() == [4, 4, 2]
    assert manifest.provenance["generator"] == "tiny"
    columns = manifest.columns(np.arange(10))
    assert columns.seed is not None
    assert columns.seed.tolist() == image_seeds(0, np.arange(10)).tolist()
    assert columns.label.tolist() == spread_labels([4, 3, 2, 1], 0).tolist()
    assert set(columns.height.tolist()) == set(columns.width.tolist()) == {8}


def test_any_image_can_be_drawn_again_from_its_row(request_: Request, tmp_path: Path) -> None:
    manifest = generated(request_, tmp_path / "out")
    row = manifest.columns(np.array([6]))
    assert row.seed is not None
    images, _ = sampler_of(request_)([int(row.label[0])], [int(row.seed[0])])
    stored = images_in(tmp_path / "out")[f"{row.key[0]}.png"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), images[0])


def test_images_do_not_depend_on_the_size_of_shards(request_: Request, tmp_path: Path) -> None:
    generated(request_, tmp_path / "large", shard_samples=10)
    generated(request_, tmp_path / "small", shard_samples=3)
    assert images_in(tmp_path / "large") == images_in(tmp_path / "small")


def test_a_rerun_touches_nothing(request_: Request, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generated(request_, out)
    before = contents(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    finished = []

    def refuse(function, tasks):
        assert not tasks
        return iter(())

    generated(request_, out, run=refuse, on_finished=finished.append)
    assert contents(out) == before
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")} == times
    assert [result.entry.count for result in finished] == [4, 4, 2]


def test_an_interrupted_generation_goes_on_to_the_same_bytes(request_: Request, tmp_path: Path) -> None:
    generated(request_, tmp_path / "whole")

    def interrupted(function, tasks):
        yield generate_shard(tasks[0])

        def stop(count: int) -> None:
            raise KeyboardInterrupt

        generate_shard(tasks[1], stop)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        generated(request_, out, run=interrupted)
    assert not (out / "manifest.json").exists()
    assert [path.name for path in out.glob("*.tar")] == ["shard-000000.tar"]
    seen: list[Task] = []

    def watched(function, tasks):
        seen.extend(tasks)
        return map(function, tasks)

    generated(request_, out, run=watched)
    assert [task.number for task in seen] == [1, 2]
    assert contents(out) == contents(tmp_path / "whole")


def test_another_request_is_refused_unless_overwritten(request_: Request, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generated(request_, out)
    other = dataclasses.replace(request_, seed=1)
    with pytest.raises(InputError, match="seed 0, not 1"):
        generated(other, out)
    with pytest.raises(InputError, match="count and classes"):
        generated(request_, out, counts=(4, 0, 0, 0))
    with pytest.raises(InputError, match=r"guidance None, not 2\.0"):
        generated(dataclasses.replace(request_, guidance=2.0), out)
    manifest = generated(other, out, overwrite=True)
    assert manifest.columns(np.arange(1)).seed.tolist() == image_seeds(1, np.arange(1)).tolist()
    assert len(generated(request_, out, counts=(4, 0, 0, 0), overwrite=True)) == 4
    assert len(list(out.glob("*.tar"))) == 1


def test_where_the_pipeline_lies_does_not_matter_but_what_it_is_does(request_: Request, tmp_path: Path) -> None:
    moved = dataclasses.replace(request_, pipeline="elsewhere")
    out = tmp_path / "out"
    assert plan(moved, out, [1, 0])[0].settings == plan(request_, out, [1, 0])[0].settings
    torch.manual_seed(1)
    save(small_pipeline(8, 8, 3, CLASSES), tmp_path / "other", {})
    with pytest.raises(InputError, match="changed meanwhile"):
        generated(dataclasses.replace(request_, pipeline=str(tmp_path / "other")), out)


def test_size_and_format(request_: Request, tmp_path: Path) -> None:
    request = dataclasses.replace(request_, size=12, format="jpg", quality=90)
    manifest = generated(request, tmp_path / "out")
    columns = manifest.columns(np.arange(len(manifest)))
    assert set(columns.height.tolist()) == set(columns.width.tolist()) == {12}
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        first = tar.getmembers()[0]
        assert first.name == "000000000.jpg"
        with Image.open(tar.extractfile(first)) as image:
            assert (image.format, image.size) == ("JPEG", (12, 12))


def test_resizing_leaves_the_right_size_alone() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    assert resized(image, 8) is image
    assert resized(image, None) is image
    assert resized(image, 20).shape == (20, 20, 3)


def test_text_to_image_shards(tmp_path: Path) -> None:
    tiny_pipelines.stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "text")
    request = request_for(tmp_path / "text", batch=2)
    manifest = generated(request, tmp_path / "out", counts=(1, 1, 0, 0))
    assert manifest.class_counts.tolist() == [1, 1, 0]
    assert open_manifest(tmp_path / "out").columns(np.arange(2)).height.tolist() == [16, 16]


def test_images_that_the_pipeline_blanks_are_left_out(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blanking:
        def __call__(self, labels, seeds):
            return np.zeros((len(labels), 8, 8, 3), np.uint8), [label == 1 for label in labels]

    monkeypatch.setattr("shards.generation.synthetic.sampler_of", lambda request: Blanking())
    task = plan(request_, tmp_path, [1, 1, 0])[0]
    drawn = list(draw(task, lambda count: None))
    left_out = [one for one in drawn if isinstance(one, Rejected)]
    assert len(drawn) == 2
    assert [one.reason for one in left_out] == ["blanked by the pipeline's own safety checker"]
