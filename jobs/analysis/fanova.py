"""Functional ANOVA of regression forests (Hutter, Hoos, Leyton-Brown: An efficient approach for assessing
hyperparameter importance, ICML 2014), without sampling.

A tree is a sum of boxes, one a leaf: value inside, zero outside. Under a product measure, a box's marginal over some
features is its value times its measure in the others, on its interval in these: a step function. So the variances of
the marginals, V_j of feature j alone and V_jk of the pair beyond both, are finite sums. A forest's mean is a sum of
boxes too.

The measure turns every feature into its share of mass below, u in [0, 1]: `uniform` over the feature's range, as in
the paper, or `empirical`, the marginal distributions of data.

Shape suffixes: L leaves, F features, G bins of u, M Monte Carlo points, R data rows, W subsets of the features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """Leaves in u: each `value` on the box from `start` to `end`; several trees' leaves may lie over one another."""

    start_LF: Floats
    end_LF: Floats
    value_L: Floats

    @property
    def width_LF(self) -> Floats:
        """The boxes' measure in each feature."""
        return self.end_LF - self.start_LF

    @property
    def mean(self) -> float:
        """Of the function, under the measure."""
        return float(self.width_LF.prod(1) @ self.value_L)


@dataclass(frozen=True)
class Measure:
    """A product measure on the features: `below(feature, x)` is the share of mass at or below x."""

    bounds_F2: Floats
    below: Callable[[int, Floats], Floats]
    draw: Callable[[np.random.Generator, int], Floats]
    """(generator, M) → points [M, F]."""


def uniform(x_RF: NDArray[Any]) -> Measure:
    """Uniform over each feature's range in the rows `x_RF`."""
    bounds_F2 = np.column_stack([x_RF.min(0), x_RF.max(0)]).astype(np.float64)
    low, span = bounds_F2[:, 0], np.maximum(np.ptp(bounds_F2, axis=1), 1e-30)
    return Measure(
        bounds_F2,
        lambda feature, x: np.clip((x - low[feature]) / span[feature], 0, 1),
        lambda rng, count: low + rng.random((count, len(low))) * span,
    )


def empirical(x_RF: NDArray[Any]) -> Measure:
    """Each feature as it is distributed in the rows `x_RF`, independent of the others."""
    sorted_FR = np.sort(x_RF, axis=0).T.copy()
    rows = sorted_FR.shape[1]
    # `x <= threshold` goes left, so equal values are below; float32, as the trees compare.
    return Measure(
        np.column_stack([x_RF.min(0), x_RF.max(0)]).astype(np.float64),
        lambda feature, x: np.searchsorted(sorted_FR[feature], x.astype(np.float32), side="right") / rows,
        lambda rng, count: np.stack([column[rng.integers(0, rows, count)] for column in sorted_FR], axis=1),
    )


def boxes(tree: Any, measure: Measure) -> Boxes:
    """The leaves of a fitted scikit-learn tree (`estimator.tree_`), found a level at a time."""
    features = len(measure.bounds_F2)
    start, end = np.zeros((tree.node_count, features)), np.ones((tree.node_count, features))
    inner = tree.children_left >= 0
    below = np.empty(tree.node_count)
    for feature in range(features):
        nodes = np.flatnonzero(inner & (tree.feature == feature))
        below[nodes] = measure.below(feature, tree.threshold[nodes])
    level = np.array([0])
    while len(level := level[inner[level]]):
        left, right, feature = tree.children_left[level], tree.children_right[level], tree.feature[level]
        for child in (left, right):
            start[child], end[child] = start[level], end[level]
        end[left, feature] = np.minimum(end[left, feature], below[level])
        start[right, feature] = np.maximum(start[right, feature], below[level])
        level = np.concatenate([left, right])
    return Boxes(start[~inner], end[~inner], tree.value[~inner, 0, 0].astype(np.float64))


def forest_boxes(trees: Sequence[Boxes]) -> Boxes:
    """The mean of trees as one sum of boxes."""
    return Boxes(
        np.concatenate([tree.start_LF for tree in trees]),
        np.concatenate([tree.end_LF for tree in trees]),
        np.concatenate([tree.value_L for tree in trees]) / len(trees),
    )


def tree_variance(tree: Boxes) -> float:
    """Variance of one tree's function: its boxes do not overlap."""
    volume_L = tree.width_LF.prod(1)
    return float(volume_L @ (tree.value_L - volume_L @ tree.value_L) ** 2)


