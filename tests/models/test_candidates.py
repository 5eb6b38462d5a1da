"""Which views are run: random pairs and finalists, against loops."""

import pytest
import torch

from models.candidates import RandomPairs, Views, finalists, pairs_among
from models.selection import pairs, same_policy

CPU = torch.device("cpu")
RANDOM = RandomPairs(torch.tensor([3, 0]), torch.tensor([5, 2]), torch.tensor([1, 2, 4]))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_random_pairs_take_the_place_of_the_best_ones():
    assert RANDOM.put(torch.tensor([1, 1, 1, 1, 1])).tolist() == [2, 1, 1, 5, 1]
    assert RandomPairs.none(3, CPU).put(torch.tensor([4, 5, 0])).tolist() == [4, 5, 0]
    assert RANDOM.images == 5 and RandomPairs.none(3, CPU).images == 3


@pytest.mark.parametrize(
    ("images", "share", "count"),
    [(64, 0.25, 16), (10, 0.25, 3), (10, 0.9, 8), (10, 1.0, 10), (2, 0.25, 0), (1, 0.5, 0)],
)
def test_a_share_is_drawn_that_leaves_two_or_none(images, share, count):
    order, chance = torch.randperm(images), torch.randint(6, (images,))
    random = RandomPairs.drawn(order, chance, share)
    assert torch.equal(random.rows_R, order[:count]) and torch.equal(random.pairs_R, chance[order[:count]])
    assert random.others_S.tolist() == sorted(order[count:].tolist())


def test_what_is_known_of_scored_images_goes_to_their_rows():
    spread = RANDOM.spread(torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.nan)
    assert spread[[1, 2, 4]].tolist() == [[1, 2], [3, 4], [5, 6]] and spread[[0, 3]].isnan().all()


@pytest.mark.parametrize("random", [RANDOM, RandomPairs.none(5, CPU)], ids=["two at random", "none"])
def test_views_are_some_of_scored_images_and_the_pairs_of_others(random):
    values, some = numbers(5, 4, 2), torch.tensor([[0, 1, 3], [1, 2, 3], [0, 2, 3], [0, 1, 2], [0, 1, 3]])
    some = some[: len(random.others_S)]
    there = {(int(row), view) for row, views in zip(random.others_S, some.tolist(), strict=True) for view in views}
    drawn = zip(random.rows_R.tolist(), random.pairs_R.tolist(), strict=True)
    there |= {(row, view) for row, pair in drawn for view in pairs(4)[pair]}

    views, every = Views(random, some, 4), Views.all(random, 4)
    taken = views.of(values)
    assert len(taken) == len(there)
    scored = [values[row][own] for row, own in zip(random.others_S, some, strict=True)]
    assert torch.equal(views.scored(taken), torch.stack(scored))
    assert torch.equal(every.of(values)[every.place(some)], taken)
    back = views.spread(taken)
    for image in range(5):
        for view in range(4):
            assert back[image, view].equal(values[image, view]) or (
                (image, view) not in there and back[image, view].isnan().all()
            )


@pytest.mark.parametrize("rule", ["hardest", "easiest"])
@pytest.mark.parametrize("barred", [None, same_policy(5, CPU)], ids=["all pairs", "of two policies"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_finalists_are_the_views_of_the_best_pairs(count, barred, rule):
    scores = numbers(20, 10)
    found = finalists(scores, 5, count, rule, barred)
    for image, row in zip(scores, found, strict=True):
        order = image.argsort(descending=rule == "hardest").tolist()
        wanted: list[int] = []
        for pair in order:
            if barred is None or not barred[pair]:
                wanted += [view for view in pairs(5)[pair] if view not in wanted]
        # Of the last pair to come in both views may be new; which of them does not matter where one place is left.
        assert row.tolist() == sorted(row.tolist())
        if count == 5 or set(wanted[:count]) == set(row.tolist()):
            continue
        assert set(row.tolist()) == {*wanted[: count - 1], wanted[count]}


def test_of_equally_good_pairs_one_is_there_whole():
    """Views 0 to 3, of which the pairs (0, 1), (0, 3), (1, 2) and (2, 3) compete and cost the same."""
    found = finalists(torch.ones(1, 6), 4, 2, "hardest", same_policy(4, CPU))
    assert found.tolist() == [[0, 1]]
    found = finalists(torch.tensor([[0.0, 5, 1, 1, 5, 1]]), 4, 2, "hardest", same_policy(4, CPU))
    assert pairs(4).index(tuple(found[0].tolist())) in (2, 3, 5)


def test_pairs_of_some_views_keep_their_numbers():
    some = torch.tensor([[0, 1, 2], [0, 2, 4], [1, 3, 4], [2, 3, 4]])
    for row, found in zip(some.tolist(), pairs_among(some, 5).tolist(), strict=True):
        assert found == [pairs(5).index((row[a], row[b])) for a, b in pairs(3)]
