import errno
import os
import re
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet
import pytest
from log_rows import losses_at, params_at, write_log

from jobs import cli
from jobs.analysis.tables import SCHEMAS
from jobs.export import export, main
from jobs.log.format import COLUMNS
from pipelines.params import FIELDS, pair_iou
from shards.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_log(folder / "log.zarr", steps=9, batch=20, world=2, every=3, at_random=7)
    return folder


def test_tables_hold_every_view_and_every_pair(run, tmp_path):
    done = export(run, tmp_path)
    assert (done.view_rows, done.pair_rows) == (360 * 4, 360 * 6)
    at = np.arange(360)
    params = params_at(at, 4)
    views = pandas.read_parquet(done.views)
    np.testing.assert_array_equal(views["position"], np.repeat(at, 4))
    np.testing.assert_array_equal(views["step"], np.repeat(at // 40, 4))
    np.testing.assert_array_equal(views["view"], np.tile(range(4), 360))
    np.testing.assert_array_equal(views["source"], np.where(views["position"] % 2, "synthetic", "real"))
    for name in FIELDS:
        np.testing.assert_array_equal(views[name], getattr(params, name).ravel())

    np.testing.assert_array_equal(views["at_random"], np.repeat(at % 7 == 3, 4) & (views["step"] % 3 == 0))

    table = pandas.read_parquet(done.pairs)
    np.testing.assert_array_equal(table["at_random"][::6], views["at_random"][::4])
    np.testing.assert_array_equal(table["iou"], pair_iou(params).ravel())
    scored = (at // 40) % 3 == 0
    losses = np.where(scored[:, None], losses_at(at, 4, params), np.nan)
    np.testing.assert_array_equal(table["loss"], losses.ravel())
    row = table.iloc[6 * 17 + 4]  # the pair (1, 3) of the image at position 17
    assert (row["first"], row["second"], row["pair"]) == (1, 3, 4)
    for name in ("brightness", "contrast", "saturation", "hue"):
        one, other = getattr(params, name)[17, [1, 3]]
        assert row[f"{name}_difference"] == abs(one - other)
    distance = np.linalg.norm([row[f"{n}_difference"] for n in ("brightness", "contrast", "saturation", "hue")])
    assert row["colour_distance"] == pytest.approx(distance, rel=1e-6)
    chosen = table["chosen"].to_numpy().reshape(360, 6)
    np.testing.assert_array_equal(chosen.sum(1), 1)
    by_rule = scored & (at % 7 != 3)
    np.testing.assert_array_equal(chosen[by_rule].argmax(1), losses[by_rule].argmax(1))
    both = views.loc[views["chosen"], "view"].to_numpy().reshape(360, 2)
    np.testing.assert_array_equal(both, table.loc[table["chosen"], ["first", "second"]])


def test_schemas_describe_every_column(run, tmp_path):
    done = export(run, tmp_path)
    for name, path in (("views", done.views), ("pairs", done.pairs)):
        schema = pyarrow.parquet.read_schema(path)
        assert schema.equals(SCHEMAS[name])
        assert all(field.metadata[b"description"] for field in schema)


def test_the_documentation_has_the_columns_that_the_program_has():
    text = (Path(__file__).parents[2] / "docs" / "log.md").read_text()
    axes = {"row": "row", "view": "row × view", "pair": "row × pair"}
    logged = [
        f"| `{name}` | {axes[column.axis]} | {np.dtype(column.dtype)} | {f'{column.unit} ' if column.unit else ''}"
        f"| {column.meaning} |"
        for name, column in COLUMNS.items()
    ]
    assert table_rows(text, "| column | dimensions | type | unit | meaning |") == logged
    plain = {"float": "float32", "dictionary<values=string, indices=int8, ordered=0>": "string"}
    pairs = [
        f"| `{field.name}` | {plain.get(str(field.type), field.type)} | {field.metadata[b'description'].decode()} |"
        for field in SCHEMAS["pairs"]
    ]
    assert table_rows(text, "| column | type | meaning |") == pairs
    views = text.partition("`views`: a row per image")[2].partition("`pairs`")[0]
    assert [*re.findall("`([a-z_]+)`", views), *FIELDS] == SCHEMAS["views"].names


def table_rows(text: str, header: str) -> list[str]:
    """The rows of the Markdown table under a header line."""
    return text.partition(f"{header}\n")[2].partition("\n\n")[0].splitlines()[1:]


def test_others_open_them(run, tmp_path):
    done = export(run, tmp_path)
    lowest = polars.scan_parquet(done.pairs).filter("chosen").select(polars.col("iou").mean()).collect().item()
    question = f"SELECT avg(p.iou) FROM '{done.pairs}' p JOIN '{done.views}' v USING (step, position) WHERE p.chosen AND view = 0"  # noqa: E501
    assert duckdb.sql(question).fetchall()[0][0] == pytest.approx(lowest)


def test_filters(run, tmp_path):
    done = export(run, tmp_path, steps="2:5", source="synthetic")
    views = pandas.read_parquet(done.views)
    np.testing.assert_array_equal(views["position"].unique(), np.arange(81, 200, 2))
    assert export(run, tmp_path, steps="7:").view_rows == 2 * 40 * 4
    assert export(run, tmp_path, steps=":1").pair_rows == 40 * 6


def test_csv_and_unknown_labels(tmp_path):
    write_log(tmp_path / "log.zarr", steps=2, batch=8, labelled=False)
    done = export(tmp_path, format="csv")
    assert done.views == tmp_path / "export" / "views.csv"
    views = pandas.read_csv(done.views)
    assert views["label"].isna().all() and list(views) == SCHEMAS["views"].names
    assert set(views["source"]) == {"real", "synthetic"}


def test_a_failed_export_leaves_the_old_tables(run, tmp_path, monkeypatch):
    done = export(run, tmp_path)
    before = done.pairs.read_bytes()
    monkeypatch.setattr("jobs.export.pair_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, tmp_path, steps=":1")
    assert done.pairs.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.parquet", "views.parquet"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_line_that_names_the_place(run, tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, "as the kernel says it")  # without a name, as for a descriptor

    monkeypatch.setattr("os.fsync", refuse)
    assert cli.run(["export", str(run), "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"hardviews: {tmp_path}/") and cli.DISK[code] in line and os.strerror(code) in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": "5:5"}, "5:5 is no range; give FIRST"),
        ({"steps": "a:b"}, "a:b is no range"),
        ({"steps": "7"}, "7 is no range"),
        ({"steps": "40:50"}, "40:50 holds no rows.*steps 0 to 8"),
        ({"source": "sythetic"}, "sythetic is not in the log; it has real, synthetic"),
    ],
)
def test_bad_flags(run, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        export(run, tmp_path, **flags)


def test_command(run, tmp_path, capsys):
    main([str(run), "--out", str(tmp_path), "--steps", "0:1"])
    printed = capsys.readouterr().out
    assert "views.parquet" in printed and "240" in printed
    with pytest.raises(InputError, match="no augmentation log"):
        main([str(tmp_path / "nowhere")])
