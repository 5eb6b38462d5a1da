"""Known functions and other libraries as oracles: Ishigami (SALib), optuna's fANOVA on the same forest, brute force."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

from jobs.analysis import fanova


def ishigami(x):
    return np.sin(x[:, 0]) + 7 * np.sin(x[:, 1]) ** 2 + 0.1 * x[:, 2] ** 4 * np.sin(x[:, 0])


def trees_of(forest, measure):
    return [fanova.boxes(tree.tree_, measure) for tree in forest.estimators_]


@pytest.fixture(scope="module")
def ishigami_forest():
    x = np.random.default_rng(0).uniform(-np.pi, np.pi, (20_000, 3)).astype(np.float32)
    forest = RandomForestRegressor(4, n_jobs=2, random_state=0)
    return x, ishigami(x), forest.fit(x, ishigami(x))


@pytest.mark.parametrize("measure", [fanova.uniform, fanova.empirical])
def test_ishigami(ishigami_forest, measure):
    x, y, forest = ishigami_forest
    trees = trees_of(forest, measure(x))
    whole = fanova.forest_boxes(trees)
    assert whole.mean == pytest.approx(y.mean(), abs=0.05)
    assert fanova.first_order(whole) / y.var() == pytest.approx([0.314, 0.442, 0.0], abs=0.02)
    pairs = fanova.second_order(trees, bins=64)
    assert [pairs[pair] / y.var() for pair in ((0, 2), (0, 1), (1, 2))] == pytest.approx([0.244, 0, 0], abs=0.02)
    curve = fanova.marginal(whole, 1, 64)
    np.testing.assert_allclose(curve, 7 * np.sin((np.arange(64) + 0.5) / 64 * 2 * np.pi - np.pi) ** 2, atol=0.5)


def test_ishigami_agrees_with_sobol_indices_of_the_same_forest(ishigami_forest):
    from SALib.analyze import sobol
    from SALib.sample import sobol as sample

    x, _, forest = ishigami_forest
    problem = {"num_vars": 3, "names": ["a", "b", "c"], "bounds": np.column_stack([x.min(0), x.max(0)]).tolist()}
    found = sobol.analyze(problem, forest.predict(sample.sample(problem, 1024, seed=0)), seed=0)
    trees = trees_of(forest, fanova.uniform(x))
    total = fanova.first_order(fanova.forest_boxes(trees))
    pairs = fanova.second_order(trees, bins=64)
    np.testing.assert_allclose(total / total.sum(), found["S1"] / found["S1"].sum(), atol=0.02)
    assert pairs[0, 2] / total[0] == pytest.approx(found["S2"][0, 2] / found["S1"][0], abs=0.05)


def test_equals_optuna_on_the_same_tree(ishigami_forest):
    from optuna.importance._fanova._tree import _FanovaTree

    x, y, _ = ishigami_forest
    tree = RandomForestRegressor(1, max_leaf_nodes=150, random_state=0).fit(x, y).estimators_[0].tree_
    measure = fanova.uniform(x)
    theirs, ours = _FanovaTree(tree, measure.bounds_F2), fanova.boxes(tree, measure)
    assert fanova.tree_variance(ours) == pytest.approx(theirs.variance, rel=1e-9)
    expected = [theirs.get_marginal_variance(np.array([feature])) for feature in range(3)]
    np.testing.assert_allclose(fanova.first_order(ours), expected, rtol=1e-9, atol=1e-12)


def test_equals_brute_force_on_a_grid():
    """A small tree whose thresholds lie on a grid: means over the grid are exact."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 8, (3_000, 3)).astype(np.float32)
    y = x[:, 0] * x[:, 1] + rng.normal(size=3_000) + 3 * (x[:, 2] > 4)
    forest = RandomForestRegressor(3, max_leaf_nodes=60, random_state=0).fit(x, y)
    grid = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    values = forest.predict(grid).reshape(8, 8, 8)
    # Every value equally often in the data: the empirical measure is the grid's.
    measure = fanova.empirical(grid)
    trees = trees_of(forest, measure)
    centred = values - values.mean()
    alone = [centred.mean(tuple({0, 1, 2} - {j})) for j in range(3)]
    np.testing.assert_allclose(fanova.first_order(fanova.forest_boxes(trees)), [(m**2).mean() for m in alone])
    pairs = fanova.second_order(trees, bins=8)
    rest = (centred**2).mean() - sum((m**2).mean() for m in alone)
    for j, k in combinations(range(3), 2):
        both = centred.mean(({0, 1, 2} - {j, k}).pop())
        expected = (both**2).mean() - (alone[j] ** 2).mean() - (alone[k] ** 2).mean()
        assert pairs[j, k] == pytest.approx(expected, rel=1e-4)
        rest -= expected
    assert sum(fanova.tree_variance(tree) for tree in trees) / 3 >= (centred**2).mean()
    share, error = fanova.joint_term(forest.predict, measure, 20_000, rng)
    assert share == pytest.approx(rest, abs=4 * error) and error < 0.05 * rest


def test_noisy_linear_function():
    rng = np.random.default_rng(2)
    x = rng.random((20_000, 3)).astype(np.float32)
    y = 2 * x[:, 0] + x[:, 1] + rng.normal(0, 1, 20_000)
    forest = RandomForestRegressor(16, min_samples_leaf=50, n_jobs=2, random_state=0).fit(x, y)
    shares = fanova.first_order(fanova.forest_boxes(trees_of(forest, fanova.empirical(x)))) / y.var()
    signal = np.array([4, 1, 0]) / 12
    np.testing.assert_allclose(shares, signal / (signal.sum() + 1), atol=0.015)
