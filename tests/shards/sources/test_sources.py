"""Sources: every kind, local and behind an address, and what is wrong with their content."""

import itertools
import json
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import CLASSES, LOCAL, build_at, imagefolder, photo, tar_names, write_tar
from object_store import Store, environment, object_store
from stored_samples import labelled

from shards.errors import InputError
from shards.index import index
from shards.sources.base import Options, Record
from shards.sources.containers import Container, steadily
from shards.sources.folders import fetch_many
from shards.sources.kinds import open_source
from shards.writer import sample_key

NAMES = {"tars": "part-{}.tar", "parquet": "part-{}.parquet"}


def write_parquet(path: Path, seeds: range, **options) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": photo(seed), "path": f"{seed}.jpg"} for seed in seeds], struct)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    table = pa.table({"id": list(seeds), "image": images, "label": pa.array([seed % 3 for seed in seeds], pa.int64())})
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(notes), path, **options)


@pytest.fixture(params=["imagefolder", "folder", "tars", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A kind, and a folder with 11 images of that kind; image i is photo(i), of class i % 3."""
    root = tmp_path / "source"
    root.mkdir()
    kind = request.param
    if kind in ("imagefolder", "folder"):
        for name in CLASSES:
            (root / name).mkdir()
        for seed in range(11):
            (root / CLASSES[seed % 3] / f"{seed:02d}.jpg").write_bytes(photo(seed))
    for number, seeds in enumerate((range(7), range(7, 11))):
        path = root / NAMES.get(kind, "").format(number)
        if kind == "tars":
            members = [(f"{seed:02d}.{ext}", data) for seed in seeds for ext, data in sample(seed)]
            write_tar(path, members)
        elif kind == "parquet":
            write_parquet(path, seeds, row_group_size=3)
    return kind, root


def sample(seed: int) -> list[tuple[str, bytes]]:
    return [("cls", b"%d\n" % (seed % 3)), ("jpg", photo(seed)), ("txt", b"a caption")]


@pytest.mark.parametrize("where", ["local", "file", "memory"])
def test_all_images_of_a_source_arrive(source: tuple[str, Path], tmp_path: Path, where: str) -> None:
    kind, root = source
    address = {"local": str(root), "file": f"file://{root}", "memory": f"memory://sources{root}"}[where]
    if where == "memory":
        fsspec.filesystem("memory").put(str(root), f"/sources{root}", recursive=True)
    manifest = build_at(f"{kind}:{address}", tmp_path / "out", shard_samples=4)
    labels = {photo(seed): -1 if kind == "folder" else seed % 3 for seed in range(11)}
    found = labelled(manifest, tmp_path / "out")
    assert found == labels
    assert manifest.counts.tolist() == [4, 4, 3]
    assert manifest.classes == {"tars": ("0", "1", "2"), "folder": ()}.get(kind, CLASSES)
    if kind in NAMES:
        assert list(found) == list(labels)  # their own order
    again = build_at(f"{kind}:{root}", tmp_path / "again", shard_samples=4)
    assert [entry.sha256 for entry in again.entries] == [entry.sha256 for entry in manifest.entries]


@pytest.fixture(scope="module")
def service():
    """An S3 service behind a proxy that spoils answers."""
    with object_store() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.port).items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield running
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize("source", ["imagefolder", "tars", "parquet"], indirect=True)
def test_faults_of_a_network_change_nothing(source: tuple[str, Path], tmp_path: Path, service: Store) -> None:
    kind, root = source
    service.faults(lambda _: "")
    for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
        prefix = f"{kind}/{folder.relative_to(root)}".removesuffix("/.")
        for path in folder.glob("*.*"):
            fsspec.filesystem("s3").pipe_file(f"data/{prefix}/{path.name}", path.read_bytes())
    fsspec.filesystem("s3").invalidate_cache()
    faults = itertools.cycle(["cut", "", "short", "", "error", ""])
    service.faults(lambda path: "" if "list-type" in path else next(faults))
    remote = build_at(f"{kind}:s3://data/{kind}", tmp_path / "remote", shard_samples=4)
    assert all(service.requests(f"{fault}$") for fault in ("cut", "short", "error"))
    local = build_at(f"{kind}:{root}", tmp_path / "local", shard_samples=4)
    assert [entry.sha256 for entry in remote.entries] == [entry.sha256 for entry in local.entries]
    assert (tmp_path / "remote" / "quarantine.jsonl").read_bytes() == b""


@pytest.mark.parametrize("kind", NAMES)
def test_single_files_and_patterns(kind: str, tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / NAMES[kind].format(number)
        if kind == "tars":
            write_tar(path, [(f"{number}.jpg", photo(number))])
        else:
            write_parquet(path, range(number, number + 1))
    one = build_at(f"{kind}:{tmp_path / NAMES[kind].format(1)}", tmp_path / "one")
    assert list(labelled(one, tmp_path / "one")) == [photo(1)]
    some = build_at(f"{kind}:{tmp_path / NAMES[kind].format('?')}", tmp_path / "some")
    assert len(some) == 3


def test_a_file_more_leaves_the_others_order(tmp_path: Path) -> None:
    images = imagefolder(tmp_path / "images", 9)

    def order() -> list[str]:
        return [
            record.name
            for part in open_source(f"folder:{images}", Options(4), LOCAL).parts
            for record in part.records()
        ]

    before = order()
    (images / "bee" / "new.jpg").write_bytes(photo(77))
    after = order()
    assert [name for name in after if name != "bee/new.jpg"] == before
    assert before != sorted(before)


def test_hidden_files_links_in_circles_and_empty_classes(tmp_path: Path) -> None:
    images = imagefolder(tmp_path / "images", 3)
    (images / ".cache").mkdir()
    (images / ".cache" / "thumb.jpg").write_bytes(photo(50))
    (images / "ant" / ".hidden.jpg").write_bytes(photo(51))
    (images / "ant" / "deep").mkdir()
    (images / "ant" / "deep" / "img.jpg").write_bytes(photo(52))
    (images / "ant" / "deep" / "circle").symlink_to(images / "ant")
    (images / "aardvark").mkdir()
    (images / "top.jpg").write_bytes(photo(53))
    manifest = build_at(f"imagefolder:{images}", tmp_path / "out")
    assert manifest.classes == ("aardvark", *CLASSES)
    assert manifest.class_counts.tolist() == [0, 2, 1, 1]
    assert manifest.unlabelled == 1


def test_named_pipes_are_named_and_not_waited_for(tmp_path: Path) -> None:
    images = imagefolder(tmp_path / "images", 3)
    os.mkfifo(images / "ant" / "pipe.jpg")
    manifest = build_at(f"imagefolder:{images}", tmp_path / "out")
    assert len(manifest) == 3
    left_out = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert left_out["origin"] == "ant/pipe.jpg" and "named pipe" in left_out["reason"]
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(InputError, match=r"pipe\.tar: no regular file"):
        open_source(f"tars:{tmp_path}", Options(10), LOCAL)


@pytest.mark.parametrize("keep_order", [False, True])
def test_names_that_are_no_utf8_are_taken_or_named(tmp_path: Path, keep_order: bool) -> None:
    images = imagefolder(tmp_path / "images", 3)
    for name, content in ((b"caf\xe9.jpg", photo(7)), (b"bad\xe9.jpg", b"no image")):
        (images / "ant" / os.fsdecode(name)).write_bytes(content)
    manifest = build_at(f"imagefolder:{images}", tmp_path / "out", keep_order=keep_order)
    assert photo(7) in labelled(manifest, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["origin"] == os.fsdecode(b"ant/bad\xe9.jpg")
    (images / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(InputError, match=r"the name of class .* is no UTF-8; rename the folder"):
        open_source(f"imagefolder:{images}", Options(10), LOCAL)


def test_odd_tars(tmp_path: Path) -> None:
    """Names that lead outside, samples without image, labels that are none, a tar that ends too early."""
    write_tar(
        tmp_path / "a.tar",
        [
            ("../../../tmp/outside.jpg", photo(0)),
            ("/etc/absolute.jpg", photo(1)),
            ("caption.txt", b"no image"),
            ("bad.cls", b"cat"),
            ("bad.jpg", photo(2)),
            (".hidden.jpg", photo(3)),
            ("x" * 150 + " y.seg.jpg", photo(4)),
        ],
    )
    write_tar(tmp_path / "b.tar", [("first.jpg", photo(5)), ("second.jpg", photo(6, side=60))])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:4000])
    (tmp_path / "c.tar").write_bytes(whole[:512] + b"\xff" * 3000)
    out = tmp_path / "out"
    manifest = build_at(f"tars:{tmp_path}", out)
    assert list(labelled(manifest, out)) == [photo(seed) for seed in (0, 1, 2, 4, 5)]
    assert (manifest.classes, manifest.unlabelled) == (("cat",), 4)
    names = tar_names(out / manifest.shards[0])
    assert names[:2] == ["000000000-outside.jpg", "000000001-absolute.jpg"]
    assert all("/" not in name and len(name) < 80 and name.isascii() for name in names)
    reasons = [json.loads(line)["reason"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert "no image among its files (txt)" in reasons[0]
    assert "the tar ends inside this image" in reasons
    assert sum("the tar is damaged here" in reason for reason in reasons) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "c.tar", "out"]


def test_odd_parquet(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": photo(0), "path": None}, {"bytes": None, "path": "/etc/passwd"}, None]
    pq.write_table(pa.table({"img": pa.array(rows, struct)}), tmp_path / "a.parquet")
    manifest = build_at(f"parquet:{tmp_path}", tmp_path / "out")
    assert list(labelled(manifest, tmp_path / "out").items()) == [(photo(0), -1)]
    assert manifest.provenance["quarantined"] == 2


def test_plain_binary_column(tmp_path: Path) -> None:
    table = pa.table({"name": ["a"], "jpeg": pa.array([photo(0)], pa.binary()), "label": [2]})
    pq.write_table(table, tmp_path / "a.parquet")
    manifest = build_at(f"parquet:{tmp_path}", tmp_path / "out")
    assert labelled(manifest, tmp_path / "out") == {photo(0): 2}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("photos", "'photos': a source is KIND:PATH, and the kinds are imagefolder, folder, tars"),
        ("zip:photos", "a source is KIND:PATH"),
        ("imagefolder:", "a source is KIND:PATH"),
        ("imagefolder:{}/missing", "there is no such folder"),
        ("imagefolder:{}/flat", "no class folders in it; pass folder:"),
        ("folder:{}/empty", "there are no files in it"),
        ("folder:memory://nothing/here", "there is nothing there"),
        ("tars:{}/empty", r"there are no \.tar files there"),
        ("tars:{}/missing", r"there are no \.tar files there"),
        ("parquet:{}/flat", r"there are no \.parquet files there"),
        ("parquet:{}/text/a.parquet", "no Parquet file"),
        ("parquet:{}/numbers", "no column with encoded images .* among id"),
        ("tars:what://x", "address 'what://x"),
    ],
)
def test_wrong_addresses(tmp_path: Path, address: str, message: str) -> None:
    for name in ("flat", "empty", "text", "numbers"):
        (tmp_path / name).mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(photo(0))
    (tmp_path / "text" / "a.parquet").write_bytes(b"text")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "numbers" / "a.parquet")
    with pytest.raises(InputError, match=message):
        open_source(address.format(tmp_path), Options(10), LOCAL)


class Flaky:
    """A file system whose first answers are failures."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def cat_ranges(self, paths: list[str], start: None, end: None, on_error: str) -> list[bytes | Exception]:
        self.failures -= 1
        fails = self.failures >= 0
        return [FileNotFoundError() if path == "gone" else OSError("cut") if fails else b"x" for path in paths]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.Event.wait", lambda event, seconds: False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_pauses")
def test_failed_answers_are_asked_for_again() -> None:
    assert fetch_many(Flaky(2), {"a": 1, "gone": 1}) == {"a": b"x", "gone": None}
    with pytest.raises(OSError, match="cut"):
        fetch_many(Flaky(99), {"a": 1})
    with pytest.raises(OSError, match="a: 1 bytes came instead of 2"):
        fetch_many(Flaky(0), {"a": 2})


@pytest.mark.usefixtures("no_pauses")
def test_a_cut_connection_goes_on_behind_the_last_image() -> None:
    starts = []

    def read(container: Container, start: int, stop: int):
        starts.append(start)
        for number in range(start, stop):
            if number == start + 2:
                raise OSError("cut")
            yield Record(str(number), -1, b"x")

    remote = Container("memory://bucket", "a.tar", 1)
    assert [record.name for record in steadily(read, remote, 3, 8)] == ["3", "4", "5", "6", "7"]
    assert starts == [3, 5, 7]
    with pytest.raises(OSError, match="cut"):
        list(steadily(read, Container("/disk", "a.tar", 1), 3, 8))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01/img_1.v2.JPEG", "000000007-img_1"),
        ("../../evil.jpg", "000000007-evil"),
        ("ünï cödé!.png", "000000007-n_c_d"),
        ("...", "000000007"),
        ("x" * 300, "000000007-" + "x" * 60),
    ],
)
def test_keys_are_safe_names(name: str, key: str) -> None:
    assert sample_key(7, name) == key


