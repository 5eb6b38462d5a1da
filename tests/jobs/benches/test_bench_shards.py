"""`hardviews bench shards` on small data, and how `hardviews bench` finds its benchmarks."""

import gc
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from jobs import bench
from jobs.benches import shards
from shards.errors import InputError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured, on less, and in this process."""
    for name, value in {"MANY_SHARDS": 40, "MANY_ROWS": 30, "VAST_SHARDS": 200, "VAST_ROWS": 100}.items():
        monkeypatch.setattr(shards, name, value)
    monkeypatch.setattr(shards, "DISTINCT", 2)
    monkeypatch.setattr(shards, "READ_SHARD", 8)
    read = shards.read_webdataset

    def read_here(root: Path, seconds: float, _: int) -> shards.Figures:
        """Without worker processes, which cost seconds to start."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its tars to the collector
            figures = read(root, seconds, 0)
            gc.collect()
        return figures

    monkeypatch.setattr(shards, "read_webdataset", read_here)
    monkeypatch.setattr(shards, "alone", lambda function, *arguments: shards._with_peak(function, arguments))


@pytest.mark.usefixtures("small")
def test_figures_are_printed_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--parts read order shuffle --images 20 --repeats 1 --seconds 0.05 --json"
    bench.main(["shards", *arguments.split()])
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    assert figures["read"]["hardviews_images_per_s"] > 0
    assert figures["read"]["webdataset_images_per_s"] > 0
    assert figures["order"]["many_samples"] == 1200
    assert 0 < figures["order"]["first_batch_s"] < 5
    assert "webdataset" in out
    assert "any position" in out
    # Larger blocks come nearer to a full shuffle.
    spread = [figures["shuffle"][f"{name}_classes_per_batch"] for name in ("block_4", "block_16", "block_64", "full")]
    assert spread == sorted(spread)


def test_shuffling_is_measured_as_defined() -> None:
    sorted_ids = np.arange(1024)
    assert shards.shuffling([sorted_ids], 1024)["rank_correlation"] == pytest.approx(1)
    assert shards.shuffling([sorted_ids[::-1]], 1024)["rank_correlation"] == pytest.approx(1)
    assert shards.shuffling([sorted_ids], 1024)["classes_per_batch"] == pytest.approx(
        shards.SHUFFLED_CLASSES / 4, abs=1
    )


@pytest.mark.parametrize("flag", ["images", "repeats", "threads"])
def test_wrong_sizes_are_refused(flag: str) -> None:
    with pytest.raises(InputError, match=f"--{flag}: 0"):
        bench.main(["shards", f"--{flag}", "0"])


@pytest.mark.parametrize("argv", [[], ["nothing"]])
def test_an_unknown_benchmark_lists_the_known_ones(argv: list[str]) -> None:
    with pytest.raises(InputError, match="choose one of " + ", ".join(bench.BENCHES)):
        bench.main(argv)


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in bench.BENCHES)
