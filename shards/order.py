"""The order of samples: position since the start of training → sample, a pure function of counts, shares and a seed.

Each source is shuffled by itself, epoch by epoch: its shards are permuted, and samples are permuted inside blocks of
consecutive shards, so that an epoch opens every shard once and a bounded number at a time. Sources are interleaved by
exact quota: of the first p positions, a source has its share times p, rounded; so every window of W positions is at
most one off. Nothing depends on batch size, worker count or world size, and any stretch can be asked for at any time.

Only counts per shard are needed; a permutation is made when its block is asked for. The random words come from Philox,
a counter-based generator whose raw output is fixed for good.

Letters: n positions asked for, S shards, m samples of a block.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil

import numpy as np

from shards.errors import InputError

LARGEST_DENOMINATOR = 1_000_000
CACHED_BLOCKS = 4
SHUFFLE_SHARDS, SHUFFLE_BLOCK = 0, 1  # what a stream of random words is for


@dataclass(frozen=True)
class Samples:
    """What stands at n consecutive positions."""

    ids: np.ndarray
    """int64[n]: rows in the concatenation of all sources."""
    sources: np.ndarray
    """int16[n]: number of the source."""
    epochs: np.ndarray
    """int32[n]: how often the sample's source had been gone through before."""


class SourceOrder:
    """The endless sequence of one source's rows: epoch after epoch, each a block-wise shuffle of all rows.

    Safe to share between threads.
    """

    def __init__(self, counts: np.ndarray, seed: int, source: int, block: int) -> None:
        """`counts` int64[S]: samples per shard; `block`: shards that are shuffled together."""
        self._counts = np.asarray(counts, np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._counts)])
        self._key, self._block = (seed, source), block
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, start: int, count: int) -> np.ndarray:
        """int64[count]: rows at the source's own positions from `start` on."""
        parts = []
        while count > 0:
            epoch, within = divmod(start, len(self))
            with self._lock:
                shards, ends = self._epoch(epoch)
                number = int(np.searchsorted(ends, within, side="right"))
                first = int(ends[number - 1]) if number else 0
                taken = self._shuffled(epoch, number, shards)[within - first : within - first + count]
            parts.append(taken)
            start, count = start + len(taken), count - len(taken)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers in the epoch's order, and where in the epoch each block ends."""
        if epoch not in self._epochs:
            shards = np.argsort(words((*self._key, epoch, SHUFFLE_SHARDS, 0), len(self._counts)), kind="stable")
            ends = np.cumsum(np.add.reduceat(self._counts[shards], np.arange(0, len(shards), self._block)))
            self._epochs[epoch] = shards, ends
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int, number: int, shards: np.ndarray) -> np.ndarray:
        """int64[m]: the rows of one block in their order."""
        key = epoch, number
        if key not in self._blocks:
            members = shards[number * self._block : (number + 1) * self._block]
            rows = np.concatenate([self._starts[s] + np.arange(int(self._counts[s])) for s in members])
            order = np.argsort(words((*self._key, epoch, SHUFFLE_BLOCK, number), len(rows)), kind="stable")
            self._blocks[key] = rows[order]
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]


@dataclass(frozen=True)
class _Stretch:
    """An epoch: where it starts, what came before it, and its quotas.

    Sources are split off one after another: of the positions left, source i takes steps[i] / parts[i]. `phases` carries
    the fraction over from the epoch before.
    """

    start: int
    length: int
    taken: tuple[int, ...]
    steps: tuple[int, ...]
    parts: tuple[int, ...]
    phases: tuple[int, ...]

    def before(self, offsets: np.ndarray | int) -> list[np.ndarray]:
        """Per source, how many of the epoch's first `offsets` positions are its own."""
        left, found = np.asarray(offsets, np.int64), []
        for step, part, phase in zip(self.steps, self.parts, self.phases, strict=True):
            own = (left * step + phase) // part
            found.append(own)
            left = left - own
        return found


