"""Many ranks compute what one rank computes on the whole batch: selections, loss, gradients, statistics, queues."""

from pathlib import Path

import pytest
import torch

from models.distributed import gather, gather_with_gradient, rank, sum_over_ranks, world_size
from models.heads import BatchNorm, BatchNorm2d

from .launching import launch
from .ranks import BATCH, step

SCRIPT = Path(__file__).parent / "ranks.py"


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_world_of_many_is_a_world_of_one(world, tmp_path):
    alone = step(0, 1)
    ranks = launch(SCRIPT, tmp_path, world)
    torch.testing.assert_close(torch.cat([r["losses"] for r in ranks]), alone["losses"], rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([r["choice"] for r in ranks]), alone["choice"])
    for r in ranks:
        torch.testing.assert_close(r["loss"], alone["loss"], rtol=1e-5, atol=1e-5)
        # A gather whose backward keeps local gradients only would be too small by the world size here.
        torch.testing.assert_close(r["contrastive"], alone["contrastive"])
        for group in ("gradients", "buffers"):
            assert r[group].keys() == alone[group].keys()
            for name, value in alone[group].items():
                difference = (r[group][name] - value).float().norm()
                # Gradients reach norms of 65; those of biases before a BatchNorm are 0 but for rounding.
                assert difference <= 1e-4 * value.float().norm() + 1e-4, f"{group} {name}: {difference}"
    assert ranks[0]["buffers"]["queue1.labels_K"][:BATCH].tolist() == list(range(BATCH))


def test_in_a_world_of_one_collectives_are_the_identity():
    rows = torch.randn(3, 2)
    assert world_size() == 1 and rank() == 0
    for function in (gather, gather_with_gradient, sum_over_ranks):
        assert function(rows) is rows


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("worlds", [[1], [2, 1]], ids=["one rank", "the arithmetic of many"])
def test_views_side_by_side_are_batches_of_their_own(worlds, affine, monkeypatch):
    norm, views = BatchNorm(5, affine=affine), torch.randn(16, 3, 5)
    norm.track_running_stats = False
    if affine:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    wanted = torch.stack([norm(view) for view in views.unbind(1)], 1)
    monkeypatch.setattr("models.heads.sum_over_ranks", lambda value: value)
    calls = iter(worlds)  # more than one rank for the branch, one for the count
    monkeypatch.setattr("models.heads.world_size", lambda: next(calls))
    torch.testing.assert_close(norm(views), wanted)


@pytest.mark.parametrize(("ours", "shape"), [(BatchNorm, (16, 5)), (BatchNorm2d, (4, 5, 3, 2))])
def test_synchronised_formula_equals_torch_s(ours, shape, monkeypatch):
    """The arithmetic of many ranks, in a world whose other ranks are silent."""
    one, other = ours(5), ours(5)
    x, y = torch.randn(shape, requires_grad=True), None
    y = x.detach().clone().requires_grad_()
    wanted = one(x)
    monkeypatch.setattr("models.heads.sum_over_ranks", lambda value: value)
    calls = iter([2, 1])  # more than one rank for the branch, one for the count
    monkeypatch.setattr("models.heads.world_size", lambda: next(calls))
    found = other(y)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(shape)
    (wanted * weights).sum().backward(), (found * weights).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(dict(other.named_buffers()), dict(one.named_buffers()))
