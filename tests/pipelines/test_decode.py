"""Decoders against Pillow and each other; broken images found by halving; DALI's graph against torch's crops."""

import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from view_pictures import encoded, jpeg, pixels, truncated

from pipelines.crop import crop_views
from pipelines.decode import (
    BrokenImagesError,
    DaliDecoder,
    DaliViews,
    PillowDecoder,
    cubic_shares,
    find_broken,
    inner_share,
    looks_whole,
    open_decoder,
    views_graph,
)
from pipelines.draw import draw
from pipelines.params import ViewParams
from pipelines.policies import Interpolation, build_policy
from shards.errors import InputError

SIZES = [(120, 180), (400, 470), (33, 20), (64, 300)]


def reference(data: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


@pytest.fixture(scope="module")
def dali() -> DaliDecoder:
    return DaliDecoder(8)


@pytest.mark.parametrize("backend", ["dali", "pillow"])
def test_every_format_decodes_to_pillows_pixels(backend: str) -> None:
    image = pixels(50, 70)
    data = [
        encoded(image, quality=90),
        encoded(image, "JPEG", "L"),
        encoded(image, "JPEG", "CMYK"),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "PNG", "RGBA"),
        encoded(image, "PNG", "P"),
        encoded(image, "PNG", "L"),
        encoded(image, "WEBP", quality=80),
    ]
    decoder = open_decoder(len(data), backend=backend)
    for found, item in zip(decoder.decode(data), data, strict=True):
        assert isinstance(found, torch.Tensor)
        assert np.array_equal(found.numpy(), reference(item))


