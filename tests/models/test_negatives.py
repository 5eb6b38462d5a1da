"""Synthetic negatives in closed form against building every vector, and their draws and schedule."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.benches.obvious import naive_similarities, naive_vectors
from models.contrast import Contrast, contrastive_loss, info_nce
from models.negatives import BLOCK_ELEMENTS, KINDS, NONE, Draws, NegativesConfig, draw, synthetic_similarities

SHAPES = [(1, 3, 2, 2), (4, 9, 5, 3), (7, 40, 16, 8), (16, 128, 33, 128)]


def setting(shape, counts=(3, 4, 5, 2, 6, 1), dtype=torch.float32, **changes):
    batch, negatives, width, hardest = shape
    config = NegativesConfig(hardest, *counts, **changes)
    x = torch.randn(batch, width, dtype=dtype)
    queue = F.normalize(torch.randn(negatives, width, dtype=dtype), dim=1)
    drawn = draw(config, F.normalize(x, dim=1) @ queue.T, width)
    casted = {f.name: getattr(drawn, f.name) for f in fields(Draws)}
    return config, x, queue, Draws(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in casted.items()})


def both(config, x, queue, drawn):
    """(logits, gradient of a weighted sum of them) of the closed form and of the naive construction."""
    weights = torch.randn(len(x), config.total, dtype=x.dtype)
    found = []
    for closed in (True, False):
        leaf = x.clone().requires_grad_()
        q = F.normalize(leaf, dim=1)
        if closed:
            logits = synthetic_similarities(config, q, queue, q @ queue.T, drawn)
        else:
            logits = naive_similarities(config, q, queue, drawn)
        (logits * weights).sum().backward()
        found += [logits.detach(), leaf.grad]
    return found


@pytest.mark.parametrize("gradient", ["dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_every_vector_built(shape, gradient):
    logits, slope, wanted, wanted_slope = both(*setting(shape, gradient=gradient, delta=0.3, eta=0.2))
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["dot", "cosine"])
def test_in_float64_they_differ_by_rounding_alone(gradient):
    logits, slope, wanted, wanted_slope = both(*setting(SHAPES[2], dtype=torch.float64, gradient=gradient))
    torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", range(6))
def test_each_kind_alone(number):
    counts = [4 if kind == number else 0 for kind in range(6)]
    logits, slope, wanted, wanted_slope = both(*setting(SHAPES[1], counts))
    assert logits.shape == (4, 4)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-4, atol=1e-5)


def test_bf16_within_its_rounding():
    config, x, queue, drawn = setting((16, 128, 64, 32))
    _, _, wanted, _ = both(config, x, queue, drawn)
    q, n = F.normalize(x, dim=1).bfloat16(), queue.bfloat16()
    logits = synthetic_similarities(config, q, n, q @ n.T, drawn)
    assert (logits.float() - wanted).abs().max() < 8 * 2**-8  # a few roundings of values up to 1


def test_blocks_do_not_change_anything(monkeypatch):
    setup = setting(SHAPES[3], gradient="cosine")
    torch.manual_seed(1)
    whole = both(*setup)
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 100)
    torch.manual_seed(1)
    for one, other in zip(whole, both(*setup), strict=True):
        torch.testing.assert_close(one, other)


def test_every_kind_has_its_own_count():
    counts = dict(zip(KINDS, (1, 2, 3, 4, 5, 6), strict=True))
    config, x, queue, drawn = setting(SHAPES[2], tuple(counts.values()))
    assert config.counts == counts
    vectors = naive_vectors(config, F.normalize(x, dim=1), queue, drawn)
    assert [v.shape[1] for v in vectors] == list(counts.values())
    # Kinds 5 and 6 are told apart by what they are: n + δq is nearer to q than n + η·sign(q) is, for a small η.
    logits = synthetic_similarities(config, *_similar(x, queue), drawn)
    assert logits.shape[1] == 21
    torch.testing.assert_close(logits[:, 10:15], torch.einsum("bd,bld->bl", F.normalize(x, dim=1), vectors[4]))
    torch.testing.assert_close(logits[:, 15:], torch.einsum("bd,bld->bl", F.normalize(x, dim=1), vectors[5]))


def _similar(x, queue):
    q = F.normalize(x, dim=1)
    return q, queue, q @ queue.T


@pytest.mark.parametrize(("share", "total"), [(0.25, 1365), (0.5, 4096), (0.158, 769)])
def test_a_share_sets_the_counts_in_their_proportions(share, total):
    given = NegativesConfig(256, 2, 1, 1, 0, 1, 1, share=share)
    made = given.beside(4096)
    assert made.total == total and made.total / (made.total + 4096) == pytest.approx(share, abs=1e-4)
    for kind, count in made.counts.items():
        assert abs(count - total * given.counts[kind] / 6) <= 1
    assert made.beside(100) == made and NegativesConfig().beside(7) == NegativesConfig()


def test_a_loss_has_as_many_synthetic_negatives_as_the_share_says():
    q, k, negatives = (F.normalize(torch.randn(rows, 8), dim=1) for rows in (4, 4, 30))
    task = Contrast(q, k, negatives, 0.2, NegativesConfig(10, 1, 1, 1, 1, 1, 1, share=0.5))
    torch.manual_seed(0)
    loss, _ = contrastive_loss([task])
    torch.manual_seed(0)
    torch.testing.assert_close(loss, info_nce(q, k, negatives, 0.2, NegativesConfig(10, 5, 5, 5, 5, 5, 5))[0])


def test_only_the_hardest_are_drawn_and_all_of_them():
    similarity = torch.randn(6, 50)
    drawn = draw(NegativesConfig(7, *(100,) * 6), similarity, 4)
    hardest = similarity.topk(7).indices
    for row in range(6):
        assert set(drawn.index_BL[row].tolist()) == set(hardest[row].tolist())


def test_coefficients_lie_where_the_formulas_put_them():
    drawn = draw(NegativesConfig(2, *(4000,) * 6), torch.randn(2, 4), 8)
    for values, low, high in ((drawn.alpha_BL, 0, 0.5), (drawn.beta_BL, 1, 1.5), (drawn.gamma_BL, 0, 1)):
        assert values.min() >= low and values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02)
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)


def test_noise_has_the_distribution_of_the_formula():
    drawn = draw(NegativesConfig(1, 0, 0, 0, 20_000, 0, 0, sigma=0.3), torch.zeros(1, 1), 3)
    assert drawn.noise_LD.mean(0).abs().max() < 0.01
    torch.testing.assert_close(drawn.noise_LD.T.cov(), 0.09 * torch.eye(3), atol=0.003, rtol=0)


def test_no_vector_is_kept_for_the_backward_pass():
    """Memory is linear in batch × count: nothing saved is as large as batch × count × width."""
    config, x, queue, drawn = setting((8, 64, 128, 16), (64,) * 6, gradient="cosine")
    q = F.normalize(x.requires_grad_(), dim=1)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        synthetic_similarities(config, q, queue, q @ queue.T, drawn)
    assert max(sizes) <= max(8 * 64 * 7, 64 * 128)


class Operations(TorchDispatchMode):
    """Counts tensor operations inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", ["dot", "cosine"])
