"""Several folders of shards a source: their shares, tags, configuration, order, and a run on them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.log.reader import open_log
from jobs.pretrain import PretrainArguments, pretrain
from jobs.run.config import DataConfig, PretrainConfig, from_plain, load_config, to_plain
from jobs.run.data import open_data, shares, tags
from jobs.run.presets import preset
from jobs.run.terminal import parse
from shards.errors import InputError
from shards.order import SampleOrder
from shards.writer import Sample, finish, shard_name, write_shard

COUNTS = [np.array(counts, np.int64) for counts in ([40, 20], [30], [10], [7, 7, 6], [60])]


def sides(**options) -> DataConfig:
    return DataConfig(real=("a", "b", "c"), synthetic=("d", "e"), **options)


def test_folders_share_their_side_by_size_or_weight() -> None:
    by_size = shares(sides(synthetic_share=0.25), COUNTS, 1)
    assert [*map(float, by_size[0])] == [0.45, 0.225, 0.075, 0.0625, 0.1875]
    weighted = shares(sides(synthetic_share=0.5, weights=(2, 1, 1, 0, 3)), COUNTS, 1)
    assert weighted == [[0.25, 0.125, 0.125, 0, 0.5]]
    ramp = shares(sides(synthetic_share=0.0, final_synthetic_share=1.0), COUNTS, 3)
    assert [float(sum(row[:3])) for row in ramp] == [1, 0.5, 0]
    assert [float(value) for value in shares(DataConfig(real=("a", "b")), COUNTS[:2], 1)[0]] == [60 / 90, 30 / 90]
    assert [float(value) for value in shares(DataConfig(synthetic=("a", "b")), COUNTS[:2], 1)[0]] == [60 / 90, 30 / 90]


def test_the_order_of_one_folder_a_source_is_what_it_was() -> None:
    for share in (0.3, 1 / 3, 0.5):
        config = DataConfig(real=("a",), synthetic=("b",), synthetic_share=share)
        order = SampleOrder(COUNTS[:2], shares(config, COUNTS[:2], 1), seed=3, block=1)
        before = SampleOrder(COUNTS[:2], [[1 - share, share]], seed=3, block=1)
        assert order.epoch_length == before.epoch_length
        for name in ("ids", "sources", "epochs"):
            assert np.array_equal(getattr(order.at(0, 500), name), getattr(before.at(0, 500), name))


def test_an_epoch_goes_through_every_real_folder_once_in_exact_quotas() -> None:
    order = SampleOrder(COUNTS, shares(sides(synthetic_share=0.2), COUNTS, 1), seed=1, block=2)
    assert order.epoch_length == 125
    samples = order.at(0, 125)
    assert np.bincount(samples.sources, minlength=5)[:3].tolist() == [60, 30, 10]
    real = samples.ids[samples.sources < 3]
    assert sorted(real.tolist()) == list(range(100))
    for start in range(0, 300, 7):  # quotas of any stretch, to within K − 1
        found = np.bincount(order.at(start, 50).sources, minlength=5)
        assert np.abs(found - 50 * np.array([0.48, 0.24, 0.08, 0.05, 0.15])).max() <= 4
    parts = [order.at(start, 25).ids for start in range(0, 125, 25)]
    assert np.array_equal(np.concatenate(parts), samples.ids)


@pytest.mark.parametrize(
    ("given", "roots", "real", "expected"),
    [
        (["real", "synthetic"], ["a", "b"], 1, ("real", "synthetic")),
        (["real", "real"], ["a", "b"], 1, ("real", "synthetic")),
        (["web", "flickr", "dit", "sdxl"], ["a"] * 4, 2, ("web", "flickr", "dit", "sdxl")),
        (["real", "real", "fake"], ["s3://b/crawl-1/", "/x/2", "c"], 2, ("real-crawl-1", "real-2", "fake")),
        (["real", "real"], ["x/a", "y/a"], 2, ("real-a-1", "real-a-2")),
    ],
)  # fmt: skip
def test_no_two_folders_have_the_same_tag(given: list[str], roots: list[str], real: int, expected: tuple) -> None:
    assert tags(given, roots, real) == expected


def test_configurations_of_before_have_one_address_as_text() -> None:
    plain = to_plain(PretrainConfig())
    del plain["data"]["weights"]
    plain["data"] |= {"real": "shards/real", "synthetic": ""}
    config = from_plain(plain)
    assert (config.data.real, config.data.synthetic, config.data.weights) == (("shards/real",), (), ())
    assert from_plain(to_plain(config)) == config


def test_flags_take_several_folders() -> None:
    flags = [
        "--run",
        "R",
        "--data.real",
        "A",
        "B",
        "C",
        "--data.synthetic",
        "D",
        "E",
        "--data.weights",
        "1",
        "1",
        "2",
        "0.5",
        "1",
    ]
    given = parse(PretrainArguments, flags, "p", PretrainArguments(Path("R"), config=preset("synby-vit-tiny")))
    assert given.config.data.real == ("A", "B", "C")
    assert given.config.data.synthetic == ("D", "E")
    assert given.config.data.weights == (1, 1, 2, 0.5, 1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 1), "data.weights: 2 for 3 folders of real and 2 of synthetic images; give one for each"),
        ((1, 1, -1, 1, 1), r"data.weights: \[1, 1, -1\]; give numbers of 0 or above"),
        ((1, 1, 1, 0, 0), r"data.weights: \[0, 0\]; .* one of each side above 0"),
    ],
)
def test_weights_that_fit_no_folders_are_refused(weights: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sides(weights=weights)


def test_a_run_on_several_folders_resumes_and_tells_them_apart(
    tiny: PretrainConfig, digits: Path, tmp_path: Path
) -> None:
    for name in ("crawl-1", "crawl-2"):
        shutil.copytree(digits / "train", tmp_path / name)
    test = str(digits / "test")
    data = replace(tiny.data, real=(str(tmp_path / "crawl-1"), str(tmp_path / "crawl-2")), synthetic=(test,))
    config = replace(tiny, data=data)
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000006.*"):
        path.unlink()
    assert (
        pretrain(replace(config, data=replace(data, real=(), synthetic=())), tmp_path / "run", resume=True)
        == "finished"
    )
    logs = [open_log(tmp_path / name / "log.zarr") for name in ("whole", "run")]
    assert logs[0].sources == ["real-crawl-1", "real-crawl-2", "synthetic"]
    rows = [next(iter(log.chunks())) for log in logs]
    assert np.array_equal(rows[0].loss_BP, rows[1].loss_BP, equal_nan=True)
    assert np.bincount(rows[0].source_B).tolist() == [36, 36, 24]
    assert load_config(tmp_path / "run" / "config.json").data == data
    swapped = replace(data, real=(str(tmp_path / "crawl-1"), test), synthetic=())
    with pytest.raises(InputError, match=r"the log was written from 3 data sets|has changed since the log"):
        pretrain(replace(config, data=swapped), tmp_path / "run", resume=True)


def test_data_opens_folders_in_order(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        samples = [Sample(f"{n}", b"x" * (n + 1), "jpg", 4, 4) for n in range(3 + number)]
        result = write_shard(tmp_path / name, shard_name(0), samples, {})
        finish(tmp_path / name, [result], source="real", classes=(), provenance={})
    data = open_data(PretrainConfig(data=DataConfig(real=(str(tmp_path / "b"), str(tmp_path / "a")))))
    assert [len(manifest) for manifest in data.manifests] == [4, 3]
    assert data.sources == ("real-b", "real-a")
    data.reader.close()
