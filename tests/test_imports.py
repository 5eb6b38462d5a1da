"""The folders' import rules, read from the source: who may import whom, and which package has one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("shards", "pipelines", "models", "jobs")
MAY_IMPORT = {
    "shards": {"shards"},
    "pipelines": {"shards", "pipelines"},
    "models": {"models"},
    "jobs": set(OURS),
}
ROOMS = {  # folder of jobs/ → those that it may import besides itself
    "run": set(),
    "log": {"run"},
    "evaluation": {"run"},
    "studies": {"run"},
    "training": {"run", "log", "evaluation"},
    "analysis": {"run", "log"},
    "reporting": {"run", "log", "evaluation", "studies"},
    "benches": {"run", "log", "evaluation", "studies", "training", "analysis", "reporting"},
}
COMPOSERS = {"demo", "sweep"}  # the only jobs that may import other jobs
DISPATCHERS = {"cli", "bench"}  # load jobs by name, import none
ONE_DOOR = {
    "nvidia": "pipelines/decode.py",
    "kornia": "pipelines/colour_exact.py",
    "diffusers": "shards/generation/diffusion.py",
    "ray": "shards/engines.py",
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at any depth; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import; write the full name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


FILES = [path.relative_to(ROOT) for name in OURS for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_folders_import_only_what_they_may(path: Path) -> None:
    folder = path.parts[0]
    used = {name.split(".")[0] for name in imports(ROOT / path)} & set(OURS)
    assert used <= MAY_IMPORT[folder], f"{path} imports {sorted(used - MAY_IMPORT[folder])}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "jobs" and len(p.parts) > 2], ids=str)
def test_rooms_of_jobs_import_only_what_they_may(path: Path) -> None:
    room = path.parts[1]
    used = {parts[1] for name in imports(ROOT / path) if (parts := name.split("."))[0] == "jobs" and len(parts) > 2}
    assert used & ROOMS.keys() <= ROOMS[room] | {room}, f"{path} imports {sorted(used - ROOMS[room] - {room})}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "shards" and p.parts[1] != "generation"], ids=str)
def test_the_core_of_shards_needs_neither_generation_nor_torch(path: Path) -> None:
    used = imports(ROOT / path)
    assert not [name for name in used if name.startswith("shards.generation") or name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent == Path("jobs")], ids=str)
def test_no_job_imports_another_job(path: Path) -> None:
    commands = {p.stem for p in FILES if p.parent == Path("jobs")} - {"__init__", path.stem}
    used = {parts[1] for name in imports(ROOT / path) if (parts := name.split("."))[0] == "jobs" and len(parts) > 1}
    assert path.stem in COMPOSERS or not used & commands, f"{path} imports the jobs {sorted(used & commands)}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "jobs" and len(p.parts) > 2], ids=str)
def test_shared_job_code_imports_no_job(path: Path) -> None:
    commands = {p.stem for p in FILES if p.parent == Path("jobs")} - {"__init__"}
    used = {parts[1] for name in imports(ROOT / path) if (parts := name.split("."))[0] == "jobs" and len(parts) > 1}
    assert not used & commands, f"{path} imports the jobs {sorted(used & commands)}"


@pytest.mark.parametrize(("package", "door"), ONE_DOOR.items())
def test_packages_with_one_door(package: str, door: str) -> None:
    users = {str(path) for path in FILES if package in {name.split(".")[0] for name in imports(ROOT / path)}}
    assert users == {door}


def test_every_folder_with_code_is_packaged() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {".".join(path.parent.parts) for path in FILES}
