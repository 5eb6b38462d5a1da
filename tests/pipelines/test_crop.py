"""Crops by the compiled kernel: the bits of torch's operator, no byte beyond the image, and the way without it."""

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import mmap
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import crop
from pipelines.crop import Crop, crop_by_torch, crop_views, find_kernel
from pipelines.params import ViewParams

Box = tuple[int, int, int, int, bool]  # top, left, height, width, flip
# Height and width of the image, side of the views: ordinary ones, enlarging, shrinking by hundreds, one pixel, sides
# that are no multiples of 4, equal sizes, very wide and very tall.
SHAPES = [
    (400, 470, 224),
    (224, 224, 224),
    (32, 32, 32),
    (20, 30, 97),
    (1, 1, 5),
    (1, 7, 1),
    (3, 3, 2),
    (4000, 40, 8),
    (12, 3000, 31),
    (640, 512, 64),
    (700, 900, 50),
    (96, 230, 33),
]


@pytest.fixture
def kernel() -> Crop:
    found = find_kernel()
    if isinstance(found, str):
        pytest.skip(f"no kernel: {found}")
    return found


def parameters(boxes: Sequence[Box]) -> ViewParams:
    columns = np.array(boxes, np.int32)[None]
    return replace(ViewParams.identity(*(columns[..., i] for i in range(4))), flip=columns[..., 4] > 0)[0]


def random_boxes(rng: np.random.Generator, height: int, width: int, side: int, count: int) -> list[Box]:
    """The whole image, a box of the views' height and one of their width where they fit, one pixel in the last corner,
    and random ones."""
    boxes = [(0, 0, height, width, False), (height - 1, width - 1, 1, 1, True)]
    if side <= min(height, width):
        boxes += [(height - side, 0, side, width, True), (0, width - side, height, side, False)]
    for _ in range(count):
        (h, w), flip = rng.integers(1, (height + 1, width + 1)), bool(rng.integers(2))
        boxes.append((int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), int(h), int(w), flip))
    return boxes


def noise(rng: np.random.Generator, height: int, width: int, padding: int = 0) -> Tensor:
    """uint8 [height, width, 3] with `padding` more pixels between the rows."""
    return torch.from_numpy(rng.integers(0, 256, (height, width + padding, 3), dtype=np.uint8))[:, :width]


def views(way: Crop, image: Tensor, params: ViewParams, side: int) -> Tensor:
    out = torch.full((len(params), side, side, 3), 7, dtype=torch.uint8)
    way(image, params, out)
    return out


def guarded(count: int) -> Tensor:
    """uint8 [count] whose last byte is the last before a page that may not be touched."""
    page = mmap.PAGESIZE
    room = -(-count // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0)
    assert forbidden == 0, ctypes.get_errno()
    return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=room - count)


def installed() -> bool:
    """Whether the files under test are those that were installed, in place or as a copy."""
    try:
        package = importlib.metadata.distribution("hardviews")
    except importlib.metadata.PackageNotFoundError:
        return False
    source = json.loads(package.read_text("direct_url.json") or "{}").get("url", "")
    places = (str(package.locate_file("")), url2pathname(urlparse(source).path))
    return str(Path(crop.__file__).parents[1]) in places


def compiles(folder: Path) -> bool:
    """Whether the compiler that extensions are built with makes a shared library."""
    source = folder / "any.c"
    source.write_text("#include <immintrin.h>\n#include <stdlib.h>\n#include <string.h>\nint any(void) { return 1; }\n")
    command = [*shlex.split(sysconfig.get_config_var("CC") or "cc"), "-shared", "-fPIC", str(source)]
    if shutil.which(command[0]) is None:
        return False
    made = subprocess.run([*command, "-o", str(folder / "any.so")], check=False, capture_output=True)
    return made.returncode == 0


def test_the_kernel_is_built_where_it_can_be(tmp_path: Path) -> None:
    if not installed():
        pytest.skip("these files are not installed")
    if not compiles(tmp_path):
        pytest.skip("no C compiler")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2")
    assert callable(find_kernel()), f"{find_kernel()}: pip install -e . builds it, and -v shows why it may not"


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("height", "width", "side"), SHAPES)
def test_the_kernel_has_torchs_bits(kernel: Crop, height: int, width: int, side: int, padding: int) -> None:
    rng = np.random.default_rng([height, width, padding])
    image = noise(rng, height, width, padding)
    params = parameters(random_boxes(rng, height, width, side, 12))
    assert torch.equal(views(kernel, image, params, side), views(crop_by_torch, image, params, side))


