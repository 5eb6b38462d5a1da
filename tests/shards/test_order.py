"""The order of samples: each once an epoch, mixed by quota, the same for any world, from shard sizes alone."""

import time
import tracemalloc
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.order import SampleOrder, permutation

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any).map(lambda c: np.array(c, np.int64))
tenths = st.integers(1, 9).map(lambda n: n / 10)
seeds = st.integers(0, 2**40)
blocks = st.integers(1, 5)


def turns_of(order: SampleOrder, source: int, length: int) -> np.ndarray:
    """Ids of the first `length` samples that one source gives."""
    samples = order.at(0, 12 * length + 40)
    return samples.ids[samples.sources == source][:length]


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, tenths, seeds, blocks)
def test_every_own_epoch_of_every_source_holds_each_sample_once(
    real: np.ndarray, synthetic: np.ndarray, share: float, seed: int, block: int
) -> None:
    order = SampleOrder([real, synthetic], [1 - share, share], seed, block)
    first = 0
    for source, counts in enumerate((real, synthetic)):
        total = int(counts.sum())
        ids = turns_of(order, source, 3 * total).reshape(3, total)
        assert (np.sort(ids, axis=1) == np.arange(first, first + total)).all()
        first += total


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, tenths, seeds)
def test_epochs_count_how_often_the_source_was_gone_through(
    real: np.ndarray, synthetic: np.ndarray, share: float, seed: int
) -> None:
    samples = SampleOrder([real, synthetic], [1 - share, share], seed).at(0, 300)
    for source, counts in enumerate((real, synthetic)):
        epochs = samples.epochs[samples.sources == source]
        assert (epochs == np.arange(len(epochs)) // counts.sum()).all()


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, tenths, seeds, blocks, st.integers(0, 10**9), st.lists(st.integers(1, 40), max_size=8))
def test_any_slices_join_to_the_same_sequence(
    real: np.ndarray, synthetic: np.ndarray, share: float, seed: int, block: int, position: int, cuts: list[int]
) -> None:
    """Resume at any position, and any batch size, are slices."""
    order = SampleOrder([real, synthetic], [1 - share, share], seed, block)
    whole = order.at(position, sum(cuts))
    starts = position + np.cumsum([0, *cuts])
    parts = [
        SampleOrder([real, synthetic], [1 - share, share], seed, block).at(s, n)
        for s, n in zip(starts[:-1], cuts, strict=True)
    ]
    for name in ("ids", "sources", "epochs"):
        assert (np.concatenate([*(getattr(part, name) for part in parts), []]) == getattr(whole, name)).all()


shares = st.one_of(
    tenths, st.fractions(0, 1, max_denominator=997).map(float), st.floats(0, 1)
)  # any of them may be 0 or 1


@settings(max_examples=40, deadline=None)
@given(shares, sizes, sizes, st.integers(0, 10**9), st.integers(1, 400))
def test_windows_hold_the_share_to_within_one(
    share: float, real: np.ndarray, synthetic: np.ndarray, position: int, window: int
) -> None:
    sources = SampleOrder([real, synthetic], [1 - share, share], 0).at(position, window + 200).sources
    total = np.concatenate([[0], np.cumsum(sources)])
    counts = total[window:] - total[:-window]
    exact = Fraction(share).limit_denominator(10**9) * window
    assert abs(int(counts.min()) - exact) <= 1
    assert abs(int(counts.max()) - exact) <= 1


@settings(max_examples=40, deadline=None)
@given(tenths, st.lists(shares, max_size=4), st.integers(1, 60), st.integers(1, 80))
def test_a_schedule_holds_in_windows_that_cross_epochs_too(
    first: float, later: list[float], total: int, window: int
) -> None:
    rows = [[1 - share, share] for share in (first, *later)]
    order = SampleOrder([np.array([total]), np.array([7])], rows, 0)
    length = order.epoch_length * len(rows) + 100
    expected = np.array([rows[min(p // order.epoch_length, len(rows) - 1)][1] for p in range(length)])
    sources = order.at(0, length).sources
    window = min(window, length)
    difference = np.convolve(sources - expected, np.ones(window), "valid")
    assert abs(difference).max() <= 1 + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=4).filter(any), st.integers(1, 200))
def test_more_sources_stay_near_their_shares(weights: list[int], window: int) -> None:
    order = SampleOrder([np.array([5])] * len(weights), weights, 0)
    sources = order.at(10**6, window + 300).sources
    for source, weight in enumerate(weights):
        counts = np.convolve(sources == source, np.ones(window), "valid")
        assert abs(counts - window * weight / sum(weights)).max() <= len(weights) - 1 + 1e-6


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, tenths, seeds, st.integers(0, 10**6))
def test_saved_under_one_world_and_restored_under_another(
    real: np.ndarray, synthetic: np.ndarray, share: float, seed: int, position: int
) -> None:
    """Worlds × worlds: two steps, save the position, two steps in the other world; batch 24 over all."""

    def steps(world: int, start: int) -> list[np.ndarray]:
        ranks = [SampleOrder([real, synthetic], [1 - share, share], seed) for _ in range(world)]
        batch = 24 // world
        return [
            np.concatenate([order.at(p + rank * batch, batch).ids for rank, order in enumerate(ranks)])
            for p in (start, start + 24)
        ]

    expected = SampleOrder([real, synthetic], [1 - share, share], seed).at(position, 96).ids
    for before in (1, 2, 8):
        for after in (1, 3, 6):
            got = np.concatenate([*steps(before, position), *steps(after, position + 48)])
            assert (got == expected).all()


@settings(max_examples=40, deadline=None)
@given(sizes, seeds, blocks)
def test_each_shard_is_needed_in_one_stretch_with_few_others(counts: np.ndarray, seed: int, block: int) -> None:
    order = SampleOrder([counts], [1.0], seed, block)
    owner = np.repeat(np.arange(len(counts)), counts)
    ids = order.at(0, int(counts.sum())).ids
    first, last = {}, {}
    for place, shard in enumerate(owner[ids]):
        first.setdefault(shard, place)
        last[shard] = place
    open_at = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(ids))]
    assert max(open_at) <= block


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, tenths, seeds, blocks, st.integers(0, 500))
def test_shards_are_foretold_in_the_order_of_need(
    real: np.ndarray, synthetic: np.ndarray, share: float, seed: int, block: int, position: int
) -> None:
    order = SampleOrder([real, synthetic], [1 - share, share], seed, block)
    foretold = list(islice(order.shards(position), 200))
    starts = [0, int(real.sum())]
    owners = [np.repeat(np.arange(len(c)), c) for c in (real, synthetic)]
    samples = order.at(position, 60)
    reached = [-1, -1]  # place in the foretold list up to which each source has come
    for sample, source in zip(samples.ids, samples.sources, strict=True):
        shard = int(owners[source][sample - starts[source]])
        places = [i for i, one in enumerate(foretold) if one == (source, shard)]
        # Within a block any shard may be next; a block is at most `block` neighbours of its source in the list.
        mine = [i for i, one in enumerate(foretold) if one[0] == source]
        ahead = [mine.index(i) for i in places if mine.index(i) > reached[source] - block]
        assert ahead
        assert ahead[0] <= reached[source] + 2 * block
        reached[source] = max(reached[source], ahead[0])


