"""How far the chosen pair can be told from the views' parameters alone (HVP, appendix F.1.2).

Shape suffixes: B log rows, P candidate pairs, R = B·P, N views.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from jobs.analysis.pairs import pair_metrics, pair_zoom, scored_params
from jobs.log.reader import Rows
from pipelines.params import FIELDS, pairs

BOXES = ("top", "left", "height", "width")
TEST_SHARE = 0.25


@dataclass(frozen=True)
class Prediction:
    """Top-1 on images that the classifier had not seen: its likeliest pair is the chosen one."""

    top1: float
    low: float
    high: float
    chance: float
    lowest_iou_top1: float
    """Of the rule `the pair with the lowest IoU`, the first of several, on the same rows."""
    train_images: int
    test_images: int
    test_rows: int


def predict_choice(rows: Rows, seed: int = 0, iterations: int = 150) -> Prediction | None:
    """Fits gradient-boosted trees to `chosen or not` for every pair; None where fewer than 20 images can be split.

    Images, not rows, are split, so that an image that recurs over epochs is on one side only. low and high are a 95 %
    bootstrap interval over test images.
    """
    rng = np.random.default_rng(seed)
    images, image_B = np.unique(rows.sample_B, return_inverse=True)
    if len(images) < 20:
        return None
    is_test = np.zeros(len(images), bool)
    is_test[rng.permutation(len(images))[: round(len(images) * TEST_SHARE)]] = True
    test_B = is_test[image_B]
    count = rows.loss_BP.shape[1]
    features_RF = choice_features(rows)
    chosen_R = (rows.choice_B[:, None] == np.arange(count)).ravel()
    test_R = np.repeat(test_B, count)
    how: dict[str, Any] = {"max_iter": iterations, "early_stopping": False}
    model = HistGradientBoostingClassifier(random_state=seed, **how)
    with threadpool_limits(1):  # its threads wait by spinning: on a busy machine two took 15 times as long as one
        model.fit(features_RF[~test_R], chosen_R[~test_R])
        score_BP = model.predict_proba(features_RF[test_R])[:, 1].reshape(-1, count)
    choice_B = rows.choice_B[test_B]
    right_B = score_BP.argmax(1) == choice_B
    iou_BP = pair_metrics(scored_params(rows), rows.sizes_B2)["iou"][test_B]
    low, high = _interval(right_B, image_B[test_B], rng)
    return Prediction(
        top1=float(right_B.mean()),
        low=low,
        high=high,
        chance=1 / count,
        lowest_iou_top1=float((iou_BP.argmin(1) == choice_B).mean()),
        train_images=int((~is_test).sum()),
        test_images=int(is_test.sum()),
        test_rows=len(choice_B),
    )


def choice_features(rows: Rows) -> NDArray[np.float32]:
    """[R, features]: both views' parameters, boxes as shares of the image, and what is measured of the pair."""
    params = scored_params(rows)
    first_P, second_P = pairs(params.shape[1]).T
    edge = {"top": 0, "left": 1, "height": 0, "width": 1}
    columns = []
    for name in FIELDS:
        value_BN = getattr(params, name).astype(np.float32)
        if name in BOXES:
            value_BN = value_BN / rows.sizes_B2[:, edge[name], None]
        columns += [value_BN[:, first_P].ravel(), value_BN[:, second_P].ravel()]
    columns += [metric.ravel() for metric in pair_metrics(params, rows.sizes_B2).values()]
    columns.append(pair_zoom(params).ravel())
    return np.stack(columns, axis=1).astype(np.float32)


def _interval(right_B: NDArray[np.bool_], image_B: NDArray[np.int64], rng: np.random.Generator) -> tuple[float, float]:
    """2.5 % and 97.5 % of the mean over bootstrap samples of the images."""
    _, place_B = np.unique(image_B, return_inverse=True)
    hits, rows = np.bincount(place_B, weights=right_B), np.bincount(place_B)
    drawn = rng.integers(0, len(rows), (200, len(rows)))
    low, high = np.quantile(hits[drawn].sum(1) / rows[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)
