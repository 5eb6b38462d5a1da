"""build, info, verify and index as people run them: what is printed, and the exit code."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import run
from jobs.index import read_classes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """8 pictures in 2 classes, and a text file."""
    root = tmp_path / "images"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(root / ("ant", "bee")[number % 2] / f"{number}.png")
    (root / "bee" / "notes.txt").write_text("no image")
    return root


def outcome(capsys: pytest.CaptureFixture, *argv: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = run(list(map(str, argv)))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(printed: str) -> dict[str, list[str]]:
    """Rows of a printed table of two columns: name → lines."""
    rows: dict[str, list[str]] = {}
    name = ""
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 2:
            name = cells[0] or name
            rows.setdefault(name, []).append(cells[1])
    return rows


def test_build_info_verify(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shards"
    build = (
        "build",
        f"imagefolder:{images}",
        "--out",
        out,
        "--source",
        "photos",
        "--shard-samples",
        "5",
        "--workers",
        "1",
    )
    code, printed, notes = outcome(capsys, *build)
    assert (code, printed) == (0, "")
    counts = table(notes)
    assert counts["images in"] == ["9"]
    assert counts["images out"][0].startswith("8 in 2 shards")
    assert counts["quarantined (quarantine.jsonl)"] == ["1", "1: not an image, or its header is damaged"]
    assert counts["classes of fewer than 10 images"] == ["2: ant 4, bee 4"]
    assert json.loads((out / "quarantine.jsonl").read_text())["origin"] == "bee/notes.txt"

    code, printed, _ = outcome(capsys, "info", out, "--classes", "5")
    assert code == 0
    for text in ("photos", "ant", "bee", "12 to 12 px", "16 to 16 px", "imagefolder:"):
        assert text in printed
    assert {name: table(printed)[name] for name in counts} == counts

    code, printed, _ = outcome(capsys, "verify", out, "--workers", "1")
    assert (code, printed.endswith("8 images: all is as it was written\n")) == (0, True)

    content = bytearray((out / "shard-000001.tar").read_bytes())
    content[600] ^= 1
    (out / "shard-000001.tar").write_bytes(content)
    code, printed, _ = outcome(capsys, "verify", out, "--workers", "1")
    lines = printed.splitlines()
    assert code == 1
    assert lines[0] == "shard-000001.tar: differs from its hash"
    assert lines[1].startswith("shard-000001.tar 00000000")
    assert lines[2].endswith("1 files and 1 samples are damaged")

    code, _, notes = outcome(capsys, *build, "--quality", "80")
    assert code == 2
    assert "was written with quality None, not 80; pass --overwrite" in notes


def test_index(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shards"
    outcome(capsys, "build", f"imagefolder:{images}", "--out", out, "--workers", "1")
    for path in out.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    (tmp_path / "classes.txt").write_text("Ameise\nBiene\n")
    code, _, notes = outcome(capsys, "index", out, "--classes", tmp_path / "classes.txt", "--workers", "1")
    assert (code, table(notes)["images out"][0].startswith("8 in 1 shards")) == (0, True)
    _, printed, _ = outcome(capsys, "info", out)
    assert "Ameise" in printed
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")  # a BOM
    assert read_classes(tmp_path / "classes.txt") == ("cat", "dog")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    code, _, notes = outcome(capsys, "index", out, "--classes", tmp_path / "classes.txt")
    assert (code, "classes.txt: is no UTF-8 (byte 3)" in notes) == (2, True)
    code, _, notes = outcome(capsys, "index", out, "--classes", tmp_path / "none.txt")
    assert (code, "--classes" in notes) == (2, True)


def test_the_end_of_a_build_counts_what_became_of_the_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = tmp_path / "images"
    (images / "ant").mkdir(parents=True)
    turned = Image.new("RGB", (4, 5)).getexif()
    turned[0x0112] = 6
    for name, size, mode, options in (
        ("ant/a.png", (4, 4), "RGB", {}),
        ("copy.png", (4, 4), "RGB", {}),
        ("ant/b.png", (4, 5), "RGBA", {}),
        ("ant/c.gif", (4, 6), "L", {}),
        ("ant/d.jpg", (4, 7), "RGB", {"exif": turned}),
        ("ant/e.png", (20, 30), "L", {}),
    ):
        Image.new(mode, size).save(images / name, **options)
    (images / "ant" / "f.jpg").write_bytes(b"")
    (images / "ant" / "g.jpg").write_bytes((images / "ant" / "d.jpg").read_bytes()[:200])
    (images / "ant" / "h.jpg").write_bytes((images / "ant" / "d.jpg").read_bytes()[:201])
    build = ("build", f"imagefolder:{images}", "--out", tmp_path / "out", "--workers", "1", "--resize-short", "10")
    for flags in ((), ("--shard-samples", "2", "--overwrite")):
        code, _, notes = outcome(capsys, *build, *flags)
        counts = table(notes)
        assert code == 0
        assert counts["images in"] == ["9"]
        assert sorted(counts["converted"]) == [
            "1: GIF P to png",
            "1: JPEG RGB to turned jpg",
            "1: PNG L to reduced png",
            "1: PNG RGBA to png",
            "4",
        ]
        assert len(counts["quarantined (quarantine.jsonl)"]) == 3
        assert counts["quarantined (quarantine.jsonl)"][1].startswith("2: ")
        assert counts["duplicates (kept)"] == ["1"]
        assert counts["without label"] == ["1", "1: in no class folder"]
        assert counts["classes of fewer than 10 images"] == ["1: ant 5"]
    _, _, again = outcome(capsys, *build, "--shard-samples", "2")  # from the shards that stand
    assert table(again) == counts
    _, printed, _ = outcome(capsys, "info", tmp_path / "out")
    assert {name: table(printed)[name] for name in counts} == counts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("build", "imagefolder:/no/such", "--out", "{}/o"), "/no/such: there is no such folder"),
        (("build", "imagefolder:{}", "--out", "{}/o"), "no class folders in it"),
        (("build", "photos", "--out", "{}/o"), "a source is KIND:PATH"),
        (("info", "{}"), "there is no manifest.json; build it with `hardviews build`"),
        (("verify", "{}"), "there is no manifest.json"),
        (("index", "{}"), "there are no .tar files in it"),
        (("index", "s3://bucket/tars"), "copy them to one"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, argv: tuple[str, ...], message: str
) -> None:
    code, printed, notes = outcome(capsys, *(word.format(tmp_path) for word in argv))
    assert (code, printed) == (2, "")
    line = notes.strip().splitlines()[-1]
    assert line.startswith("hardviews: ")
    assert message in line


def test_interrupted_output_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    (tmp_path / "shard-000000.tar").write_bytes(sink.getvalue())
    code, _, notes = outcome(capsys, "info", tmp_path)
    assert (code, "there is no manifest.json" in notes) == (2, True)