SYSTEM = ("__MACOSX/ant/._a.jpg", "__MACOSX/b.jpg", "ant/._b.jpg", "@eaDir/ant/c.jpg", "ant/@eaDir/d.jpg/e.jpg",
          "ant/.ipynb_checkpoints/f.jpg", ".Trash/g.jpg", "ant/Thumbs.db", "desktop.ini")  # fmt: skip


@pytest.mark.parametrize("kind", ["imagefolder", "folder", "tars", "parquet"])
@pytest.mark.parametrize("where", ["local", "remote"])
def test_what_systems_leave_behind_is_no_data(tmp_path: Path, kind: str, where: str) -> None:
    images = imagefolder(tmp_path / "images", 6)
    for number, name in enumerate(SYSTEM):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(photo(60 + number))
    root = tmp_path / "source"
    root.mkdir()
    if kind == "tars":
        paths = sorted(path for path in images.rglob("*") if path.is_file())
        write_tar(root / "a.tar", [(f"./{path.relative_to(images)}", path.read_bytes()) for path in paths])
    elif kind == "parquet":
        table = pa.table({"image": [photo(i, "PNG" if i % 5 == 4 else "JPEG") for i in range(6)]})
        pq.write_table(table, root / "a.parquet")
    else:
        root = images
    (root / "@eaDir").mkdir(exist_ok=True)
    for name in ("._a", "@eaDir/a"):  # what stands beside containers
        (root / f"{name}.{'tar' if kind == 'tars' else 'parquet'}").write_bytes(b"\0\5\x16\7")
    path = str(root)
    if where == "remote":
        path = f"memory://{tmp_path.name}-{kind}"
        fsspec.filesystem("memory").put(f"{root}/", path, recursive=True)
    manifest = build_at(f"{kind}:{path}", tmp_path / "out")
    expected = {photo(i, "PNG" if i % 5 == 4 else "JPEG") for i in range(6)}
    assert set(labelled(manifest, tmp_path / "out")) == expected
    assert manifest.classes == (CLASSES if kind == "imagefolder" else ())
    assert (tmp_path / "out" / "quarantine.jsonl").read_text() == ""
    if kind == "tars" and where == "local":
        assert len(index(root, "real", LOCAL)) == 6


