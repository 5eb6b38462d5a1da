"""InfoNCE and its table over pairs against naive loops."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from jobs.benches.obvious import naive_info_nce
from models.contrast import info_nce, queue_pair_losses
from models.negatives import NegativesConfig
from models.selection import pairs

from .toys import SIX, unit_rows


@pytest.mark.parametrize("synthetic", [None, SIX, NegativesConfig(8, 0, 0, 7, 0, 0, 0)])
def test_loss_and_gradient_equal_the_naive_ones(synthetic):
    k, queue, x = unit_rows(6, 12), unit_rows(20, 12), torch.randn(6, 12)
    found = []
    for function in (lambda *a: info_nce(*a)[0], naive_info_nce):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        loss = function(F.normalize(leaf, dim=1), k, queue, 0.2, synthetic)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_temperature_is_not_multiplied_back_in():
    """MoBY's loss has no factor 2τ: with one negative as similar as the positive it is log 2 at any temperature."""
    q = unit_rows(3, 4)
    for temperature in (0.07, 0.2, 1.0):
        loss, _ = info_nce(q, q, q[:1].expand(1, -1), temperature)
        first = torch.logaddexp(torch.zeros(()), ((q @ q[0]) - 1) / temperature).mean()
        torch.testing.assert_close(loss, first)


def test_proxy_accuracy_counts_keys_above_all_negatives():
    q = torch.eye(4)[:2]
    k = torch.tensor([[1.0, 0, 0, 0], [0, 0.6, 0.8, 0]])
    negatives = torch.tensor([[0.0, 0.8, 0.6, 0], [0, 0, 0, 1]])
    assert info_nce(q, k, negatives, 0.2)[1]["proxy"] == 0.5


@pytest.mark.parametrize("views", [2, 3, 4, 7])
def test_pair_table_equals_a_loop_over_pairs(views):
    q, k = unit_rows(views, 5, 8), unit_rows(views, 5, 8)
    first, second = unit_rows(30, 8), unit_rows(17, 8)
    table = queue_pair_losses(q, k, first, second, 0.2)
    assert pairs(views) == tuple(combinations(range(views), 2))
    for number, (a, b) in enumerate(combinations(range(views), 2)):
        for image in range(5):
            one = info_nce(q[a, image, None], k[b, image, None], second, 0.2)[0]
            other = info_nce(q[b, image, None], k[a, image, None], first, 0.2)[0]
            torch.testing.assert_close(table[image, number], one + other)


def test_contrast_stays_in_fp32_inside_autocast():
    q, k, queue = unit_rows(4, 64), unit_rows(4, 64), unit_rows(50, 64)
    outside = (
        info_nce(q, k, queue, 0.07)[0],
        queue_pair_losses(torch.stack([q, k]), torch.stack([k, q]), queue, queue, 0.07),
    )
    with torch.autocast("cpu", torch.bfloat16):
        inside = (
            info_nce(q, k, queue, 0.07)[0],
            queue_pair_losses(torch.stack([q, k]), torch.stack([k, q]), queue, queue, 0.07),
        )
    assert torch.equal(outside[0], inside[0]) and torch.equal(outside[1], inside[1])
