"""`hardviews generate`, from real shards alone: training, a clone with the same counts, reruns, mistakes."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import cli
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.generate import GenerateConfig, run
from shards.errors import InputError
from shards.generation.request import TrainSettings
from shards.generation.synthetic import image_seeds
from shards.manifest import open_manifest

TINY = TrainSettings(side=8, width=8, batch=4, steps=2, seconds=None)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 7 colour images of 12 pixels a side: 4 ants, 2 bees, 1 cow."""
    root = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    for label, count in (("ant", 4), ("bee", 2), ("cow", 1)):
        (root / "images" / label).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
            image.save(root / "images" / label / f"{number}.png")
    build(BuildConfig(images=f"imagefolder:{root / 'images'}", out=root / "shards"))
    return root / "shards"


@pytest.fixture(scope="module")
def trained(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that `--train-on` wrote."""
    root = tmp_path_factory.mktemp("trained")
    run(config(root / "pipeline", real, root / "out", train_on=str(real), train=TINY))
    return root / "pipeline"


def config(pipeline: Path, like: Path, out: Path, **changes) -> GenerateConfig:
    options = {"steps": 2, "batch": 4, "device": "cpu"} | changes
    return GenerateConfig(pipeline=str(pipeline), like=str(like), out=out, **options)


def flags(pipeline: Path, like: Path, out: Path, *more: str) -> list[str]:
    return ["generate", "--pipeline", str(pipeline), "--like", str(like), "--out", str(out), "--device", "cpu", *more]


def test_a_new_user_gets_a_clone_from_real_shards_alone(real: Path, tmp_path: Path) -> None:
    training = ["--train-on", str(real), "--train.side", "8", "--train.width", "8", "--train.steps", "2"]
    command = flags(tmp_path / "own", real, tmp_path / "out", *training, "--steps", "2")
    assert cli.run(command) == 0
    clone = open_manifest(tmp_path / "out")
    assert clone.source == "synthetic"
    assert clone.classes == ("ant", "bee", "cow")
    assert clone.class_counts.tolist() == [4, 2, 1]
    columns = clone.columns(np.arange(7))
    assert columns.seed is not None
    assert columns.seed.tolist() == image_seeds(0, np.arange(7)).tolist()
    assert set(columns.height.tolist()) == {12}  # the size of the real ones
    generator = clone.provenance["generator"]
    assert generator["name"] == str(tmp_path / "own")
    assert generator["class"] == "ClassPipeline"
    assert len(generator["sha256"]) == 64
    assert (clone.provenance["steps"], clone.provenance["like"]) == (2, str(real))
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = [(member.name.split(".")[1], tar.extractfile(member)) for member in tar]
        labels = [int(file.read()) for extension, file in members if extension == "cls" and file]
        images = [Image.open(file) for extension, file in members if extension == "png" and file]
        assert labels == columns.label.tolist()
        assert {(image.size, image.mode) for image in images} == {((12, 12), "RGB")}


def test_a_rerun_uses_the_trained_pipeline_and_finished_shards(
    real: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    same = config(trained, real, tmp_path / "out", train_on=str(real), train=TINY)
    first = run(same)
    assert "earlier training" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    second = run(same)
    assert first.entries == second.entries
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")} == written
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_counts_size_format_and_names(real: Path, trained: Path, tmp_path: Path) -> None:
    clone = run(config(trained, real, tmp_path / "a", per_class=2, size=20, format="jpg", quality=80, source="fake"))
    assert clone.class_counts.tolist() == [2, 2, 2]
    assert clone.source == "fake"
    columns = clone.columns(np.arange(6))
    assert set(columns.width.tolist()) == {20}
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"cow": "bee"}))
    clone = run(config(trained, real, tmp_path / "b", count=3, class_names=names))
    assert clone.classes == ("ant", "bee", "cow")
    assert clone.provenance["names"] == ["ant", "bee", "bee"]
    assert len(clone) == 3


def test_unlabelled_images_are_cloned_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    build(BuildConfig(images=f"folder:{tmp_path / 'images'}", out=tmp_path / "shards"))
    like = tmp_path / "shards"
    clone = run(config(tmp_path / "own", like, tmp_path / "out", train_on=str(like), train=TINY))
    assert (len(clone), clone.unlabelled, clone.classes) == (3, 3, ())


def test_another_training_into_the_same_folder_is_refused(real: Path, trained: Path, tmp_path: Path) -> None:
    longer = TrainSettings(side=8, width=8, batch=4, steps=3, seconds=None)
    with pytest.raises(InputError, match="was trained with steps 2, not 3"):
        run(config(trained, real, tmp_path / "out", train_on=str(real), train=longer))
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists and was not trained here"):
        run(config(tmp_path / "mine", real, tmp_path / "out", train_on=str(real), train=TINY))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workers", "2"], "--workers: the local engine"),
        (["--address", "x:1"], "--address: the local engine"),
        (["--count", "2", "--per-class", "1"], "exclude each other"),
        (["--batch", "0"], "--batch 0"),
        (["--class-names", "absent.json"], "--class-names absent.json"),
        (["--setps", "3"], "did you mean --steps"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], message: str, real: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(flags(trained, real, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "one object"), ('{"ant": 1}', "one object"), ('{"dog": "x"}', "no class 'dog'"), ("{", "as JSON")],
)
def test_wrong_class_names(content: str, message: str, real: Path, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        run(config(trained, real, tmp_path / "out", class_names=file))


def test_missing_inputs_are_named(
    real: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(flags(trained, tmp_path / "nothing", tmp_path / "out")) == 2
    assert "there is no manifest.json" in capsys.readouterr().err
    assert cli.run(flags(tmp_path, real, tmp_path / "out")) == 2
    assert "--train-on SHARDS" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_workers_give_the_same_shards(real: Path, trained: Path, tmp_path: Path) -> None:
    here = run(config(trained, real, tmp_path / "here", shard_samples=3))
    there = run(config(trained, real, tmp_path / "there", shard_samples=3, engine="ray", workers=2))
    assert here.entries == there.entries
    assert here.provenance == there.provenance
