"""How far the colour operations are from torchvision's for the same parameters: the table of docs/photometric.md.

The reference is torchvision's functional operations on float32 images, one after the other. Beside our own ways
stands torchvision's own uint8 path, which truncates after every operation: what an ordinary loader computes.

Shape suffixes: V views, S side of a view in pixels, 3 channels. Values are of 255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from numpy.typing import NDArray
from torch import Tensor

from jobs.benches.photographs import photograph
from pipelines.colour import MEAN, SOLARIZE_FROM, STD, blur_radius
from pipelines.colour_device import fused_on_device
from pipelines.colour_exact import exact
from pipelines.colour_host import fused
from pipelines.draw import draw
from pipelines.params import FIELDS, JITTER_ORDERS, ViewParams
from pipelines.policies import build_policy

GEOMETRY = ("top", "left", "height", "width", "flip")
SEED = 0


@dataclass(frozen=True)
class Difference:
    """One way of computing one operation against torchvision in float32, over all pixels of all views."""

    operation: str
    values: str
    """What was put in: parameters and images."""
    way: str
    mean: float
    """Mean absolute difference, of 255."""
    largest: float
    """Largest absolute difference, of 255."""


@dataclass(frozen=True)
class Case:
    """Views to compute: parameters [V] and crops [V, S, S, 3]."""

    operation: str
    values: str
    params: ViewParams
    crops_VSS3: NDArray[np.uint8]


def torchvision_view(crop_SS3: NDArray[np.uint8], params: ViewParams, row: int, *, floating: bool) -> Tensor:
    """[3, S, S] values of 255 (float32) by torchvision's functions in the view's order, on float32 or on uint8.

    A factor that changes nothing (1, or 0 for hue) is left out, as everywhere: it is that of an operation not drawn.
    """
    image = torch.from_numpy(crop_SS3).permute(2, 0, 1)
    image = image.float() / 255 if floating else image
    jitter: list[tuple[Callable[..., Tensor], float, float]] = [
        (tv.adjust_brightness, float(params.brightness[row]), 1),
        (tv.adjust_contrast, float(params.contrast[row]), 1),
        (tv.adjust_saturation, float(params.saturation[row]), 1),
        (tv.adjust_hue, float(params.hue[row]), 0),
    ]
    if params.jitter[row]:
        for op in JITTER_ORDERS[params.order[row]]:
            function, value, neutral_value = jitter[op]
            image = image if value == neutral_value else function(image, value)
    if params.gray[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if params.blur[row]:
        sigma = float(params.blur[row])
        size = 2 * blur_radius(len(crop_SS3), sigma) + 1
        image = tv.gaussian_blur(image, [size, size], [sigma, sigma])
    if params.solarize[row]:
        image = tv.solarize(image, SOLARIZE_FROM / 255 if floating else SOLARIZE_FROM)
    return image * 255 if floating else image.float()


def torchvision_views(case: Case, *, floating: bool) -> Tensor:
    """[V, 3, S, S]: every view of the case by torchvision, values of 255."""
    views = [torchvision_view(crop, case.params, row, floating=floating) for row, crop in enumerate(case.crops_VSS3)]
    return torch.stack(views)


def _unnormalised(function: Callable[..., None], case: Case, device: str) -> Tensor:
    """The views of a case on the device, or on the `host`, by OpenCV."""
    size, host = case.crops_VSS3.shape[1], device == "host"
    out_V3SS = torch.empty(len(case.crops_VSS3), 3, size, size, device="cpu" if host else device)
    function(case.crops_VSS3 if host else torch.from_numpy(case.crops_VSS3).to(device), case.params, out_V3SS)
    mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (out_V3SS.cpu() * std_311 + mean_311) * 255


def ways(device: str) -> dict[str, Callable[[Case], Tensor]]:
    """Name → the views of a case, values of 255."""
    clamped, clamped_on_device = partial(fused, clamp=True), partial(fused_on_device, clamp=True)
    return {
        "fused": lambda case: _unnormalised(fused, case, "host"),
        f"fused in torch ({device})": lambda case: _unnormalised(fused_on_device, case, device),
        "clamped": lambda case: _unnormalised(clamped, case, "host"),
        f"clamped in torch ({device})": lambda case: _unnormalised(clamped_on_device, case, device),
        f"exact ({device})": lambda case: _unnormalised(exact, case, device),
        "torchvision on uint8": lambda case: torchvision_views(case, floating=False),
    }


def differences(size: int = 224, photographs: int = 6, device: str = "cpu") -> list[Difference]:
    """Every case in every way, against torchvision in float32."""
    every = []
    for case in cases(size, photographs):
        reference = torchvision_views(case, floating=True)
        for way, compute in ways(device).items():
            apart = (compute(case) - reference).abs()
            every.append(Difference(case.operation, case.values, way, apart.mean().item(), apart.max().item()))
    return every


def cases(size: int, photographs: int) -> list[Case]:
    """Each operation by itself over the policies' ranges and over edge values, then whole jitters and policies."""
    photos = [photograph(seed)[:size, :size] for seed in range(photographs)]
    edges = edge_images(size)
    third = (0.2, 0.6, 0.8, 1.2, 1.4, 1.8)  # the ends of BYOL's and SimCLR's ranges
    grid: list[tuple[str, dict[str, Sequence[float]], dict[str, Sequence[float]]]] = [
        ("brightness", {"brightness": third}, {"brightness": (0, 1, 2)}),
        ("contrast", {"contrast": third}, {"contrast": (0, 1, 2)}),
        ("saturation", {"saturation": third}, {"saturation": (0, 1, 2)}),
        ("hue", {"hue": (-0.2, -0.1, -0.02, 0.02, 0.1, 0.2)}, {"hue": (-0.5, -1e-3, 0.5)}),
        ("grayscale", {"gray": (True,)}, {"gray": (True,)}),
        ("blur", {"blur": (0.1, 0.5, 1.0, 1.5, 2.0)}, {"blur": (0.01, 2.0, 8.0)}),
        ("solarize", {"solarize": (True,)}, {"solarize": (True,)}),
    ]
    every = []
    for operation, usual, extreme in grid:
        every.append(_grid_case(operation, "policies' ranges, photographs", usual, photos))
        every.append(_grid_case(operation, "edge values, edge images", extreme, edges))
    for name in ("byol", "simclr"):
        params, crops_VSS3 = drawn_views(name, size, photos, SEED)
        none = np.zeros(len(params), np.bool_)
        jitter = replace(params, gray=none, solarize=none, blur=np.zeros(len(params), np.float32))
        without_hue = replace(jitter, hue=np.zeros(len(params), np.float32))
        every.append(Case("brightness, contrast, saturation", f"drawn from {name}", without_hue, crops_VSS3))
        every.append(Case("all four of the jitter", f"drawn from {name}", jitter, crops_VSS3))
        every.append(Case("whole policy", f"drawn from {name}", params, crops_VSS3))
    return every


