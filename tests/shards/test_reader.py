"""Reading by sample id: the right bytes, damage as values, few open files, the same substitutes every time."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stored_samples import content, store

from shards import reader as module
from shards.manifest import open_manifest
from shards.reader import SampleError, SampleReader, complete

COUNTS = ([5, 1, 8], [4, 6])
TOTAL = 24


@pytest.fixture
def reader(tmp_path: Path):
    manifests = [store(tmp_path / "real", COUNTS[0]), store(tmp_path / "synthetic", COUNTS[1], 14, "synthetic")]
    reader = SampleReader(manifests)
    yield reader
    reader.close()


def test_ids_run_through_all_data_sets(reader: SampleReader) -> None:
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(TOTAL), 3))
    for sample, data in zip(ids, reader.read(ids), strict=True):
        assert isinstance(data, np.ndarray)
        assert data.flags.writeable  # torch refuses to share memory that cannot be written
        assert data.tobytes() == content(int(sample))
    columns = reader.columns(ids)
    assert columns.key == [f"s{sample:06d}" for sample in ids]
    assert (columns.label == ids % 3).all()
    assert (reader.sizes(ids) == np.stack([10 + ids, 20 + ids], 1)).all()
    assert reader.name(15)[0].endswith("synthetic/shard-000000.tar")
    assert reader.name(15)[1] == "s000015"
    assert reader.read(np.empty(0, np.int64)) == []


def test_large_batches_are_read_by_several_threads_alike(reader: SampleReader) -> None:
    ids = np.random.default_rng(1).integers(0, TOTAL, 500)
    assert [item.tobytes() for item in reader.read(ids)] == [content(int(sample)) for sample in ids]


def test_few_files_are_open_and_none_is_pulled_away(
    reader: SampleReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 1)
    ids = np.arange(TOTAL)

    def ours() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(str(tmp_path) in str(link.readlink()) for link in links)

    with ThreadPoolExecutor(4) as pool:
        for items in pool.map(lambda seed: reader.read(np.random.default_rng(seed).permutation(ids)), range(40)):
            assert not any(isinstance(item, SampleError) for item in items)
    assert ours() == 1
    reader.close()
    assert ours() == 0


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_is_one_broken_sample(reader: SampleReader, place: str) -> None:
    columns = reader.columns(np.array([7]))
    at = (
        int(columns.offset[0])
        + {"first": 0, "middle": int(columns.size[0]) // 2, "last": int(columns.size[0]) - 1}[place]
    )
    shard = Path(reader.name(7)[0])
    whole = bytearray(shard.read_bytes())
    whole[at] ^= 1
    shard.write_bytes(whole)
    items = reader.read(np.arange(14))
    broken = [number for number, item in enumerate(items) if isinstance(item, SampleError)]
    assert broken == [7]
    error = items[7]
    assert (error.shard, error.key) == reader.name(7)
    assert "CRC-32" in error.reason
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 (our own)


def test_cut_and_missing_shards_are_broken_samples(reader: SampleReader) -> None:
    cut, missing = Path(reader.name(6)[0]), Path(reader.name(14)[0])
    os.truncate(cut, int(reader.columns(np.array([8])).offset[0]) + 10)
    missing.unlink()
    items = reader.read(np.arange(TOTAL))
    reasons = {number: item.reason for number, item in enumerate(items) if isinstance(item, SampleError)}
    assert set(reasons) == {*range(8, 14), *range(14, 18)}
    assert reasons[8].startswith("cut short: 10 of")
    assert "No such file" in reasons[14]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", False),
        (b"\xff\xd8", False),
        (b"\xff\xd8\xff\xda\x00\x04abPIXELS\xff\xd9", True),
        (b"\xff\xd8\xff\xda\x00\x04abPIXELS\xff\xd9 and what a camera appends", True),
        (b"\xff\xd8\xff\xda\x00\x04abPIX", False),
        # A thumbnail in the head has an end of its own.
        (b"\xff\xd8\xff\xe1\x00\x08\xff\xd8..\xff\xd9\xff\xda\x00\x04abPIX", False),
        (b"\xff\xd8\xff\xe1\x00\x08\xff\xd8..\xff\xd9\xff\xda\x00\x04abPIX\xff\xd9..", True),
        (b"\x89PNG whatever", True),
    ],
)
def test_a_jpeg_needs_an_end_behind_its_pixels(data: bytes, expected: bool) -> None:
    assert complete(np.frombuffer(data, np.uint8)) is expected


def test_substitutes_are_fixed_others_of_the_same_source(reader: SampleReader) -> None:
    for sample in range(TOTAL):
        source = range(14) if sample < 14 else range(14, TOTAL)
        chosen = [reader.substitute(sample, attempt) for attempt in range(1, 17)]
        assert sample not in chosen
        assert all(other in source for other in chosen)
        assert chosen == [reader.substitute(sample, attempt) for attempt in range(1, 17)]
        # A shard that is damaged as a whole does not use up all attempts.
        assert len({reader.name(other)[0] for other in chosen}) > 1


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """Column files of 40 shards are read through a room of 100 rows."""
    manifest = store(tmp_path / "many", [20] * 40, size=20)
    reader = SampleReader([open_manifest(manifest.root)])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shards.manifest.CACHED_ROWS", 100)
            reader.read(np.arange(len(manifest)))
            assert sum(map(len, reader.manifests[0]._tables.values())) <= 100
    finally:
        reader.close()
