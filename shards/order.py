"""Which sample stands at which position: a pure function of shard sizes, shares, seed and position.

Every source goes through its own epochs. In each, its shards are shuffled, neighbours in that order form blocks, and
the samples of a block are shuffled together; so every sample comes once, a shard is needed in one stretch only, and a
bounded number of shards at a time. Sources interleave by exact quota. Nothing has state: any stretch can be asked for
at any time, and memory grows with the number of shards alone.
Letters: n positions, S shards, K sources.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from shards.errors import InputError

SHARDS, SAMPLES = 0, 1  # what a permutation is of; part of its key
FINEST_SHARE = 10**9  # denominator; shares such as 0.3 and 1/3 are kept exactly
STRETCH = 1 << 11  # positions looked through at once for the shards they need
CACHED_EPOCHS, CACHED_BLOCKS = 4, 4  # per source; a batch touches few of either

Share = float | Fraction
Shares = Sequence[Share] | Sequence[Sequence[Share]]


@dataclass(frozen=True)
class Samples:
    """What stands at n consecutive positions."""

    ids: np.ndarray
    """int64[n]: row in the concatenation of all sources."""
    sources: np.ndarray
    """int16[n]: number of the source."""
    epochs: np.ndarray
    """int32[n]: how often that source has been gone through before."""

    def __len__(self) -> int:
        return len(self.ids)


class SampleOrder:
    """The endless sequence of samples of K sources.

    Args:
        counts: per source int64[S], samples in each shard.
        shares: per source its share of every stretch of the sequence; or one such list per epoch, whose last goes on
            for all later epochs. Shares are divided by their sum.
        seed: of all shuffling, at least 0.
        block: shards of a source that are shuffled together.

    Any n consecutive positions under one share hold share × n samples of a source, to within 1 (with K > 2 sources:
    to within K − 1), also across the ends of epochs. A source that ends begins its next epoch.

    Raises:
        InputError: shares that are no shares or ask for a source without samples, a block below 1, a negative seed.
    """

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        shares: Shares,
        seed: int,
        block: int = 16,
    ) -> None:
        if block < 1:
            raise InputError(f"data.block: {block} shards; give at least 1")
        if seed < 0:
            raise InputError(f"seed: {seed}; give 0 or above")
        self.block = block
        """Shards of a source that are needed at a time."""
        totals = [int(np.sum(c)) for c in counts]
        starts = np.concatenate([[0], np.cumsum(totals)])
        self._sources = [
            _Source(np.asarray(c, np.int64), int(start), (seed, number), block)
            for number, (c, start) in enumerate(zip(counts, starts, strict=False))
        ]
        rows = _share_rows(shares, totals)
        leading = next(number for number, share in enumerate(rows[0]) if share)
        self.epoch_length = math.ceil(totals[leading] / rows[0][leading])
        """Positions of an epoch: those in which the first source with a share is gone through once, by the first
        epoch's shares, rounded up."""
        self._quotas = _quotas(rows, self.epoch_length)

    def at(self, position: int, count: int) -> Samples:
        """The samples at `count` positions from `position` on, counted from the start of training."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position}, count {count}: neither can be negative")
        ids, sources, epochs = np.empty(count, np.int64), np.empty(count, np.int16), np.empty(count, np.int32)
        for source, where, turn in self._turns(position, count):
            sources[where] = source
            ids[where], epochs[where] = self._sources[source].at(turn, len(where))
        return Samples(ids, sources, epochs)

    def shards(self, position: int) -> Iterator[tuple[int, int]]:
        """Endlessly, the (source, shard) that the positions from `position` on need, in the order of need.

        Each block's shards come once, sorted by where the block begins.
        """
        last: dict[int, tuple[int, int]] = {}
        while True:
            begins: list[tuple[int, int, np.ndarray]] = []
            for source, where, turn in self._turns(position, STRETCH):
                begun = 0
                for epoch, number, count in self._sources[source].blocks(turn, len(where)):
                    if last.get(source) != (epoch, number):
                        last[source] = (epoch, number)
                        begins.append((int(where[begun]), source, self._sources[source].block_shards(epoch, number)))
                    begun += count
            for _, source, shards in sorted(begins, key=lambda begin: begin[:2]):
                yield from ((source, int(shard)) for shard in shards)
            position += STRETCH

    def _turns(self, position: int, count: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """Per source and stretch of one share: source, places among the positions asked for, its first turn."""
        done = 0
        while done < count:
            number = min((position + done) // self.epoch_length, len(self._quotas) - 1)
            left = count - done
            if number < len(self._quotas) - 1:
                left = min(left, (number + 1) * self.epoch_length - position - done)
            local = position + done - number * self.epoch_length
            for source, where, turn in self._quotas[number].split(local, left):
                if len(where):
                    yield source, where + done, turn
            done += left


@dataclass(frozen=True)
class _Quota:
    """How one share row deals positions to sources, last source first: each level takes its part of what arrives.

    Level k hands source k the arrivals i for which ⌊(phase + (i + 1)·p) / q⌋ steps up, p/q being its share of what
    arrives: of any n consecutive arrivals, ⌊n·p/q⌋ or ⌈n·p/q⌉. The others arrive, still consecutive, at level k − 1.
    """

    parts: tuple[tuple[int, int], ...]
    """Per level its share p/q of what arrives; q is about `FINEST_SHARE`, so that phases are as fine."""
    phases: tuple[int, ...]
    """Per level where between two steps the row begins, in units of 1/q."""
    turns: tuple[int, ...]
    """Per source the samples it gave before this row."""

    def split(self, arrival: int, count: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """(source, places among `count` positions from this row's `arrival`-th on, first turn) of every source."""
        where = np.arange(count)
        for source in range(len(self.parts) - 1, 0, -1):
            p, q = self.parts[source]
            taken, rest = divmod(self.phases[source] + arrival * p, q)  # Python's integers: no overflow at any length
            steps = (rest + np.arange(len(where) + 1) * p) // q
            takes = steps[1:] > steps[:-1]
            yield source, where[takes], self.turns[source] + taken
            where = where[~takes]
            arrival -= taken
        yield 0, where, self.turns[0] + arrival

    def after(self, count: int, parts: tuple[tuple[int, int], ...]) -> "_Quota":
        """The quota of the next row, `count` positions later: counts run on, and so do the phases."""
        turns, phases = list(self.turns), list(self.phases)
        for source in range(len(self.parts) - 1, 0, -1):
            p, q = self.parts[source]
            taken, rest = divmod(self.phases[source] + count * p, q)
            turns[source] += taken
            phases[source] = rest * parts[source][1] // q
            count -= taken
        turns[0] += count
        return _Quota(parts, tuple(phases), tuple(turns))


def _share_rows(shares: Shares, totals: Sequence[int]) -> list[list[Fraction]]:
    """Shares per epoch and source that add up to 1, checked."""
    table: Any = shares
    table = table if len(table) and np.ndim(table[0]) else [table]
    for row in table:
        if len(row) != len(totals):
            raise InputError(f"shares: {len(row)} shares for {len(totals)} sources; give one for each")
        if not all(0 <= share < math.inf for share in row) or not any(row):
            raise InputError(f"shares: {list(row)}; give numbers of 0 or above, one of them positive")
        for number, (share, total) in enumerate(zip(row, totals, strict=True)):
            if share and not total:
                raise InputError(f"shares: source {number} has the share {share} but no samples; set its share to 0")
    exact = ([Fraction(share) for share in row] for row in table)
    return [[(share / sum(row)).limit_denominator(FINEST_SHARE) for share in row] for row in exact]


def _quotas(rows: Sequence[Sequence[Fraction]], length: int) -> list[_Quota]:
    """One quota per share row, each going on where the one before ends."""
    parts = [tuple(_part(row[: level + 1]) for level in range(len(row))) for row in rows]
    first = tuple((q - 1) // 2 for _, q in parts[0])
    quotas = [_Quota(parts[0], first, (0,) * len(first))]
    for row in parts[1:]:
        quotas.append(quotas[-1].after(length, row))
    return quotas


def _part(shares: Sequence[Fraction]) -> tuple[int, int]:
    """The last share's part p/q of all of these; 0 where they are all 0, as nothing arrives then."""
    part = (shares[-1] / sum(shares)).limit_denominator(FINEST_SHARE) if any(shares) else Fraction(0)
    finer = FINEST_SHARE // part.denominator
    return part.numerator * finer, part.denominator * finer


@dataclass(frozen=True)
class _Plan:
    """One epoch of a source."""

    shards: np.ndarray
    """int64[S]: the shards in shuffled order."""
    starts: np.ndarray
    """int64[blocks + 1]: turn within the epoch at which each block begins, and the epoch's length."""


class _Source:
    """One source's own endless sequence. Epochs and blocks last used are kept; safe to share between threads."""

    def __init__(self, counts: np.ndarray, first_id: int, key: tuple[int, ...], block: int) -> None:
        self._counts = counts
        self._rows = first_id + np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._length = int(counts.sum())
        self._key = key
        self._size = block
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, turn: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids and int32 epochs of `count` samples from the source's `turn`-th on."""
        ids, epochs = np.empty(count, np.int64), np.empty(count, np.int32)
        done = 0
        for epoch, number, part in self.blocks(turn, count):
            begin = turn + done - epoch * self._length - int(self.plan(epoch).starts[number])
            ids[done : done + part] = self.block_ids(epoch, number)[begin : begin + part]
            epochs[done : done + part] = epoch
            done += part
        return ids, epochs

    def blocks(self, turn: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, number, samples) of the blocks that `count` samples from the `turn`-th on come from."""
        while count:
            epoch, local = divmod(turn, self._length)
            starts = self.plan(epoch).starts
            number = int(np.searchsorted(starts, local, side="right")) - 1
            part = min(count, int(starts[number + 1]) - local)
            yield epoch, number, part
            turn, count = turn + part, count - part

    def plan(self, epoch: int) -> _Plan:
        """The epoch's shards and blocks."""
        with self._lock:
            if epoch not in self._plans:
                shards = permutation(len(self._counts), *self._key, epoch, SHARDS)
                ends = np.cumsum(self._counts[shards])
                ends = np.append(ends[self._size - 1 : -1 : self._size], ends[-1:])
                _keep(self._plans, epoch, _Plan(shards, np.concatenate([[0], ends])), CACHED_EPOCHS)
            return self._plans[epoch]

    def block_shards(self, epoch: int, number: int) -> np.ndarray:
        """int64[≤ block]: the block's shards."""
        return self.plan(epoch).shards[number * self._size : (number + 1) * self._size]

    def block_ids(self, epoch: int, number: int) -> np.ndarray:
        """int64: the block's samples in shuffled order."""
        shards = self.block_shards(epoch, number)
        with self._lock:
            if (epoch, number) not in self._blocks:
                rows = np.concatenate([self._rows[shard] + np.arange(int(self._counts[shard])) for shard in shards])
                ids = rows[permutation(len(rows), *self._key, epoch, SAMPLES, number)]
                _keep(self._blocks, (epoch, number), ids, CACHED_BLOCKS)
            return self._blocks[epoch, number]


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any, size: int) -> None:
    cache[key] = value
    if len(cache) > size:
        cache.popitem(last=False)


def permutation(count: int, *key: int) -> np.ndarray:
    """int64[count]: the numbers below `count` in an order that follows from the key alone.

    Random bits of Philox (whose raw stream numpy keeps as it is, unlike that of `Generator.permutation`) with the
    number itself in the lowest bits, sorted: the bits decide, and no two are equal.
    """
    low = max(count - 1, 1).bit_length()
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    keys = (raw >> np.uint64(low) << np.uint64(low)) | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64((1 << low) - 1)).astype(np.int64)