@pytest.mark.parametrize("folder", ["what?", "set [2024]", "run::1", "a*b", "{a,b}", "100 %20"])
def test_signs_of_patterns_are_parts_of_a_local_name(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder
    root.mkdir()
    for number, name in enumerate(("a[1]", "b?")):
        write_tar(root / f"{name}.tar", [(f"{number}.jpg", photo(number))])
    (tmp_path / "whatX").mkdir()
    write_tar(tmp_path / "whatX" / "c.tar", [("c.jpg", photo(2))])
    (root / "images" / "ant").mkdir(parents=True)
    for number, name in enumerate(("a[1].jpg", "b?.jpg")):
        (root / "images" / "ant" / name).write_bytes(photo(number))
    both, one = {photo(0), photo(1)}, {photo(0)}
    sources = {"tars:": both, "tars:/*.tar": both, "tars:/a[1].tar": one, "tars:/?[1].tar": one,
               "imagefolder:/images": both, "folder:/images/ant": both}  # fmt: skip
    for number, (source, expected) in enumerate(sources.items()):
        kind, _, rest = source.partition(":")
        manifest = build_at(f"{kind}:{root}{rest}", tmp_path / f"out{number}")
        assert set(labelled(manifest, tmp_path / f"out{number}")) == expected


def test_objects_with_brackets_markers_of_folders_and_a_missing_bucket(tmp_path: Path, service: Store) -> None:
    service.faults(lambda _: "")
    store = fsspec.filesystem("s3")
    for number, key in enumerate(("IMG[1].jpg", "b?.jpg", "c*.jpg", "d.jpg")):
        store.pipe_file(f"data/odd/ant/{key}", photo(number))
    for marker in ("odd/", "odd/ant/", "odd/empty/"):
        store.call_s3("put_object", Bucket="data", Key=marker, Body=b"")
    write_tar(tmp_path / "set.tar", [("a.jpg", photo(5))])
    store.pipe_file("data/odd-tars/set[1].tar", (tmp_path / "set.tar").read_bytes())
    store.invalidate_cache()
    manifest = build_at("imagefolder:s3://data/odd", tmp_path / "out")
    assert set(labelled(manifest, tmp_path / "out")) == {photo(number) for number in range(4)}
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""
    for number, name in enumerate(("", "/set[1].tar", "/*.tar")):
        assert len(build_at(f"tars:s3://data/odd-tars{name}", tmp_path / f"tars{number}")) == 1
    for kind in ("imagefolder", "folder", "tars", "parquet"):
        with pytest.raises(InputError, match=r"nobucket/images: .*; (check|name)"):
            open_source(f"{kind}:s3://nobucket/images", Options(10), LOCAL)
