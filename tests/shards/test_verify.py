"""verify finds a byte flipped anywhere, and names the sample where it is a sample's."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import LOCAL, build_at, imagefolder

from shards.errors import InputError
from shards.manifest import Manifest, open_manifest
from shards.verify import Damage, verify


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    build_at(f"imagefolder:{imagefolder(root / 'images', 9)}", root / "out", shard_samples=5)
    return root / "out"


def damages(folder: Path) -> list[Damage]:
    return [damage for _, found in verify(open_manifest(folder), LOCAL) for damage in found]


def owner(manifest: Manifest, file: str, offset: int) -> str:
    """Key of the sample whose image or label, with their headers, has this byte of a tar; empty for other bytes."""
    columns = manifest.shard_columns(manifest.shards.index(file))
    for row, key in enumerate(columns.key):
        start, size = int(columns.offset[row]), int(columns.size[row])
        label = start + (size + 511) // 512 * 512 + 512
        inside = (range(start - 512, start + size), range(label - 512, label + 1))
        if any(offset in part for part in inside):
            return key
    return ""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_found(built: Path, data) -> None:
    names = sorted(path.name for path in built.iterdir() if path.suffix in (".tar", ".idx", ".arrow", ".json"))
    name = data.draw(st.sampled_from(names))
    path = built / name
    content = path.read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[offset] ^= data.draw(st.integers(1, 255))
    manifest = open_manifest(built)
    path.write_bytes(flipped)
    try:
        if name == "manifest.json":
            with pytest.raises(InputError, match=r"manifest\.json: (damaged|schema_version)"):
                open_manifest(built)
        else:
            found = damages(built)
            assert found[0].file == name
            key = owner(manifest, name, offset) if name.endswith(".tar") else ""
            assert [damage.key for damage in found[1:]] == ([key] if key else [])
    finally:
        path.write_bytes(content)


def test_whole_data_sets_have_no_damage(built: Path) -> None:
    assert damages(built) == []


def test_a_shortened_tar_names_the_samples_cut_off(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "cut")
    path = tmp_path / "cut" / "shard-000000.tar"
    columns = open_manifest(built).shard_columns(0)
    path.write_bytes(path.read_bytes()[: int(columns.offset[3]) + 7])
    whole, *samples = damages(tmp_path / "cut")
    assert "bytes instead of" in whole.reason
    assert [damage.key for damage in samples] == columns.key[3:]
    assert {damage.reason for damage in samples} == {"cut off"}


def test_a_change_of_size_and_content_names_every_sample_hit(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "hit")
    columns = open_manifest(built).shard_columns(0)
    content = bytearray((built / "shard-000000.tar").read_bytes())
    for row in (1, 4):
        content[int(columns.offset[row]) + 20] ^= 1
    (tmp_path / "hit" / "shard-000000.tar").write_bytes(content)
    assert [damage.key for damage in damages(tmp_path / "hit")] == ["", columns.key[1], columns.key[4]]


@pytest.mark.parametrize("suffix", ["tar", "arrow", "idx"])
def test_a_missing_file_is_named(built: Path, tmp_path: Path, suffix: str) -> None:
    shutil.copytree(built, tmp_path / "gap")
    (tmp_path / "gap" / f"shard-000001.{suffix}").unlink()
    assert damages(tmp_path / "gap") == [Damage(f"shard-000001.{suffix}", "", "missing")]


def test_a_damaged_column_file_is_not_read(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "columns")
    path = tmp_path / "columns" / "shard-000001.arrow"
    path.write_bytes(path.read_bytes()[::-1])
    manifest = open_manifest(tmp_path / "columns")
    assert len(manifest.columns(np.arange(5))) == 5
    with pytest.raises(InputError, match=r"shard-000001\.arrow: damaged .*hardviews verify"):
        manifest.columns(np.array([5]))


def test_data_sets_behind_an_address(built: Path) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(built), "/verified", recursive=True)
    columns = open_manifest(built).shard_columns(1)
    content = bytearray(system.cat_file("/verified/shard-000001.tar"))
    content[int(columns.offset[2])] ^= 1
    system.pipe_file("/verified/shard-000001.tar", bytes(content))
    found = [damage for _, some in verify(open_manifest("memory://verified"), LOCAL) for damage in some]
    assert [(damage.file, damage.key) for damage in found] == [
        ("shard-000001.tar", ""),
        ("shard-000001.tar", columns.key[2]),
    ]
