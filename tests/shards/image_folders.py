"""Small folders of real image files, and what stands in a folder after a build."""

import io
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shards.build import build, plan
from shards.engines import run_tasks
from shards.manifest import Manifest

LOCAL = partial(run_tasks, "local", workers=1)
CLASSES = ("ant", "bee", "cow")


def photo(seed: int, kind: str = "JPEG", side: int = 16) -> bytes:
    """A small picture of noise, so that no two are alike."""
    rng = np.random.default_rng(seed)
    shape = (side + seed % 3, side + seed % 5, 3)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(sink, kind)
    return sink.getvalue()


def imagefolder(root: Path, images: int) -> Path:
    """A folder per class; every fifth file is a PNG."""
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    for number in range(images):
        kind, suffix = ("PNG", "png") if number % 5 == 4 else ("JPEG", "JPEG")
        (root / CLASSES[number % 3] / f"img.{number:03d}.{suffix}").write_bytes(photo(number, kind))
    return root


def build_at(
    address: str, out: Path, *, source: str = "real", overwrite: bool = False, run=LOCAL, **options
) -> Manifest:
    """Plans and builds."""
    return build(plan(address, out, run, **options), source, run, overwrite=overwrite)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def tar_names(path: Path) -> list[str]:
    """Names of a tar's members."""
    with tarfile.open(path) as tar:
        return tar.getnames()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar with these files, by name and content."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
