"""Building: what is written, how it is read by others, that it is the same however it was made, and what it refuses."""

import gc
import hashlib
import io
import json
import resource
import signal
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from image_folders import CLASSES, LOCAL, build_at, contents, imagefolder, photo, tar_names
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from wds2idx import IndexCreator

from shards.engines import run_tasks
from shards.errors import InputError
from shards.images import Rules
from shards.manifest import open_manifest
from shards.sources.tars import parse_label
from shards.writer import Sample, finish, finished, output_folder, sample_key, shard_name, write_shard


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagefolder(tmp_path_factory.mktemp("images"), 23)


@pytest.fixture(scope="module")
def built(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build_at(f"imagefolder:{images}", out, shard_samples=10)
    return out


def test_manifest_and_columns_describe_the_tars(images: Path, built: Path) -> None:
    manifest = open_manifest(built)
    assert manifest.shards == tuple(shard_name(number) for number in range(3))
    assert manifest.counts.tolist() == [10, 10, 3]
    assert (manifest.source, manifest.classes) == ("real", CLASSES)
    assert manifest.class_counts.tolist() == [8, 8, 7]
    assert manifest.unlabelled == 0
    columns = manifest.columns(np.arange(len(manifest)))
    originals = {path.read_bytes(): path for path in images.rglob("*.*") if path.is_file()}
    assert len(originals) == 23
    for row in range(23):
        tar = (built / manifest.shards[columns.shard[row]]).read_bytes()
        content = tar[columns.offset[row] : columns.offset[row] + columns.size[row]]
        original = originals.pop(content)
        assert zlib.crc32(content) == columns.crc32[row]
        assert Image.open(io.BytesIO(content)).size == (columns.width[row], columns.height[row])
        assert CLASSES[columns.label[row]] == original.parent.name
        assert columns.key[row] == f"{row:09d}-img"
    for entry in manifest.entries:
        assert hashlib.sha256((built / entry.name).read_bytes()).hexdigest() == entry.sha256


def test_rows_come_in_the_order_asked_for(built: Path) -> None:
    manifest = open_manifest(built)
    everything = manifest.columns(np.arange(23))
    rows = np.array([22, 0, 11, 10, 9, 0])
    some = manifest.columns(rows)
    assert some.key == [everything.key[row] for row in rows]
    for field in ("shard", "offset", "size", "height", "width", "label", "crc32"):
        assert np.array_equal(getattr(some, field), getattr(everything, field)[rows])
    with pytest.raises(IndexError):
        manifest.columns(np.array([23]))


def test_every_shard_holds_several_classes(images: Path, built: Path, tmp_path: Path) -> None:
    spread = open_manifest(built)
    assert len(set(spread.shard_columns(0).label)) == 3
    kept = build_at(f"imagefolder:{images}", tmp_path / "kept", shard_samples=8, keep_order=True)
    assert [sorted(set(kept.shard_columns(shard).label)) for shard in range(3)] == [[0], [1], [2]]


def test_webdataset_and_dali_read_the_same_bytes_in_order(built: Path) -> None:
    manifest = open_manifest(built)
    columns = manifest.columns(np.arange(len(manifest)))
    paths = [str(built / name) for name in manifest.shards]

    with warnings.catch_warnings(action="ignore"):  # webdataset leaves the tars for the collector to close
        samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == columns.key
    images = [next(sample[kind] for kind in ("jpg", "png") if kind in sample) for sample in samples]
    assert [zlib.crc32(image) for image in images] == columns.crc32.tolist()
    assert [int(sample["cls"]) for sample in samples] == columns.label.tolist()

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reading():
        return tuple(
            fn.readers.webdataset(
                paths=paths, index_paths=[path.replace(".tar", ".idx") for path in paths], ext=["jpg;png", "cls"]
            )
        )

    pipeline = reading()
    pipeline.build()
    for row in range(len(manifest)):
        image, label = (np.asarray(output[0]) for output in pipeline.run())
        assert image.tobytes() == images[row]
        assert int(label.tobytes()) == columns.label[row]


def test_the_index_is_that_of_dalis_own_tool(built: Path, tmp_path: Path) -> None:
    for name in open_manifest(built).shards:
        made = tmp_path / "own.idx"
        with IndexCreator(str(built / name), str(made), verbose=False) as creator:
            creator.create_index()
        assert (built / name.replace(".tar", ".idx")).read_bytes() == made.read_bytes()


ENGINES = {"1 worker": LOCAL, "3 workers": partial(run_tasks, "local", workers=3)}


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_bytes_whatever_the_workers(images: Path, built: Path, tmp_path: Path, name: str) -> None:
    build_at(f"imagefolder:{images}", tmp_path / "out", run=ENGINES[name], shard_samples=10)
    assert contents(tmp_path / "out") == contents(built)


@pytest.mark.filterwarnings("ignore")  # Ray's own, on import and at its shutdown
def test_the_same_bytes_on_ray(images: Path, built: Path, tmp_path: Path) -> None:
    import ray

    run = partial(run_tasks, "ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        build_at(f"imagefolder:{images}", tmp_path / "out", run=run, shard_samples=10)
        assert contents(tmp_path / "out") == contents(built)
        with pytest.raises(AttributeError, match="strip"):
            list(run(parse_label, [b"1", None]))
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_is_started_where_no_cluster_is_named(images: Path, built: Path, tmp_path: Path) -> None:
    build_at(f"imagefolder:{images}", tmp_path / "out", run=partial(run_tasks, "ray", workers=1), shard_samples=10)
    assert contents(tmp_path / "out") == contents(built)


def test_a_rerun_writes_nothing_and_a_gap_is_filled(images: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_at(f"imagefolder:{images}", out, shard_samples=10)
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    (out / "shard-000001.arrow").unlink()
    (out / ".shard-000002.tar.77.partial").write_bytes(b"half")
    build_at(f"imagefolder:{images}", out, shard_samples=10)
    assert contents(out) == contents(built)
    for path in out.glob("shard-*"):
        assert (path.stat().st_mtime_ns == first[path.name]) == ("000001" not in path.name)


@pytest.mark.parametrize("damage", ["tar cut", "tar gone", "index gone", "columns cut", "columns nonsense"])
def test_a_damaged_shard_is_written_again(images: Path, built: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    build_at(f"imagefolder:{images}", out, shard_samples=10)
    kind, what = damage.split()
    path = out / f"shard-000001.{ {'tar': 'tar', 'index': 'idx', 'columns': 'arrow'}[kind] }"
    if what == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-600] if what == "cut" else b"nonsense")
    build_at(f"imagefolder:{images}", out, shard_samples=10)
    assert contents(out) == contents(built)


def test_other_settings_are_refused_or_written_anew(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_at(f"imagefolder:{images}", out, shard_samples=8)
    before = contents(out)
    with pytest.raises(InputError, match="was written with quality None, not 50; pass --overwrite"):
        build_at(f"imagefolder:{images}", out, shard_samples=8, rules=Rules(quality=50))
    with pytest.raises(InputError, match="shard_samples 8, not 12; pass --overwrite"):
        build_at(f"imagefolder:{images}", out, shard_samples=12)
    assert contents(out) == before
    build_at(f"imagefolder:{images}", out, shard_samples=12, overwrite=True)
    build_at(f"imagefolder:{images}", tmp_path / "new", shard_samples=12)
    assert contents(out) == contents(tmp_path / "new")


def test_another_list_of_images_is_refused(tmp_path: Path) -> None:
    images = imagefolder(tmp_path / "images", 6)
    build_at(f"folder:{images}", tmp_path / "out")
    (images / "ant" / "new.jpg").write_bytes(photo(99))
    with pytest.raises(InputError, match="was written with another list of images"):
        build_at(f"folder:{images}", tmp_path / "out")


def test_bad_images_are_left_out_listed_and_counted(tmp_path: Path) -> None:
    images = imagefolder(tmp_path / "images", 12)
    (images / "ant" / "cut.jpg").write_bytes(photo(50)[:200])
    (images / "bee" / "empty.png").write_bytes(b"")
    (images / "cow" / "notes.txt").write_bytes(b"not an image")
    (images / "cow" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (images / "cow" / "wrong.jpg").write_bytes(photo(51, "PNG"))
    manifest = build_at(f"imagefolder:{images}", tmp_path / "out", shard_samples=5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["origin"]: line["reason"] for line in lines}
    assert set(reasons) == {"ant/cut.jpg", "bee/empty.png", "cow/notes.txt", "cow/gone.jpg"}
    assert reasons["bee/empty.png"] == "zero bytes"
    assert "No such file" in reasons["cow/gone.jpg"]
    assert all(line["key"].startswith("0000000") for line in lines)
    assert len(manifest) == 13
    assert manifest.provenance["quarantined"] == 4
    names = [name for shard in manifest.shards for name in tar_names(tmp_path / "out" / shard)]
    assert any(name.endswith("-wrong.png") for name in names)


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.jpg").write_bytes(b"text")
    with pytest.raises(InputError, match=r"none of 1 images can be read; the reasons are in .*quarantine\.jsonl"):
        build_at(f"folder:{tmp_path / 'images'}", tmp_path / "out")


@pytest.mark.parametrize(
    ("rules", "shard_samples", "message"),
    [
        (Rules(), 0, "--shard-samples 0"),
        (Rules(resize_short=0), 1, "--resize-short 0"),
        (Rules(quality=101), 1, "--quality 101"),
        (Rules(quality=90, format="png"), 1, "PNG has none"),
        (Rules(max_pixels=0), 1, "--max-pixels 0"),
    ],
)
def test_settings_out_of_range(images: Path, tmp_path: Path, rules: Rules, shard_samples: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_at(f"imagefolder:{images}", tmp_path, rules=rules, shard_samples=shard_samples)


def test_two_builds_do_not_share_a_folder(images: Path, tmp_path: Path) -> None:
    with output_folder(tmp_path), pytest.raises(InputError, match="another process is writing it"):
        build_at(f"imagefolder:{images}", tmp_path)


def test_out_that_is_an_address(images: Path) -> None:
    with pytest.raises(InputError, match="--out s3:/bucket/x: shards are written to a local folder"):
        build_at(f"imagefolder:{images}", Path("s3://bucket/x"))


def test_out_that_is_a_file(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"--out .*choose a folder"):
        build_at(f"imagefolder:{images}", tmp_path / "out")


def test_a_full_disk_is_one_line_and_what_stands_is_kept(images: Path, built: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this; without its signal the write fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(InputError, match=r"shard-000000\.tar: .*File too large; mend that and run the build again"):
            build_at(f"imagefolder:{images}", tmp_path, shard_samples=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    build_at(f"imagefolder:{images}", tmp_path, shard_samples=10)
    assert contents(tmp_path) == contents(built)


def test_what_is_kept_decodes_in_dali_as_a_viewer_shows_it(tmp_path: Path) -> None:
    """Every kind of file that passes through or is converted, against Pillow's pixels of what was written."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "jpeg": (image, "JPEG", {}),
        "progressive": (image, "JPEG", {"progressive": True}),
        "gray": (image.convert("L"), "JPEG", {}),
        "cmyk": (image.convert("CMYK"), "JPEG", {}),
        "turned": (image, "JPEG", {"exif": exif}),
        "png": (image, "PNG", {}),
        "graypng": (image.convert("L"), "PNG", {}),
        "palette": (image.quantize(9), "PNG", {}),
        "bits": (image.convert("1"), "PNG", {}),
        "deep": (Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG", {}),
        "alpha": (Image.merge("RGBA", (*image.split(), image.convert("L"))), "PNG", {}),
        "webp": (image, "WEBP", {}),
        "webpalpha": (Image.merge("RGBA", (*image.split(), image.convert("L"))), "WEBP", {}),
        "gif": (image, "GIF", {}),
        "tiff": (image, "TIFF", {}),
    }
    (tmp_path / "images").mkdir()
    for name, (made, kind, options) in kinds.items():
        made.save(tmp_path / "images" / name, kind, **options)
    manifest = build_at(f"folder:{tmp_path / 'images'}", tmp_path / "out")
    assert len(manifest) == len(kinds)
    columns = manifest.shard_columns(0)
    tar = (tmp_path / "out" / manifest.shards[0]).read_bytes()
    files = [tar[at : at + size] for at, size in zip(columns.offset, columns.size, strict=True)]

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None)
    def decoding():
        encoded = fn.external_source(lambda: [np.frombuffer(file, np.uint8) for file in files])
        return fn.decoders.image(encoded, output_type=types.RGB)

    pipeline = decoding()
    pipeline.build()
    decoded = pipeline.run()[0]
    for row, content in enumerate(files):
        shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        assert shown.shape == (columns.height[row], columns.width[row], 3)
        assert np.abs(np.asarray(decoded[row]).astype(int) - shown).mean() < 1.5, columns.key[row]


# Writing shards of one's own, as generation does


def synthetic(seeds: range):
    for seed in seeds:
        yield Sample(sample_key(seed), photo(seed, "PNG"), "png", 16 + seed % 3, 16 + seed % 5, seed % 3, seed)


def test_shards_with_seeds_go_on_where_they_stopped(tmp_path: Path) -> None:
    with output_folder(tmp_path):
        names = {shard_name(0): range(4), shard_name(1): range(4, 7)}
        first = write_shard(tmp_path, shard_name(0), synthetic(range(4)), {"steps": 25})
        assert finished(tmp_path, shard_name(0), {"steps": 25}) == first
        assert finished(tmp_path, shard_name(1), {"steps": 25}) is None
        with pytest.raises(InputError, match="was written with steps 25, not 50"):
            finished(tmp_path, shard_name(0), {"steps": 50})
        results = [
            finished(tmp_path, name, {"steps": 25}) or write_shard(tmp_path, name, synthetic(seeds), {"steps": 25})
            for name, seeds in names.items()
        ]
        finish(tmp_path, results, source="synthetic", classes=CLASSES, provenance={"generator": "test"})
    manifest = open_manifest(tmp_path)
    seed = manifest.columns(np.array([6, 0])).seed
    assert seed is not None
    assert seed.tolist() == [6, 0]
    assert manifest.provenance == {"generator": "test", "quarantined": 0, "duplicates": 0}