@pytest.mark.parametrize("backend", ["dali", "pillow"])
def test_orientation_tags_are_ignored(backend: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    data = encoded(pixels(40, 60), exif=exif)
    (found,) = open_decoder(1, backend=backend).decode([data])
    assert isinstance(found, torch.Tensor) and tuple(found.shape) == (40, 60, 3)


@pytest.mark.parametrize("backend", ["dali", "pillow"])
def test_broken_images_are_named_and_the_others_decoded(backend: str) -> None:
    good = [jpeg(30 + i, 50, i) for i in range(4)]
    junk = np.arange(200, dtype=np.uint8)
    data = [good[0], truncated(jpeg(200, 300)), good[1], junk, good[2], good[3]]
    decoder = open_decoder(8, backend=backend)
    found = decoder.decode(data)
    assert [isinstance(item, str) for item in found] == [False, True, False, True, False, False]
    for item, source in zip(found, data, strict=True):
        if isinstance(item, str):
            assert item.startswith("Pillow: ") and "\n" not in item
        else:
            assert np.array_equal(item.numpy(), reference(source))
    again = decoder.decode(good)
    assert all(isinstance(item, torch.Tensor) for item in again)
    assert decoder.decode([]) == []
    assert [isinstance(item, str) for item in decoder.decode([junk])] == [True]


@pytest.mark.parametrize("kind", ["head", "half", "page"])
def test_broken_images_do_not_end_the_process(kind: str) -> None:
    """In a process of its own, for what it must not do is to end with a segmentation fault."""
    code = """
import sys
import numpy as np
import torch
from pipelines.decode import BrokenImagesError, DaliViews, open_decoder
from pipelines.params import ViewParams
from test_decode import jpeg
whole = jpeg(48, 64)
broken = {"head": whole[:200], "half": whole[: len(whole) // 2], "page": np.frombuffer(b"<html>404</html>", np.uint8)}
data = [whole] * 10 + [broken[sys.argv[1]]] + [whole] * 53
for _ in range(20):
    found = open_decoder(64, 2, "dali").decode(data)
    assert [i for i, item in enumerate(found) if isinstance(item, str)] == [10]
params = ViewParams.identity(*(np.full((64, 1), side, np.int32) for side in (0, 0, 48, 64)))
for _ in range(20):
    try:
        DaliViews(64, [(1, 16)], torch.device("cpu"), 2).crops(data, [params])
    except BrokenImagesError as error:
        assert [*error.reasons] == [10]
    else:
        raise SystemExit("no image is broken")
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, kind], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("broken", [set(), {0}, {15}, {3, 4}, {0, 7, 15}, set(range(16))])
def test_halving_finds_exactly_the_broken_rows_in_few_runs(broken: set[int]) -> None:
    runs = []

    def run(rows: list[int]) -> None:
        runs.append(rows)
        if broken & set(rows):
            raise RuntimeError("encountered:\n\nimage is bad\nmore")

    assert find_broken(run, 16) == dict.fromkeys(broken, "DALI: image is bad")
    assert len(runs) <= 1 + 2 * len(broken) * math.log2(16)


def test_only_runtime_errors_are_taken_for_broken_images() -> None:
    def run(rows: list[int]) -> None:
        raise KeyError(rows[0])

    with pytest.raises(KeyError):
        find_broken(run, 2)


def test_an_unknown_decoder_is_an_input_error() -> None:
    with pytest.raises(InputError, match="auto, dali, pillow"):
        open_decoder(1, backend="nvjpeg")


def test_without_dali_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.decode.HAS_DALI", False)
    assert isinstance(open_decoder(1), PillowDecoder)
    with pytest.raises(InputError, match="not installed"):
        open_decoder(1, backend="dali")


def views_of(name: str, size: int, *counts: int) -> tuple[list[tuple[int, int]], list[ViewParams]]:
    policy = build_policy(name, size, *counts)
    ids = np.arange(len(SIZES))
    params = draw(policy, ids, ids * 0, 2, np.array(SIZES))
    return [(group.count, group.size) for group in policy.groups], [params[:, span] for span in policy.spans]


def apart(
    images: list[torch.Tensor], crops_BnSS3: torch.Tensor, views: ViewParams, interpolation: Interpolation = "bilinear"
) -> torch.Tensor:
    """[B, n, S, S, 3]: DALI's crops against torch's for the same boxes, of 255."""
    expected = torch.empty_like(crops_BnSS3)
    for row, image in enumerate(images):
        crop_views(image, views[row], expected[row], interpolation)
    return (crops_BnSS3.int() - expected.int()).abs().float()


def decoded(decoder: DaliDecoder, data: list[np.ndarray]) -> list[torch.Tensor]:
    return [image.clone() for image in decoder.decode(data) if isinstance(image, torch.Tensor)]


def test_dalis_graph_agrees_with_torchs_crops(dali: DaliDecoder) -> None:
    """The graph that runs on a GPU, operator for operator, on the CPU: the borders' rounding apart."""
    data = [jpeg(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    groups, params = views_of("dino", 112, 4, 3)
    crops = DaliViews(8, groups, torch.device("cpu"), 1).crops(data, params)
    images = decoded(dali, data)
    for (count, size), views, crops_BnSS3 in zip(groups, params, crops, strict=True):
        assert crops_BnSS3.shape == (len(data), count, size, size, 3) and crops_BnSS3.dtype == torch.uint8
        assert apart(images, crops_BnSS3, views).max() <= 2
        assert apart(images, crops_BnSS3, views).mean() <= 0.05
        assert views.flip.any() and not views.flip.all()


@pytest.mark.parametrize(("size", "mean"), [(1, 1), (2, 1), (8, 0.2), (31, 0.06), (32, 0.06), (96, 0.06), (224, 0.02)])
@pytest.mark.parametrize(("height", "width"), [(400, 470), (40, 1200), (1200, 40), (30, 30), (900, 700)])
def test_the_backends_agree_on_noise_at_every_scale(size: int, mean: float, height: int, width: int) -> None:
    """Noise is the worst case: what a border takes from beyond the box shows up to 20/255."""
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes = [(0, 0, height, width), (1, 2, height - 3, width - 5), (height // 3, width // 3, height // 2, width // 2)]
    views = ViewParams.identity(*np.array(boxes, np.int32).T[:, None])
    views = replace(views, flip=np.array([[False, True, False]]))
    data = encoded(image, "PNG")
    (crops,) = DaliViews(1, [(3, size)], torch.device("cpu"), 1).crops([data], [views])
    difference = apart([torch.from_numpy(image)], crops, views)
    assert difference.max() <= 2
    assert difference.mean() <= mean  # the smaller the view, the more of it is border
    (crops,) = DaliViews(1, [(3, size)], torch.device("cpu"), 1, "bicubic").crops([data], [views])
    difference = apart([torch.from_numpy(image)], crops, views, "bicubic")
    assert difference.max() <= 2 and difference.mean() <= max(mean, 0.06)


def test_a_borders_share_is_the_weight_of_a_triangle_inside_the_box() -> None:
    def by_hand(length: int, size: int) -> float:
        scale = length / size
        weights = {tap: max(0.0, 1 - abs(tap + 0.5 - scale / 2) / scale) for tap in range(-length, 2 * length)}
        return sum(weights[tap] for tap in range(length)) / sum(weights.values())

    lengths = np.array([[2, 3, 4, 5, 7], [8, 9, 40, 41, 1000]])
    expected = [[by_hand(length, 4) if length > 4 else 1 for length in row] for row in lengths.tolist()]
    np.testing.assert_allclose(inner_share(lengths, 4), expected, rtol=1e-6)
    assert inner_share(np.array([4000]), 4)[0] == pytest.approx(7 / 8, abs=1e-3)


@pytest.mark.parametrize(("length", "size"), [(3, 3), (40, 8), (41, 7), (5, 13), (1, 4), (9, 1)])
def test_a_pixels_share_is_the_weight_of_a_cubic_inside_the_box(length: int, size: int) -> None:
    def cubic(x: float) -> float:
        """Keys (1981), equation 15, a = −1/2."""
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0

    scale = length / size
    for pixel, share in enumerate(cubic_shares(length, size).tolist()):
        taps = range(-3 * length - 9, 4 * length + 9)
        weights = {tap: cubic((tap + 0.5 - scale * (pixel + 0.5)) / max(scale, 1)) for tap in taps}
        assert share == pytest.approx(sum(weights[tap] for tap in range(length)) / sum(weights.values()), abs=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_graph_for_a_gpu_can_be_defined_without_one(interpolation: Interpolation) -> None:
    """DALI checks every operator's device and arguments then; building is what a machine without a GPU cannot do."""
    graph = views_graph(4, [(2, 32), (3, 16)], torch.device("cuda", 0), 2, interpolation)
    assert graph.device_id == 0
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA is not available"):
            graph.build()


def test_every_operator_of_the_gpu_graph_takes_its_inputs_where_they_lie() -> None:
    """Places and arguments by the operators' schemas. Inner names of DALI are used here alone."""
    graph = views_graph(8, [(4, 224), (6, 96)], torch.device("cuda", 0), 4)
    try:
        from nvidia.dali.backend import TryGetSchema

        graph._build_graph()
        operators = [(op, op.spec.NumRegularInput(), op.outputs[0].device, op.check_args) for op in graph._ops]
    except (ImportError, AttributeError) as error:
        pytest.skip(f"not supported by this DALI: {error}")
    places: dict[str, set[str]] = {}
    for op, regular, place, check_arguments in operators:
        kind = op.name.strip("_").rstrip("0123456789").strip("_")
        places.setdefault(kind, set()).add(place)
        schema = TryGetSchema({"Image": "decoders__Image"}.get(kind, kind))
        if schema is None:  # an input of the graph, or a part of one
            continue
        check_arguments()
        for number, edge in enumerate(op.inputs):
            where = schema.GetInputDevice(number, edge.device, place) if number < regular else "cpu"
            assert edge.device == ("cpu" if kind == "Image" else where), (op.name, number, edge.device)
    moved = {kind for kind, found in places.items() if found == {"gpu"}}
    assert moved == {"Image", "Slice", "Resize", "Flip", "Stack"}
    assert all(found == {"cpu"} for kind, found in places.items() if kind not in moved)


def test_dalis_graph_gets_what_its_parser_cannot_take_as_png() -> None:
    data = [jpeg(height, width) for height, width in SIZES]
    groups, params = views_of("byol", 16, 2)
    graph = DaliViews(8, groups, torch.device("cpu"), 1)
    image = np.asarray(Image.open(io.BytesIO(data[1].tobytes())))
    png, bmp = (encoded(image, kind) for kind in ("PNG", "BMP"))
    assert looks_whole(png) and not looks_whole(bmp)
    expected = graph.crops([data[0], png, *data[2:]], params)
    got = graph.crops([data[0], bmp, *data[2:]], params)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_dalis_graph_names_broken_images_and_goes_on() -> None:
    data = [jpeg(height, width) for height, width in SIZES]
    groups, params = views_of("byol", 16, 2)
    graph = DaliViews(8, groups, torch.device("cpu"), 1)
    whole = graph.crops(data, params)
    with pytest.raises(BrokenImagesError) as caught:
        graph.crops([data[0], truncated(data[1]), data[2], data[3][:40]], params)
    assert sorted(caught.value.reasons) == [1, 3]
    assert all(torch.equal(a, b) for a, b in zip(graph.crops(data, params), whole, strict=True))
    fewer = graph.crops(data[:2], [views[:2] for views in params])
    assert torch.equal(fewer[0], whole[0][:2])


def test_a_box_outside_the_image_is_the_images_fault() -> None:
    data, (groups, params) = [jpeg(height, width) for height, width in SIZES], views_of("byol", 16, 2)
    with pytest.raises(BrokenImagesError) as caught:
        DaliViews(8, groups, torch.device("cpu"), 1).crops([data[2], *data[1:]], params)
    assert list(caught.value.reasons) == [0]


@pytest.mark.parametrize("size", [8, 64, 224])
def test_crops_are_torchs_antialiased_resize(size: int) -> None:
    image = torch.from_numpy(pixels(150, 200))
    params = draw(build_policy("byol", size, 6), np.array([3]), np.array([0]), 0, np.array([[150, 200]]))[0]
    crops = torch.empty(6, size, size, 3, dtype=torch.uint8)
    crop_views(image, params, crops)
    assert params.flip.any() and not params.flip.all()
    for view in range(6):
        top, left, height, width = (int(getattr(params, n)[view]) for n in ("top", "left", "height", "width"))
        patch = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
        exact = F.interpolate(patch.float(), (size, size), mode="bilinear", antialias=True)
        uint8 = F.interpolate(patch.contiguous(), (size, size), mode="bilinear", antialias=True)
        if params.flip[view]:
            exact, uint8 = exact.flip(-1), uint8.flip(-1)
        found = crops[view].permute(2, 0, 1)[None]
        assert torch.equal(found, uint8)
        assert (found - exact).abs().max() <= 1.01


@pytest.mark.parametrize(("height", "width", "size"), [(150, 200, 64), (40, 30, 96), (90, 40, 64)])
def test_bicubic_crops_are_pillows(height: int, width: int, size: int) -> None:
    """What DINO's and iBOT's loaders resize with; columns before rows, as Pillow does where it is to do both."""
    image = pixels(height, width)
    boxes = [(0, 0, height, width), (3, 4, height // 2, width // 3), (1, 1, 5, 6)]
    views = replace(ViewParams.identity(*np.array(boxes, np.int32).T), flip=np.array([False, True, False]))
    crops = torch.empty(3, size, size, 3, dtype=torch.uint8)
    crop_views(torch.from_numpy(image), views, crops, "bicubic")
    for (top, left, high, wide), flip, crop in zip(boxes, views.flip, crops.numpy(), strict=True):
        patch = Image.fromarray(image[top : top + high, left : left + wide])
        pillow = patch.resize((size, high), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
        expected = np.asarray(pillow)[:, ::-1] if flip else np.asarray(pillow)
        apart = np.abs(crop.astype(int) - expected.astype(int))
        assert apart.max() <= 2 and apart.mean() <= 0.02
