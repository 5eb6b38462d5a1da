"""README's tree and links, compared with the folders: what is named exists, and every folder of code is named."""

import re
from pathlib import Path

import pytest

from jobs.cli import JOBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TREE = set(re.findall(r"^    (\S+)", README.split("## Files\n")[1], re.M))
PACKAGES = ("shards", "pipelines", "models", "jobs")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def test_every_path_of_the_tree_exists() -> None:
    assert TREE
    for name in TREE:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name


def test_every_folder_is_in_the_tree() -> None:
    code = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {f"{folder}/" for folder in code} | {"tests/", "benchmarks/", "docs/"} == {
        n for n in TREE if n.endswith("/")
    }


def test_every_job_is_in_the_table() -> None:
    assert re.findall(r"^\| `hardviews ([\w-]+)` \|", README, re.M) == list(JOBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert not [
        page.name
        for page in PAGES
        if page.parent.name == "docs" and page.name != "index.md" and f"({page.name})" not in index
    ]