class SampleOrder:
    """Interleaves sources by exact quota. Cheap to make: 100,000 shards take milliseconds."""

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        shares: Sequence[float] | Sequence[Sequence[float]],
        seed: int,
        block: int = 16,
    ) -> None:
        """
        Args:
            counts: per source int64[S], samples per shard.
            shares: per source its share of the positions (they add up to 1); or one such list per epoch, the last of
                which holds for all later epochs.
            seed: of every permutation.
            block: shards that are shuffled together, and so the most that are open at once per source.

        Raises:
            InputError: shares that do not add up, that are not one per source, or of an empty source; block below 1.
        """
        if block < 1:
            raise InputError(f"data.block: {block} must be at least 1")
        self._sources = [SourceOrder(c, seed, number, block) for number, c in enumerate(counts)]
        table = [shares] if np.ndim(shares[0]) == 0 else shares
        self._shares = [self._checked(row) for row in table]  # type: ignore[arg-type]
        self._offsets = np.concatenate([[0], np.cumsum([len(source) for source in self._sources])])
        self._stretches = [self._stretch(0, None)]
        self._starts = [0]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def epoch_length(self) -> int:
        """Positions of the first epoch, in which the first source with a share is gone through once."""
        return self._stretches[0].length

    def steps(self, epochs: float, batch: int) -> int:
        """Steps of `batch` positions that cover `epochs` epochs, rounded up."""
        whole = int(epochs)
        end = self._epoch(whole).start + (epochs - whole) * self._epoch(whole).length
        return max(1, ceil(end / batch - 1e-9))

    def at(self, position: int, count: int) -> Samples:
        """The samples of `count` positions from `position` on."""
        parts = []
        while count > 0:
            stretch = self._at(position)
            taken = min(count, stretch.start + stretch.length - position)
            parts.append(self._within(stretch, position - stretch.start, taken))
            position, count = position + taken, count - taken
        if not parts:
            return Samples(np.empty(0, np.int64), np.empty(0, np.int16), np.empty(0, np.int32))
        if len(parts) == 1:
            return parts[0]
        return Samples(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Samples)))

    def _within(self, stretch: _Stretch, offset: int, count: int) -> Samples:
        """Samples of positions inside one epoch."""
        counted = stretch.before(np.arange(offset, offset + count + 1))
        ids, sources, epochs = np.empty(count, np.int64), np.empty(count, np.int16), np.empty(count, np.int32)
        for number, (source, own) in enumerate(zip(self._sources, counted, strict=True)):
            places = np.flatnonzero(np.diff(own))
            if len(places):
                first = stretch.taken[number] + int(own[0])
                ids[places] = source.rows(first, len(places)) + self._offsets[number]
                sources[places] = number
                epochs[places] = (first + np.arange(len(places))) // len(source)
        return Samples(ids, sources, epochs)

    def _checked(self, shares: Sequence[float]) -> tuple[Fraction, ...]:
        if len(shares) != len(self._sources):
            raise InputError(f"data shares: {list(shares)} for {len(self._sources)} sources; give one share a source")
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise InputError(f"data shares: {list(shares)} must be 0 or above and add up to 1")
        for share, source in zip(shares, self._sources, strict=True):
            if share > 0 and len(source) == 0:
                raise InputError(f"data shares: {share} of a source without samples; give its shards or share 0")
        return tuple(Fraction(share).limit_denominator(LARGEST_DENOMINATOR) for share in shares)

    def _at(self, position: int) -> _Stretch:
        """The epoch that a position lies in."""
        while self._stretches[-1].start + self._stretches[-1].length <= position:
            self._epoch(len(self._stretches))
        return self._stretches[bisect_right(self._starts, position) - 1]

    def _epoch(self, number: int) -> _Stretch:
        with self._lock:
            while len(self._stretches) <= number:
                last = self._stretches[-1]
                self._stretches.append(self._stretch(len(self._stretches), last))
                self._starts.append(last.start + last.length)
        return self._stretches[number]

    def _stretch(self, epoch: int, last: _Stretch | None) -> _Stretch:
        shares = self._shares[min(epoch, len(self._shares) - 1)]
        first = next(number for number, share in enumerate(shares) if share > 0)
        length = ceil(len(self._sources[first]) / shares[first])
        steps, parts, left = [], [], Fraction(1)
        for share in shares:
            quota = share / left if left > 0 else Fraction(0)
            quota = min(quota, Fraction(1)).limit_denominator(LARGEST_DENOMINATOR)
            steps.append(quota.numerator)
            parts.append(quota.denominator)
            left -= share
        # The source that takes all that is left must do so exactly, whatever the rounding of shares has done.
        final = max(number for number, share in enumerate(shares) if share > 0)
        steps[final], parts[final] = 1, 1
        if last is None:
            # Rounded up, so that position 0 belongs to the first source.
            return _Stretch(0, length, (0,) * len(shares), tuple(steps), tuple(parts), tuple(p - 1 for p in parts))
        done = last.before(last.length)
        phases, remaining = [], last.length
        for number, part in enumerate(parts):
            carried = (remaining * last.steps[number] + last.phases[number]) % last.parts[number]
            phases.append(carried * part // last.parts[number])
            remaining -= int(done[number])
        taken = tuple(before + int(own) for before, own in zip(last.taken, done, strict=True))
        return _Stretch(last.start + last.length, length, taken, tuple(steps), tuple(parts), tuple(phases))


def words(key: tuple[int, ...], count: int) -> np.ndarray:
    """uint64[count] random words that belong to a key of integers."""
    return np.random.Philox(np.random.SeedSequence([part & (2**64 - 1) for part in key])).random_raw(count)