def first_order(function: Boxes) -> Floats:
    """V_j, [F]: the variance of each feature's marginal, exactly."""
    width_LF = function.width_LF
    volume_L = width_LF.prod(1)
    mean = volume_L @ function.value_L
    variances = np.empty(width_LF.shape[1])
    for j, width_L in enumerate(width_LF.T):
        # A leaf adds value × measure elsewhere where its interval starts, and takes it away where that ends.
        mass_L = function.value_L * np.divide(volume_L, width_L, out=np.zeros_like(volume_L), where=width_L > 0)
        edges, place = np.unique(np.concatenate([function.start_LF[:, j], function.end_LF[:, j]]), return_inverse=True)
        steps = np.bincount(place, weights=np.concatenate([mass_L, -mass_L]), minlength=len(edges))
        variances[j] = np.diff(edges) @ (np.cumsum(steps)[:-1] - mean) ** 2
    return variances


def marginal(function: Boxes, feature: int, bins: int) -> Floats:
    """[G]: the mean of the function in each of `bins` equal bins of one feature's u."""
    width_L = function.width_LF[:, feature]
    volume_L = function.width_LF.prod(1)
    mass_L = function.value_L * np.divide(volume_L, width_L, out=np.zeros_like(volume_L), where=width_L > 0)
    return mass_L @ _cover(function, feature, bins)


def second_order(trees: Sequence[Boxes], bins: int = 128) -> dict[tuple[int, int], float]:
    """V_jk of every pair of features: what the mean of the trees varies with both, beyond each alone.

    Marginals are averaged over `bins` equal bins of u in each feature; what varies inside a bin is lost, so the
    values are exact where every threshold lies on a bin's edge, and else a little low.
    """
    features = trees[0].start_LF.shape[1]
    tables = {pair: np.zeros((bins, bins)) for pair in combinations(range(features), 2)}
    for tree in trees:
        covers = [_cover(tree, feature, bins) for feature in range(features)]
        width_LF = tree.width_LF
        volume_L = width_LF.prod(1)
        for j, k in tables:
            own_L = width_LF[:, j] * width_LF[:, k]
            mass_L = tree.value_L * np.divide(volume_L, own_L, out=np.zeros_like(volume_L), where=own_L > 0)
            tables[j, k] += (covers[j] * mass_L[:, None].astype(np.float32)).T @ covers[k] / len(trees)
    return {pair: _interaction(table_GG) for pair, table_GG in tables.items()}


def joint_term(
    predict: Callable[[NDArray[np.float32]], Floats], measure: Measure, points: int, rng: np.random.Generator
) -> tuple[float, float]:
    """(V of the term of all features together, its standard error), by Monte Carlo.

    V = E[(Σ_W (−1)^|F∖W| f(x_W, z_∖W))²] / 2^F over all subsets W, for independent points x and z (Liu and Owen:
    Estimating mean dimensionality of analysis of variance decompositions, JASA 2006): never negative, and exact but
    for the number of points.
    """
    x_MF, z_MF = (measure.draw(rng, points).astype(np.float32) for _ in range(2))
    features = x_MF.shape[1]
    from_x_WF = ((np.arange(2**features)[:, None] >> np.arange(features)) & 1).astype(bool)
    sign_W = (-1.0) ** (features - from_x_WF.sum(1))
    mixed_WMF = np.where(from_x_WF[:, None, :], x_MF, z_MF)
    contrast_M = sign_W @ predict(mixed_WMF.reshape(-1, features)).reshape(len(sign_W), points)
    square_M = contrast_M**2 / 2**features
    return float(square_M.mean()), float(square_M.std(ddof=1) / np.sqrt(points))


def _cover(function: Boxes, feature: int, bins: int) -> NDArray[np.float32]:
    """[L, G]: the share of each bin that the leaf's interval covers."""
    left_G = np.arange(bins) / bins
    end_LG = np.clip((function.end_LF[:, feature, None] - left_G) * bins, 0, 1)
    return (end_LG - np.clip((function.start_LF[:, feature, None] - left_G) * bins, 0, 1)).astype(np.float32)


def _interaction(table_GG: Floats) -> float:
    """Variance of a table on equal cells beyond its row and column means."""
    rest = table_GG - table_GG.mean(0, keepdims=True) - table_GG.mean(1, keepdims=True) + table_GG.mean()
    return float((rest**2).mean())