def test_the_kernel_has_torchs_bits_at_any_length(kernel: Crop) -> None:
    rng = np.random.default_rng(0)
    image = noise(rng, 700, 700)
    for side in (7, 32, 96, 224):
        lengths = rng.integers(1, 701, 40)
        boxes = [(0, 0, int(length), 3, False) for length in lengths] + [(0, 0, 3, int(n), True) for n in lengths]
        params = parameters(boxes)
        assert torch.equal(views(kernel, image, params, side), views(crop_by_torch, image, params, side))


@pytest.mark.parametrize(("height", "width", "side"), [(1, 1, 4), (1, 1, 3), (2, 3, 7), (9, 40, 9), (50, 31, 24)])
def test_the_kernel_stays_within_image_and_views(kernel: Crop, height: int, width: int, side: int) -> None:
    rng = np.random.default_rng([height, width])
    params = parameters(random_boxes(rng, height, width, side, 20))
    image = guarded(height * width * 3).view(height, width, 3)
    image.copy_(noise(rng, height, width))
    size = len(params) * side * side * 3
    before_and_out = guarded(64 + size).fill_(7)
    out = before_and_out[64:].view(len(params), side, side, 3)
    kernel(image, params, out)
    assert torch.equal(out, views(crop_by_torch, image, params, side))
    assert (before_and_out[:64] == 7).all()


def test_boxes_beyond_the_image_are_refused(kernel: Crop) -> None:
    image = noise(np.random.default_rng(0), 10, 12)
    for box in [(-1, 0, 3, 3), (0, -1, 3, 3), (8, 0, 3, 3), (0, 10, 3, 3), (0, 0, 0, 3), (0, 0, 3, 0), (0, 0, 11, 3)]:
        with pytest.raises(ValueError, match="not in 10×12"):
            views(crop_views, image, parameters([(0, 0, 10, 12, False), (*box, False)]), 4)


def test_what_the_kernel_cannot_read_goes_by_torch() -> None:
    rng = np.random.default_rng(0)
    image = noise(rng, 40, 50)
    params = parameters(random_boxes(rng, 40, 50, 16, 4))
    columns_apart = torch.zeros(40, 100, 3, dtype=torch.uint8)[:, ::2].copy_(image)
    four_channels = torch.zeros(40, 50, 4, dtype=torch.uint8)[..., :3].copy_(image)
    for other in (columns_apart, four_channels):
        assert torch.equal(views(crop_views, other, params, 16), views(crop_by_torch, image, params, 16))
    with pytest.raises(RuntimeError):  # never memory of the wrong kind
        crop_views(image, params, torch.empty(len(params), 16, 16, 3))


def test_many_threads_crop_at_once(kernel: Crop) -> None:
    rng = np.random.default_rng(0)
    work = [(noise(rng, 90, 80), parameters(random_boxes(rng, 90, 80, 48, 3))) for _ in range(32)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda item: views(kernel, *item, 48), work * 4))
    for one, item in zip(found, work * 4, strict=True):
        assert torch.equal(one, views(crop_by_torch, *item, 48))


@pytest.mark.parametrize("reason", ["not compiled", None])
def test_both_ways_are_one_function(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason:
        monkeypatch.setattr(crop, "find_kernel", lambda: reason)
    rng = np.random.default_rng(0)
    image, params = noise(rng, 60, 50), parameters(random_boxes(rng, 60, 50, 32, 6))
    assert torch.equal(views(crop_views, image, params, 32), views(crop_by_torch, image, params, 32))


def test_a_kernel_of_another_version_is_not_used(kernel: Crop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop, "VERSION", crop.VERSION + 1)
    found = find_kernel.__wrapped__()
    assert found == f"compiled from version {crop.VERSION - 1} of its source, not {crop.VERSION}"


def test_a_kernel_that_is_missing_or_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "_crop.so"
    torn.write_bytes(b"no library")
    for spec, said in (
        (None, "not compiled"),
        (importlib.machinery.ModuleSpec("_crop", None, origin=str(torn)), "cannot be loaded"),
        (importlib.machinery.ModuleSpec("_crop", None, origin=None), "not compiled"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
            found = find_kernel.__wrapped__()
        assert isinstance(found, str)
        assert said in found
