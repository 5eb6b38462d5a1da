"""The generator: published vectors, uniformity, and no correlation between anything that names a draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.philox import Purpose, philox, uniform

# Random123's kat_vectors for philox4x32-10: counter words, key, result.
VECTORS = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (1 << 64) - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_vectors(counter: list[int], key: int, words: list[int]) -> None:
    assert philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist() == words


def numbers(seed: int = 3, samples: int = 512, views: int = 4, count: int = 20, **named: object) -> np.ndarray:
    arguments: dict = {
        "epoch_B": np.zeros(samples, int),
        "sample_B": np.arange(samples),
        "purpose": Purpose.CROP,
    } | named
    return uniform(seed, views_N=np.arange(views), count=count, **arguments)


def test_numbers_are_uniform() -> None:
    drawn = numbers()
    assert drawn.min() > 0 and drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    cells = np.histogram(drawn.ravel(), 64, (0, 1))[0]
    assert stats.chisquare(cells).pvalue > 1e-3
    for view in range(4):  # also for each view and each number of a draw by itself
        for number in range(20):
            assert stats.kstest(drawn[:, view, number], "uniform").pvalue > 1e-6


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, in units of its standard deviation for independent numbers."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1] * np.sqrt(a.size))


def test_nothing_that_names_a_draw_correlates_with_its_neighbour() -> None:
    drawn = numbers()
    others = {
        "views": (drawn[:, :-1], drawn[:, 1:]),
        "samples": (drawn[:-1], drawn[1:]),
        "numbers": (drawn[..., :-1], drawn[..., 1:]),
        "epochs": (drawn, numbers(epoch_B=np.ones(512, int))),
        "seeds": (drawn, numbers(seed=4)),
        "distant samples": (drawn, numbers(sample_B=np.arange(512) + (1 << 33))),
    }
    others |= {p.name: (drawn, numbers(purpose=p)) for p in Purpose if p != Purpose.CROP}
    for name, (a, b) in others.items():
        assert abs(correlation(a, b)) < 4.5, name
        assert abs(correlation(np.square(a - 0.5), np.square(b - 0.5))) < 4.5, name
        assert not np.isclose(a, b).mean() > 1e-3, name


@given(
    seed=st.integers(0, 2**64 - 1),
    samples=st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**31 - 1)), min_size=1, max_size=9),
    views=st.lists(st.integers(0, 4095), min_size=1, max_size=5),
    purpose=st.sampled_from(Purpose),
    count=st.integers(1, 11),
    data=st.data(),
)
def test_a_number_depends_on_nothing_beside_it(
    seed: int,
    samples: list[tuple[int, int]],
    views: list[int],
    purpose: Purpose,
    count: int,
    data: st.DataObject,
) -> None:
    ids, epochs = (np.array(column) for column in zip(*samples, strict=True))
    drawn = uniform(seed, epochs, ids, views, purpose, count)
    row, column = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, len(views) - 1))
    alone = uniform(seed, epochs[row : row + 1], ids[row : row + 1], [views[column]], purpose, 1)
    assert drawn[row, column, 0] == alone[0, 0, 0]


def test_blocks_continue_a_draw() -> None:
    whole = numbers(count=12)
    assert np.array_equal(whole[..., 4:], numbers(count=8, block=1))
