"""The two tables of an exported log as Arrow record batches: a row per view, a row per candidate pair.

Their columns are described in the fields' metadata, and so in the Parquet files themselves. Shape suffixes: B log
rows, N views, P candidate pairs.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.analysis.pairs import METRICS, pair_metrics, scored_params
from jobs.log.format import COLUMNS
from jobs.log.reader import Rows
from pipelines.params import FIELDS, pairs

KEYS = ("step", "position", "sample", "source")
SOURCE = pa.dictionary(pa.int8(), pa.string())


def _logged(name: str) -> tuple[pa.DataType, str]:
    """Type and description of a column that is exported as it was logged; sources become their tags."""
    column = COLUMNS[name]
    kind = SOURCE if name == "source" else pa.from_numpy_dtype(column.dtype)
    return kind, f"{column.meaning} ({column.unit})" if column.unit else column.meaning


# The row columns that follow the keys. A pair's `chosen` says what `choice` does.
IMAGE = [name for name, column in COLUMNS.items() if column.axis == "row" and name not in (*KEYS, "choice")]
VIEWS: dict[str, tuple[pa.DataType, str]] = {
    **{name: _logged(name) for name in (*KEYS, *IMAGE)},
    "view": (pa.int16(), "number of the view, from 0"),
    "chosen": _logged("chosen"),
    **{name: _logged(name) for name in FIELDS},
}
PAIRS: dict[str, tuple[pa.DataType, str]] = {
    **{name: _logged(name) for name in KEYS},
    "pair": (pa.int16(), "number of the pair, lexicographic in (first, second)"),
    "first": (pa.int16(), "its first view"),
    "second": (pa.int16(), "its second view"),
    "loss": _logged("loss"),
    "chosen": (pa.bool_(), "the pair trained"),
    "at_random": _logged("at_random"),
    **{
        name if name in ("iou", "distance", "colour_distance") else f"{name}_difference": (pa.float32(), meaning)
        for name, meaning in METRICS.items()
    },
}


def _schema(columns: Mapping[str, tuple[pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"description": text}) for name, (kind, text) in columns.items()])


SCHEMAS = {"views": _schema(VIEWS), "pairs": _schema(PAIRS)}


def view_batch(rows: Rows, sources: Sequence[str]) -> pa.RecordBatch:
    """[B·N] rows of the table of views."""
    views = rows.params.shape[1]
    columns = _of_images(rows, sources, VIEWS, views) | {
        "view": _array(np.tile(np.arange(views, dtype=np.int16), len(rows))),
        "chosen": _array(rows.chosen_BN.ravel()),
        **{name: _array(getattr(rows.params, name).ravel()) for name in FIELDS},
    }
    return _batch("views", columns)


def pair_batch(rows: Rows, sources: Sequence[str]) -> pa.RecordBatch:
    """[B·P] rows of the table of pairs."""
    params = scored_params(rows)
    first_P, second_P = pairs(params.shape[1]).T.astype(np.int16)
    number_P = np.arange(len(first_P), dtype=np.int16)
    losses = rows.loss_BP.ravel()
    metrics = pair_metrics(params, rows.sizes_B2).values()
    columns = _of_images(rows, sources, PAIRS, len(number_P)) | {
        **{
            name: _array(np.tile(column_P, len(rows)))
            for name, column_P in zip(("pair", "first", "second"), (number_P, first_P, second_P), strict=True)
        },
        "loss": _array(losses, missing=np.isnan(losses)),
        "chosen": _array((rows.choice_B[:, None] == number_P).ravel()),
        **{
            name: _array(metric_BP.ravel())
            for name, metric_BP in zip(list(PAIRS)[-len(METRICS) :], metrics, strict=True)
        },
    }
    return _batch("pairs", columns)


def _batch(table: str, columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    schema = SCHEMAS[table]
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _of_images(rows: Rows, sources: Sequence[str], table: Iterable[str], times: int) -> dict[str, pa.Array]:
    """The table's columns that have a value per image, each value `times` times over."""
    logged = rows.columns()
    arrays: dict[str, pa.Array] = {}
    for name in table:
        if name in COLUMNS and COLUMNS[name].axis == "row":
            values = np.repeat(logged[name], times)
            arrays[name] = _array(values, missing=values < 0 if name == "label" else None)
    tags = pa.array(list(sources), pa.string())
    arrays["source"] = pa.DictionaryArray.from_arrays(arrays["source"].cast(pa.int8()), tags)
    return arrays


def _array(values: NDArray[np.generic], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(values, mask=missing)
