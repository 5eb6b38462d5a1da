"""Features as Parquet: equal to the backbone's, complete, resumable, over several processes, read by others."""

import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import polars
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_runs import TINY, write_run
from runs_of_training import finish, start

from jobs import cli
from jobs.evaluation.embeddings import read_embeddings
from jobs.evaluation.features import extract_features
from jobs.export_backbone import ExportBackboneConfig, export_backbone
from jobs.run.checkpoint import load_backbone
from shards.manifest import open_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("embed") / "run").path


def embed(run: Path, data: Path, out: Path, *flags: str) -> int:
    return cli.run(["embed", "--run", str(run), "--data", str(data), "--out", str(out), "--device", "cpu", *flags])


def test_a_row_an_image_with_the_backbone_s_features(run: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert embed(run, digits / "test", out, "--rows", "100") == 0
    manifest = open_manifest(digits / "test")
    columns = manifest.columns(np.arange(len(manifest)))
    expected = extract_features(load_backbone(run)[0], digits / "test", TINY.image_size, torch.device("cpu"))
    read = read_embeddings(out)
    np.testing.assert_allclose(read.features_nD, expected.features_nD.numpy(), rtol=1e-4, atol=1e-5)
    assert read.keys == columns.key and read.source == "real" and read.classes == manifest.classes
    assert read.shards == [manifest.shards[shard] for shard in columns.shard]
    np.testing.assert_array_equal(read.labels, columns.label)
    table = polars.read_parquet(out / "part-*.parquet")
    assert table["feature"].dtype == polars.Array(polars.Float32, read.features_nD.shape[1])
    np.testing.assert_array_equal(table["feature"].to_numpy(), read.features_nD)


def test_it_goes_on_where_it_stopped_and_mixes_nothing(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", ("--rows", "100")
    embed(run, digits / "test", out, *flags)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    content = (out / "part-00001.parquet").read_bytes()
    (out / "part-00001.parquet").unlink()
    with pytest.raises(Exception, match="is not complete; run `hardviews embed` again"):
        read_embeddings(out)
    assert embed(run, digits / "test", out, *flags) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert {name for name in before if before[name] != after[name]} == {"part-00001.parquet"}
    assert (out / "part-00001.parquet").read_bytes() == content
    capsys.readouterr()
    for more, message in (
        (
            ("--pool", "mean"),
            "holds features of another model, pool, and one folder holds features of one kind; choose an",
        ),
        (("--dtype", "float16"), "holds features of another dtype"),
    ):
        assert embed(run, digits / "test", out, *flags, *more) == 2
        assert message in capsys.readouterr().err
    assert embed(run, digits / "train", out, *flags) == 2
    assert embed(run, digits / "test", out, *flags, "--pool", "mean", "--overwrite") == 0
    assert json.loads((out / "embeddings.json").read_text())["pool"] == "mean"


def test_views_are_averaged_and_tokens_are_those_of_the_patches(run: Path, digits: Path, tmp_path: Path) -> None:
    embed(run, digits / "test", tmp_path / "one", "--tokens", "--pool", "mean")
    embed(run, digits / "test", tmp_path / "three", "--views", "3", "--dtype", "float16")
    table = pq.read_table(tmp_path / "one" / "part-00000.parquet")
    tokens, features = (np.array(table[name].to_pylist()) for name in ("tokens", "feature"))
    assert tokens.shape == (len(table), (TINY.image_size // (TINY.patch_size or 1)) ** 2, features.shape[1])
    np.testing.assert_allclose(tokens.mean(1), features, atol=1e-5)
    assert (
        str(pq.read_schema(tmp_path / "three" / "part-00000.parquet").field("feature").type.value_type) == "halffloat"
    )
    embed(run, digits / "test", tmp_path / "again", "--views", "3", "--dtype", "float16")
    one, again = (read_embeddings(tmp_path / name).features_nD for name in ("three", "again"))
    np.testing.assert_array_equal(one, again)  # its random crops are the same each time
    embed(run, digits / "test", tmp_path / "plain")
    assert 0 < np.abs(one - read_embeddings(tmp_path / "plain").features_nD).mean() < 1


PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", PAGE, re.S), ids=lambda text: text.split()[1])
def test_the_page_s_programs_read_them(
    program: str, run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip(program.split()[1])
    embed(run, digits / "test", tmp_path / "features", "--rows", "200")
    names: dict[str, object] = {}
    exec(program, names)
    features = names.get("features")
    if features is not None:
        assert np.asarray(features).shape == read_embeddings(tmp_path / "features").features_nD.shape


@pytest.mark.slow
def test_two_processes_share_the_parts(run: Path, digits: Path, tmp_path: Path) -> None:
    arguments = ["embed", "--run", str(run), "--data", str(digits / "test"), "--rows", "100", "--device", "cpu"]
    program = f"from jobs import cli; raise SystemExit(cli.run({[*arguments, '--out', str(tmp_path / 'two')]!r}))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    meet |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    finish([start(command, RANK=rank, LOCAL_RANK=rank, **meet) for rank in "01"], 200)
    embed(run, digits / "test", tmp_path / "one", "--rows", "100")
    one, two = (read_embeddings(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(one.features_nD, two.features_nD, rtol=1e-4, atol=1e-5)
    assert one.keys == two.keys


def test_a_folder_of_images_with_a_broken_one(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And from an exported backbone."""
    images = tmp_path / "images" / "one"
    images.mkdir(parents=True)
    for number, path in enumerate(sorted((digits / "images" / "test").rglob("*.*"))[:5]):
        (images / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"\x89PNG nothing")
    export_backbone(ExportBackboneConfig(run, tmp_path / "backbone"))
    flags = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.run(["embed", "--backbone", str(tmp_path / "backbone"), *flags]) == 0
    assert "1 images cannot be read and are left out" in capsys.readouterr().err
    read = read_embeddings(tmp_path / "out")
    assert read.keys == [f"one/{n}{path.suffix}" for n, path in enumerate(sorted(images.glob("[0-9]*")))]
    assert "broken.png" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert read.shards == [None] * 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "RUN", "--data", "nowhere"], "images: nowhere does not exist"),
        (["--data", "DATA"], "run: give either --run RUN or --timm NAME"),
        (["--run", "RUN", "--data", "DATA", "--views", "0"], "views: 0 must be at least 1"),
        (["--backbone", "nowhere", "--data", "DATA"], "backbone: nowhere holds no model.safetensors; give an export"),
        (["--timm", "no_such_model", "--data", "DATA"], "timm: no_such_model is no model of timm"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "DATA": str(digits / "test")}
    assert cli.run(["embed", *(names.get(flag, flag) for flag in flags), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