def test_another_seed_or_epoch_gives_another_order() -> None:
    counts = [np.full(20, 50)]
    one, two = (SampleOrder(counts, [1.0], seed).at(0, 2000).ids.reshape(2, 1000) for seed in (1, 2))
    orders = [one[0], one[1], two[0], two[1]]
    for left in range(4):
        for right in range(left):
            assert (orders[left] == orders[right]).mean() < 0.02


def test_the_sequence_is_the_one_of_the_first_release() -> None:
    """A change here breaks the resumption of every run: it needs a new schema version."""
    samples = SampleOrder([np.array([3, 1, 5]), np.array([2, 2])], [0.7, 0.3], seed=0, block=2).at(0, 14)
    assert samples.ids.tolist() == [3, 11, 2, 0, 1, 12, 4, 5, 10, 7, 6, 9, 8, 5]
    assert samples.sources.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert samples.epochs.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(0, 2**50), min_size=1, max_size=4))
def test_permutations_hold_every_number_once(count: int, key: list[int]) -> None:
    assert (np.sort(permutation(count, *key)) == np.arange(count)).all()


def test_permutations_are_uniform() -> None:
    """All 24 orders of 4 come equally often, by chi-square with 23 degrees of freedom (p = 0.001 at 49.7)."""
    orders = [tuple(permutation(4, seed)) for seed in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def test_epoch_length_follows_the_first_source_with_a_share() -> None:
    counts = [np.array([6, 4]), np.array([100])]
    assert SampleOrder(counts, [0.5, 0.5], 0).epoch_length == 20
    assert SampleOrder(counts, [0.3, 0.7], 0).epoch_length == 34
    assert SampleOrder(counts, [0, 1], 0).epoch_length == 100
    assert SampleOrder(counts, [[1, 0], [0, 1]], 0).epoch_length == 10


def test_a_hundred_thousand_shards_with_a_billion_samples_at_any_position() -> None:
    tracemalloc.start()
    start = time.perf_counter()
    order = SampleOrder([np.full(50_000, 10_000)] * 2, [0.5, 0.5], seed=1)
    for position in (0, 5 * 10**8, 10**9 - 100, 3 * 10**11):
        samples = order.at(position, 512)
        assert ((samples.ids >= 0) & (samples.ids < 10**9)).all()
    assert time.perf_counter() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("shares", "seed", "block", "message"),
    [
        ([0.5], 0, 1, "1 shares for 2 sources"),
        ([], 0, 1, "0 shares for 2 sources"),
        ([0.0, 0.0], 0, 1, "one of them positive"),
        ([1.5, -0.5], 0, 1, "numbers of 0 or above"),
        ([float("nan"), 0.5], 0, 1, "numbers of 0 or above"),
        ([[0.5, 0.5], [1.0]], 0, 1, "1 shares for 2 sources"),
        ([0.5, 0.5], -1, 1, "seed: -1"),
        ([0.5, 0.5], 0, 0, "data.block: 0"),
    ],
)
def test_wrong_arguments_are_named(shares: list[float], seed: int, block: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SampleOrder([np.array([4]), np.array([4])], shares, seed, block)


def test_a_share_of_an_empty_source_is_refused() -> None:
    with pytest.raises(InputError, match="but no samples"):
        SampleOrder([np.array([4]), np.array([], np.int64)], [0.5, 0.5], 0)
    assert len(SampleOrder([np.array([4]), np.array([], np.int64)], [1, 0], 0).at(0, 9)) == 9


def test_positions_are_never_negative() -> None:
    with pytest.raises(ValueError, match="position -1"):
        SampleOrder([np.array([4])], [1], 0).at(-1, 4)
