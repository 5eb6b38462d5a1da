"""The two tables of an exported log as Arrow record batches: a row per view, a row per candidate pair.

Their columns are described in the fields' metadata, and so in the Parquet files themselves. Shape suffixes: B log
rows, N views, P candidate pairs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.analysis.pairs import METRICS, pair_metrics, scored_params
from jobs.log.reader import Rows
from pipelines.params import FIELDS, pairs

SOURCE = pa.dictionary(pa.int8(), pa.string())
KEYS: dict[str, tuple[pa.DataType, str]] = {
    "step": (pa.int64(), "training step, from 0"),
    "position": (pa.int64(), "global index of the image in the training sequence; with `step` the key of an image"),
    "sample": (pa.int64(), "the image's row in the data sets, one after the other"),
    "source": (SOURCE, "tag of the image's data set"),
}
VIEWS: dict[str, tuple[pa.DataType, str]] = {
    **KEYS,
    "epoch": (pa.int32(), "how often the image's source had been gone through before"),
    "label": (pa.int32(), "class index, null where unknown"),
    "image_height": (pa.int32(), "source pixels"),
    "image_width": (pa.int32(), "source pixels"),
    "view": (pa.int16(), "number of the view, from 0"),
    "chosen": (pa.bool_(), "whether the view trained"),
    "top": (pa.int32(), "crop box's first row, source pixels"),
    "left": (pa.int32(), "crop box's first column, source pixels"),
    "height": (pa.int32(), "crop box's height, source pixels"),
    "width": (pa.int32(), "crop box's width, source pixels"),
    "flip": (pa.bool_(), "mirrored left to right"),
    "jitter": (pa.bool_(), "whether colour jitter was applied; where not, the next five are 1, 1, 1, 0 and 0"),
    "brightness": (pa.float32(), "factor"),
    "contrast": (pa.float32(), "factor"),
    "saturation": (pa.float32(), "factor"),
    "hue": (pa.float32(), "shift in turns of the colour circle, -0.5 to 0.5"),
    "order": (pa.uint8(), "index into the 24 orders of (brightness, contrast, saturation, hue)"),
    "gray": (pa.bool_(), "turned to grayscale"),
    "blur": (pa.float32(), "Gaussian blur's sigma, pixels of the view; 0 for none"),
    "solarize": (pa.bool_(), "values of 128 and more (of 255) inverted"),
}
PAIRS: dict[str, tuple[pa.DataType, str]] = {
    **KEYS,
    "pair": (pa.int16(), "number of the pair, lexicographic in (first, second)"),
    "first": (pa.int16(), "its first view"),
    "second": (pa.int16(), "its second view"),
    "loss": (pa.float32(), "the pair's loss at selection, null for images that were not scored"),
    "chosen": (pa.bool_(), "whether the pair was chosen to train"),
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
    columns = _keys(rows, sources, views) | {
        "epoch": _array(np.repeat(rows.epochs_B, views)),
        "label": _array(labels := np.repeat(rows.labels_B, views), missing=labels < 0),
        "image_height": _array(np.repeat(rows.sizes_B2[:, 0], views)),
        "image_width": _array(np.repeat(rows.sizes_B2[:, 1], views)),
        "view": _array(np.tile(np.arange(views, dtype=np.int16), len(rows))),
        "chosen": _array(rows.chosen_BN.ravel()),
        **{name: _array(getattr(rows.params, name).ravel()) for name in FIELDS},
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMAS["views"].names], schema=SCHEMAS["views"])


def pair_batch(rows: Rows, sources: Sequence[str]) -> pa.RecordBatch:
    """[B·P] rows of the table of pairs."""
    params = scored_params(rows)
    first_P, second_P = pairs(params.shape[1]).T.astype(np.int16)
    number_P = np.arange(len(first_P), dtype=np.int16)
    losses = rows.losses_BP.ravel()
    arrays = [
        *_keys(rows, sources, len(number_P)).values(),
        *(_array(np.tile(column_P, len(rows))) for column_P in (number_P, first_P, second_P)),
        _array(losses, missing=np.isnan(losses)),
        _array((rows.choice_B[:, None] == number_P).ravel()),
        *(_array(metric_BP.ravel()) for metric_BP in pair_metrics(params, rows.sizes_B2).values()),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMAS["pairs"])


def _keys(rows: Rows, sources: Sequence[str], times: int) -> dict[str, pa.Array]:
    """The key columns, each row `times` times over."""
    index = _array(np.repeat(rows.sources_B.astype(np.int8), times))
    return {
        "step": _array(np.repeat(rows.step_B, times)),
        "position": _array(np.repeat(rows.position_B, times)),
        "sample": _array(np.repeat(rows.ids_B, times)),
        "source": pa.DictionaryArray.from_arrays(index, pa.array(list(sources), pa.string())),
    }


def _array(values: NDArray[np.generic], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(values, mask=missing)