def edge_images(size: int) -> list[NDArray[np.uint8]]:
    """Black, white, one gray, the corners of the colour cube, ramps of two channels, noise."""
    flat = [np.full((size, size, 3), value, np.uint8) for value in (0, 255, 128)]
    rng = np.random.default_rng(SEED)
    corners = 255 * rng.integers(0, 2, (size, size, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    ramps = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=2)
    return [*flat, corners, np.ascontiguousarray(ramps), rng.integers(0, 256, (size, size, 3), dtype=np.uint8)]


def neutral(count: int) -> ViewParams:
    """[V] parameters that change nothing."""
    return ViewParams.identity(*np.zeros((4, count), np.int32))


def _grid_case(
    operation: str, values: str, settings: dict[str, Sequence[float]], images: list[NDArray[np.uint8]]
) -> Case:
    (name, steps), *_ = settings.items()
    params = neutral(len(steps) * len(images))
    column_V = np.repeat(np.array(steps, getattr(params, name).dtype), len(images))
    params = replace(params, **{name: column_V}, jitter=np.ones(len(params), np.bool_))
    return Case(operation, values, params, np.stack(images * len(steps)))


def drawn_views(
    policy: str, size: int, images: list[NDArray[np.uint8]], seed: int
) -> tuple[ViewParams, NDArray[np.uint8]]:
    """The policy's own draws of colour for 12 views of each image; the crop boxes are put aside."""
    views = 12
    ids = np.arange(len(images))
    sizes = np.full((len(images), 2), size)
    params = draw(build_policy(policy, size, views), ids, np.zeros_like(ids), seed, sizes).flat()
    still = neutral(len(params))
    params = replace(still, **{name: getattr(params, name) for name in FIELDS if name not in GEOMETRY})
    return params, np.repeat(np.stack(images), views, axis=0)


def markdown(every: list[Difference]) -> str:
    """A Markdown table: a row for each operation and its inputs, "mean / largest" in a column for each way."""
    columns = list(dict.fromkeys(difference.way for difference in every))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for difference in every:
        cells = rows.setdefault((difference.operation, difference.values), {})
        cells[difference.way] = f"{difference.mean:.3f} / {difference.largest:.2f}"
    lines = [["operation", "inputs", *columns], ["---"] * (2 + len(columns))]
    lines += [[*row, *(cells[column] for column in columns)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
