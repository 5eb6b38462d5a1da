"""What is measured of every candidate pair of views (HVP, section 6.1.1 and appendix E).

Shape suffixes: B log rows, N views, P candidate pairs.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from jobs.log.reader import Rows
from pipelines.params import JITTER_OPS, ViewParams, pair_colour_distance, pair_distance, pair_iou, pairs

METRICS: Mapping[str, str] = {
    "iou": "intersection over union of the two crop boxes in the source image, 0 to 1",
    "distance": "relative distance: of the two crops' centres, over the image's diagonal, 0 to 1",
    "colour_distance": "Euclidean distance of the four jitter strengths (brightness, contrast, saturation, hue)",
    "brightness": "absolute difference of the two brightness factors",
    "contrast": "absolute difference of the two contrast factors",
    "saturation": "absolute difference of the two saturation factors",
    "hue": "absolute difference of the two hue shifts, in turns of the colour circle",
}
"""Name → meaning, in the order of every table of metrics."""


def scored_params(rows: Rows) -> ViewParams:
    """The parameters of the leading views whose pairs compete (in multi-crop the global crops)."""
    views = next(n for n in range(2, rows.params.shape[1] + 1) if len(pairs(n)) == rows.loss_BP.shape[1])
    return rows.params[:, :views]


def pair_metrics(params: ViewParams, sizes_B2: NDArray[np.integer]) -> dict[str, NDArray[np.float32]]:
    """Every metric of METRICS, each [B, P]."""
    first_P, second_P = pairs(params.shape[1]).T
    differences = {name: np.abs(getattr(params, name)[:, first_P] - getattr(params, name)[:, second_P]) for name in JITTER_OPS}  # fmt: skip  # noqa: E501
    return {
        "iou": pair_iou(params),
        "distance": pair_distance(params, sizes_B2),
        "colour_distance": pair_colour_distance(params),
        **differences,
    }


def pair_zoom(params: ViewParams) -> NDArray[np.float32]:
    """[B, P]: |log2| of the ratio of the two crops' areas: 0 for the same size, 1 for twice the area."""
    first_P, second_P = pairs(params.shape[1]).T
    area_BN = np.log2(params.height.astype(np.float32) * params.width)
    return np.abs(area_BN[:, first_P] - area_BN[:, second_P])
