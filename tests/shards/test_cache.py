"""Shards in an object store: whole or not there, fetched once, in bounded room, whatever the network does."""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from object_store import Store, environment, object_store
from stored_samples import content, store

from shards import cache as module
from shards.cache import FetchAhead, ShardCache
from shards.errors import InputError
from shards.manifest import Manifest, open_manifest
from shards.order import SampleOrder
from shards.reader import SampleError, SampleReader
from shards.retry import retry

COUNTS = [6, 9, 4, 7, 8, 6]
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    """The store with one data set in it, and its manifest as the store gives it."""
    with object_store() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.port).items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        root = tmp_path_factory.mktemp("origin") / "shards"
        store(root, COUNTS)
        running.put(root, "shards")
        yield running
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def remote(service: Store) -> Manifest:
    service.faults(lambda _: "")
    return open_manifest("s3://data/shards")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    monkeypatch.setattr(module, "PART", 4000)  # several parts a shard
    return ShardCache(tmp_path / "cache", pause=0.01)


def check_folder(folder: Path) -> list[Path]:
    """Every copy has the content that its name says; nothing else is left."""
    copies = sorted(folder.iterdir())
    for path in copies:
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".tar"
    return copies


def test_bytes_from_the_store_are_the_written_ones(remote: Manifest, cache: ShardCache, service: Store) -> None:
    reader = SampleReader([remote], cache)
    ids = np.random.default_rng(0).permutation(TOTAL)
    for _ in range(2):
        assert [item.tobytes() for item in reader.read(ids)] == [content(int(n)) for n in ids]
    reader.close()
    assert len(check_folder(cache.folder)) == len(COUNTS)
    parts = [-(-entry.size // 4000) for entry in remote.entries]
    assert len(service.requests(r"GET .*\.tar")) == sum(parts)


@pytest.mark.parametrize("fault", ["cut", "short", "error"])
def test_faults_of_the_network_never_reach_the_reader(
    fault: str, remote: Manifest, cache: ShardCache, service: Store
) -> None:
    """Every third answer is spoiled, those for column files too."""
    turn = itertools.count()
    service.faults(lambda path: fault if next(turn) % 3 == 1 and (fault != "short" or ".tar" in path) else "")
    reader = SampleReader([open_manifest(remote.root)], cache)
    items = reader.read(np.arange(TOTAL))
    assert [item.tobytes() for item in items] == [content(n) for n in range(TOTAL)]
    assert len(service.requests(f"{fault}$")) > len(COUNTS)
    reader.close()
    check_folder(cache.folder)


def test_a_flipped_byte_is_fetched_again(remote: Manifest, cache: ShardCache, service: Store) -> None:
    turn = itertools.count()
    service.faults(lambda _: "flip" if next(turn) == 1 else "")
    assert hashlib.sha256(cache.locate(remote, 0).read_bytes()).hexdigest() == remote.entries[0].sha256
    assert len(service.requests("flip$")) == 1
    assert len(service.requests()) == 2 * -(-remote.entries[0].size // 4000)


def test_a_store_that_does_not_answer_ends_the_run(remote: Manifest, tmp_path: Path, service: Store) -> None:
    """Substitutes would make the run depend on the network's mood."""
    reader = SampleReader([remote], ShardCache(tmp_path / "cache", attempts=2, pause=0.01))
    reader.columns(np.arange(TOTAL))
    service.faults(lambda _: "error")
    with pytest.raises(InputError, match=r"s3://data/shards/shard-00000\d.tar: cannot be fetched"):
        reader.read(np.arange(TOTAL))
    reader.close()
    assert check_folder(tmp_path / "cache") == []


def test_what_is_damaged_in_the_store_is_broken_samples(tmp_path: Path, service: Store) -> None:
    service.faults(lambda _: "")
    root = tmp_path / "damaged"
    local = store(root, [3, 4, 5, 2])
    flipped, cut, missing = (root / local.entries[shard].name for shard in (0, 1, 3))
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x01")
    os.truncate(cut, cut.stat().st_size // 2)
    missing.unlink()
    remote = open_manifest(service.put(root, "damaged"))
    reader = SampleReader([remote], ShardCache(tmp_path / "cache", attempts=2, pause=0.01))
    for _ in range(2):
        items = reader.read(np.arange(14))
        broken = {number: item.reason for number, item in enumerate(items) if isinstance(item, SampleError)}
        assert set(broken) == {*range(7), 12, 13}
        assert "hash" in broken[0]
        assert "cut short" in broken[3]
    assert len(service.requests("GET .*shard-000000.tar")) == 2  # damage is not fetched again and again
    reader.close()
    assert len(check_folder(tmp_path / "cache")) == 1


def test_the_cache_keeps_to_its_limit_and_drops_the_oldest(remote: Manifest, tmp_path: Path) -> None:
    sizes = [entry.size for entry in remote.entries]
    cache = ShardCache(tmp_path / "cache", limit=sizes[0] + sizes[1] + max(sizes))
    reader = SampleReader([remote], cache)
    starts = remote.starts
    for shard in (0, 1, 0, 2, 3, 0, 4, 5):
        assert reader.read(starts[shard : shard + 1])[0].tobytes() == content(int(starts[shard]))
        time.sleep(0.01)  # file times tick slowly
        assert sum(path.stat().st_size for path in check_folder(cache.folder)) <= cache.limit
    reader.close()
    small = ShardCache(tmp_path / "small", limit=1)
    assert small.locate(remote, 0).stat().st_size == sizes[0]
    assert small.locate(remote, 1).stat().st_size == sizes[1]
    assert len(check_folder(small.folder)) == 1


def test_readers_that_share_a_folder_fetch_each_shard_once(remote: Manifest, tmp_path: Path, service: Store) -> None:
    caches = [ShardCache(tmp_path / "cache") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda cache: [cache.locate(remote, s) for s in range(len(COUNTS))], caches))
    assert all(path == paths[0] for path in paths)
    assert len(service.requests(r"GET .*\.tar")) == len(COUNTS)
    assert len(check_folder(tmp_path / "cache")) == len(COUNTS)


def test_shards_are_fetched_before_they_are_needed_and_once(
    remote: Manifest, cache: ShardCache, service: Store
) -> None:
    order = SampleOrder([remote.counts], [1.0], seed=3, block=1)
    reader = SampleReader([remote], cache)
    reader.follow(order, 0)
    first = [shard for _, shard in itertools.islice(order.shards(0), 2)]
    deadline = time.monotonic() + 20
    wanted = {f"{remote.entries[shard].sha256}.tar" for shard in first}
    while time.monotonic() < deadline and not wanted <= {path.name for path in cache.folder.glob("*.tar")}:
        time.sleep(0.02)
    assert {path.name for path in cache.folder.glob("*.tar")} == wanted  # these two blocks, and no more
    ids = np.concatenate([order.at(position, 5).ids for position in range(0, TOTAL, 5)])
    items = [item for start in range(0, TOTAL, 5) for item in reader.read(order.at(start, 5).ids)]
    assert [item.tobytes() for item in items] == [content(int(n)) for n in ids]
    reader.close()
    names = {request.split("/")[3].split("?")[0].split()[0] for request in service.requests(r"GET .*\.tar")}
    parts = sum(-(-entry.size // 4000) for entry in remote.entries)
    assert len(service.requests(r"GET .*\.tar")) == parts
    assert len(names) == len(COUNTS)


def test_what_is_ahead_is_bounded_in_shards_and_bytes() -> None:
    fetched = []

    def ahead(shards: int, limit: int) -> FetchAhead:
        fetched.clear()
        upcoming = ((0, shard) for shard in itertools.count())
        return FetchAhead(
            upcoming, lambda _, shard: fetched.append(shard), lambda *_: 10, ahead=shards, limit=limit, threads=1
        )

    one = ahead(4, 1000)
    one.used(0, 2)  # 0 and 1 were passed over
    one.used(0, 99)  # foretold by nobody: a substitute
    time.sleep(0.05)
    one.close()
    assert fetched == [0, 1, 2, 3, 4, 5, 6]
    two = ahead(100, 25)
    time.sleep(0.05)
    two.close()
    assert fetched == [0, 1, 2]


def test_retries_end_for_what_no_retry_mends() -> None:
    calls = []

    def fails(error: Exception) -> None:
        calls.append(error)
        raise error

    for error, times in ((FileNotFoundError(), 1), (PermissionError(), 1), (OSError(), 3), (ValueError(), 3)):
        calls.clear()
        with pytest.raises(type(error)):
            retry(lambda error=error: fails(error), attempts=3, pause=0)
        assert len(calls) == times
    ended = threading.Event()
    ended.set()
    calls.clear()
    with pytest.raises(OSError):
        retry(lambda: fails(OSError()), ended=ended)
    assert len(calls) == 1


READ = """
import sys
import numpy as np
from shards.cache import ShardCache
from shards.manifest import open_manifest
from shards.reader import SampleReader

manifest = open_manifest("s3://data/shards")
smallest = sorted(entry.size for entry in manifest.entries)
reader = SampleReader([manifest], ShardCache(sys.argv[1], limit=sum(smallest) // 2, pause=0.01))
print("ready", flush=True)
draw = np.random.default_rng(int(sys.argv[2]))
while True:
    reader.read(draw.integers(0, len(manifest), 3))
"""


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_readers_leave_nothing_torn(service: Store, tmp_path: Path, kills: int) -> None:
    turn = itertools.count()
    service.faults(lambda _: ["", "", "", "cut"][next(turn) % 4])
    folder, draw = tmp_path / "cache", random.Random(kills)
    caught = 0
    for number in range(kills):
        command = [sys.executable, "-c", READ, str(folder), str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environment(service.port)) as process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
        for path in folder.glob("*.tar"):
            assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".tar"
        caught += any(folder.glob(".*.partial"))
    service.faults(lambda _: "")
    manifest = open_manifest("s3://data/shards")
    reader = SampleReader([manifest], ShardCache(folder))
    assert [item.tobytes() for item in reader.read(np.arange(TOTAL))] == [content(n) for n in range(TOTAL)]
    reader.close()
    check_folder(folder)  # nothing is left of what was being fetched
    print(f"{kills} kills, {caught} of them in the middle of a fetch")
