"""The parts of `make gpu-check`: which tests they run, and what a stopped one keeps."""

import json
import sys
from pathlib import Path

import pytest

from jobs.bench import BENCHES
from jobs.benches import gpu
from jobs.benches.gpu import LIMIT, PARTS

ROOT = Path(__file__).parents[3]


def test_the_parts_run_every_file_that_is_marked() -> None:
    named = {option for part in PARTS.values() for option in part.tests if option.endswith(".py")}
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert named == marked


def test_parts_end_in_time_and_name_benchmarks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(0 < part.estimate <= LIMIT <= 300 for part in PARTS.values())
    assert next(iter(PARTS)) == "machine" and PARTS["machine"].estimate <= 60
    assert all(part.bench[0] in BENCHES for part in PARTS.values() if part.bench)
    monkeypatch.setattr(gpu, "NEEDED", ("json", "no_such_module"))
    assert list(gpu.missing()) == ["no_such_module"]


def test_a_stopped_part_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "none"})

    def ends(name: str, says: str, limit: float = 250) -> str:
        return gpu.run_part(name, [sys.executable, "-S", "-c", says], tmp_path, limit)

    assert ends("long", "import time; print('{\"side\": 1}'); time.sleep(600)", 8) == "stopped"
    assert "side" in (tmp_path / "long.log").read_text()
    assert ends("says", "print('table'); print('{\"ms\": 3}')") == "ok"
    assert json.loads((tmp_path / "says.json").read_text())["figures"] == {"ms": 3}
    assert ends("fails", "raise SystemExit(3)") == "failed"
    states = [json.loads(line)["state"] for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert states == ["stopped", "ok", "failed"]