def test_few_or_many_negatives_take_the_same_number_of_operations(gradient):
    """SynCo makes kinds 5 and 6 one by one, by a Python loop of autograd calls."""
    found = []
    for batch, count in ((2, 2), (6, 8)):
        config, x, queue, drawn = setting((batch, 40, 16, 8), (count,) * 6, gradient=gradient)
        q = F.normalize(x.requires_grad_(), dim=1)
        with Operations() as operations:
            synthetic_similarities(config, q, queue, q @ queue.T, drawn).sum().backward()
        found.append(operations.count)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_negative_counts_are_refused(kind):
    with pytest.raises(ValueError, match=rf"negatives\.{kind}: -1 must be 0 or above"):
        NegativesConfig(**{kind: -1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardest": 0}, "negatives.hardest: 0 must be at least 1"),
        ({"alpha_max": 1.5}, "negatives.alpha_max: 1.5 must lie between 0 and 1"),
        ({"share": 1.0}, "negatives.share: 1.0 must lie between 0 and 1, with counts above 0"),
        ({"beta_max": 0.5}, "negatives.beta_max: 0.5 must be at least 1"),
        ({"sigma": -0.1}, "negatives.sigma: -0.1 must be 0 or above"),
        ({"gradient": "euclid"}, "negatives.gradient: 'euclid' is unknown; take dot or cosine"),
        ({"start_epoch": 5, "stop_epoch": 5}, "negatives.stop_epoch: 5 must be above start_epoch 5"),
        ({"of_epochs": 0}, "negatives.of_epochs: 0 must be above 0"),
    ],
)
def test_bad_values_say_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        NegativesConfig(**changes)


def test_more_hardest_than_negatives_is_refused():
    with pytest.raises(ValueError, match=r"negatives.hardest: 9 is more than the 8 negatives there are; lower it"):
        draw(NegativesConfig(9), torch.randn(2, 8), 4)


def test_schedule_starts_stops_and_leaves_out_the_last_epochs():
    config = NegativesConfig(start_epoch=30, last_epochs_without=100)
    assert [config.active(epoch, 300) for epoch in (0, 29.99, 30, 199.9, 200, 299)] == [0, 0, 1, 1, 0, 0]
    assert [replace(config, stop_epoch=50).active(epoch, 300) for epoch in (49.9, 50)] == [1, 0]
    # A run of 30 epochs keeps the proportions, unless they are absolute; a longer one has the same epochs.
    assert [config.active(epoch, 30) for epoch in (2.9, 3, 19.9, 20)] == [0, 1, 1, 0]
    absolute = replace(config, of_epochs=None, last_epochs_without=5)
    assert [absolute.active(epoch, 40) for epoch in (3, 29.9, 30, 34.9, 35)] == [0, 0, 1, 1, 0]
    assert [config.active(epoch, 600) for epoch in (29, 30, 499, 500)] == [0, 1, 1, 0]
    assert not NONE.active(100, 300)


def test_barred_negatives_are_neither_contrasted_nor_mined():
    """The oracle: with all but one class barred, logits and gradients are those of the other negatives alone."""
    config = NegativesConfig(4, 0, 0, 6, 0, 0, 0)
    q, k, negatives = (F.normalize(torch.randn(n, 8), dim=1) for n in (5, 5, 12))
    barred = torch.zeros(5, 12, dtype=torch.bool)
    barred[:, 4:] = True  # four are left, which are then the four hardest
    torch.manual_seed(3)
    loss, metrics = info_nce(q, k, negatives, 0.2, config, barred)
    similarity = q @ negatives.T
    torch.manual_seed(3)
    drawn = draw(config, similarity, 8, barred)
    assert drawn.index_BL.max() < 4 and drawn.partner_BL.max() < 4
    synthetic = naive_similarities(config, q, negatives, drawn)
    logits = torch.cat([(q * k).sum(1, keepdim=True), similarity[:, :4], synthetic], 1) / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64)))
    ranked = logits.argmax(1) == 0
    torch.testing.assert_close(metrics["proxy_synthetic"], ranked.float().mean())
