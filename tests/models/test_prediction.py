"""A pair's loss predicted from its views' parameters: the regression is the formula's, and follows what changes."""

import numpy as np
import torch
from sklearn.linear_model import Ridge

from models.prediction import FORGET, RIDGE, Prediction

WIDTH = 5


def pairs_of(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [images, 6, 5] of very different sizes, the fourth without any spread, and losses [images, 6]."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(images, 6, WIDTH, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 0.0, 3.0])
    return columns + 7, torch.randn(images, 6, generator=generator) + columns[..., 0] - 50 * columns[..., 2]


def within(values: torch.Tensor) -> np.ndarray:
    """Without the mean of each image's pairs, float64, images and pairs in one row."""
    values = values.double()
    return (values - values.mean(1, keepdim=True)).flatten(0, 1).numpy()


def test_nothing_is_predicted_before_anything_was_learned():
    prediction = Prediction(WIDTH)
    prediction.update()
    assert not prediction(pairs_of(3, 0)[0]).any()


def test_it_is_ridge_regression_with_fading_steps():
    prediction = Prediction(WIDTH)
    steps = {0: [pairs_of(9, 0)], 1: [], 2: [pairs_of(9, 1), pairs_of(9, 2)]}  # scored, not scored, in two parts
    for parts in steps.values():
        for part in parts:
            prediction.learn(*part)
        prediction.update()
    rows = [(part, FORGET ** (2 - step)) for step, parts in steps.items() for part in parts]
    weight = np.concatenate([np.full(9 * 6, value) for _, value in rows])
    x = np.concatenate([within(columns) for (columns, _), _ in rows])
    y = np.concatenate([within(losses) for (_, losses), _ in rows])
    scale = np.sqrt((weight[:, None] * x**2).sum(0))
    scale[3] = 1.0
    # A ridge that is a share of each column's sum of squares is a plain one on columns of length 1.
    wanted = Ridge(alpha=RIDGE, fit_intercept=False).fit(x / scale, y, sample_weight=weight).coef_ / scale
    np.testing.assert_allclose(prediction.weight_X.numpy(), wanted, rtol=1e-6, atol=1e-9)
    columns = pairs_of(4, 30)[0]
    np.testing.assert_allclose(prediction(columns).numpy(), columns.double().numpy() @ wanted, rtol=1e-5)


def test_pairs_that_do_not_compete_teach_nothing():
    prediction, others = Prediction(WIDTH), Prediction(WIDTH)
    columns, losses = pairs_of(9, 0)
    barred = torch.tensor([False, True, False, False, True, False])
    prediction.learn(columns, losses, barred)
    others.learn(columns[:, ~barred], losses[:, ~barred])
    prediction.update(), others.update()
    assert torch.equal(prediction.weight_X, others.weight_X) and bool(prediction.weight_X.any())


def test_it_follows_what_changes_and_forgets_a_step_that_is_skipped():
    prediction, true = Prediction(WIDTH), torch.tensor([1.0, -0.02, 30.0, 0.0, 0.5])
    for step in range(160):
        if step == 30:
            true = -true
        columns = pairs_of(32, step)[0]
        prediction.learn(columns, columns @ true)
        prediction.update()
    columns = pairs_of(8, 999)[0]
    assert torch.equal(prediction(columns).argmax(1), (columns @ true).argmax(1))
    before = {name: value.clone() for name, value in prediction.state_dict().items()}
    prediction.learn(*pairs_of(32, 0))
    prediction.skip()
    prediction.update()
    assert torch.equal(prediction.weight_X, before["weight_X"])
    torch.testing.assert_close(prediction.gram_XX, before["gram_XX"] * FORGET)
