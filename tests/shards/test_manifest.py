"""Manifests: what opens, what is refused, and what stays out of memory."""

import hashlib
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from image_folders import build_at, imagefolder, photo

from shards import manifest as module
from shards.errors import InputError
from shards.manifest import ShardEntry, format_columns, open_manifest, write_manifest


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build_at(f"imagefolder:{imagefolder(tmp_path / 'images', 9)}", tmp_path / "out", shard_samples=4)
    return tmp_path / "out"


def rewritten(path: Path, **changes: object) -> None:
    """Changes the manifest's content and its hash with it."""
    body = json.loads(path.read_text())
    del body["sha256"]
    rest = json.dumps({**body, **changes}).encode()[1:] + b"\n"
    path.write_bytes(b'{"sha256":"' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda root: (root / "manifest.json").unlink(),
            r"there is no manifest\.json; build it with `hardviews build`",
        ),
        (lambda root: (root / "manifest.json").write_bytes(b""), "damaged"),
        (lambda root: rewritten(root / "manifest.json", schema_version=7), "schema_version 7, this program reads 1"),
    ],
)
def test_what_does_not_open(built: Path, prepare, message: str) -> None:
    prepare(built)
    with pytest.raises(InputError, match=message):
        open_manifest(built)


def test_another_schema_version_whose_hash_is_another() -> None:
    with pytest.raises(InputError, match="schema_version 9"):
        module.parse_manifest(b'{"schema_version": 9, "hash": "?"}', "manifest.json")


@pytest.mark.parametrize("name", ["/etc/shard.tar", "../shard.tar", "a/../../shard.tar"])
def test_shard_names_that_lead_outside_are_refused(built: Path, name: str) -> None:
    shards = json.loads((built / "manifest.json").read_text())["shards"]
    rewritten(built / "manifest.json", shards={**shards, "name": [name, *shards["name"][1:]]})
    with pytest.raises(InputError, match="leads out of the folder"):
        open_manifest(built)


def test_missing_folder() -> None:
    with pytest.raises(InputError, match=r"/no/such: there is no manifest\.json"):
        open_manifest("/no/such")


def test_unknown_scheme() -> None:
    with pytest.raises(InputError, match="address 'what://x'"):
        open_manifest("what://x")


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_addresses(built: Path, scheme: str) -> None:
    address = f"file://{built}"
    if scheme == "memory":
        address = "memory://manifests/real"
        fsspec.filesystem("memory").put(str(built), "/manifests/real", recursive=True)
    there, here = open_manifest(address), open_manifest(built)
    assert there.shards == here.shards
    rows = np.arange(9)
    assert there.columns(rows).key == here.columns(rows).key
    assert np.array_equal(there.columns(rows).crc32, here.columns(rows).crc32)


def test_column_files_kept_in_memory_are_bounded(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_ROWS", 5)
    reads: list[str] = []

    def fetch(name: str) -> bytes:
        reads.append(name)
        return (built / name).read_bytes()

    manifest = open_manifest(built, fetch)
    for row in (0, 3, 4, 0, 8, 8):
        manifest.columns(np.array([row]))
    # Shards of 4, 4 and 1 rows: the first and the second do not fit together, the first and the third do.
    files = [f"shard-00000{number}.arrow" for number in (0, 1, 0, 2)]
    assert reads == ["manifest.json", *files]


def test_shards_without_samples_are_not_listed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.jpg").write_bytes(b"text")
    (images / "9.jpg").write_bytes(photo(1))
    manifest = build_at(f"folder:{images}", tmp_path / "out", shard_samples=1)
    assert manifest.counts.tolist() == [1]
    assert manifest.provenance["quarantined"] == 4
    before = {path.name for path in (tmp_path / "out").iterdir()}
    build_at(f"folder:{images}", tmp_path / "out", shard_samples=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_only_the_shards_asked_for_are_read(tmp_path: Path) -> None:
    arrays = {name: np.arange(3) for name in module.TYPES}
    content = format_columns(["a", "b", "c"], arrays, None, {})
    (tmp_path / "shard-000041.arrow").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    entries = [ShardEntry(f"shard-{number:06d}.tar", 3, 1536, "", digest, "") for number in range(2000)]
    write_manifest(
        tmp_path, source="real", classes=(), class_counts=(), unlabelled=6000, entries=entries, provenance={}
    )
    manifest = open_manifest(tmp_path)
    assert len(manifest) == 6000
    columns = manifest.columns(np.array([125, 123]))
    assert (columns.key, columns.shard.tolist()) == (["c", "a"], [41, 41])
    with pytest.raises(InputError, match=r"there is no shard-000000\.arrow"):
        manifest.columns(np.array([0]))
