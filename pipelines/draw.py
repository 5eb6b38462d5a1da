"""Draws every parameter of every view, before any pixel is touched.

Everything here is a pure function of (seed, epoch, sample id, view) and the image's size; a scripted overlap also
reads the position in training. Batch size, worker count and order do not enter.

Shape suffixes: B images, N views, T tries of a crop, P pairs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipelines.params import JITTER_ORDERS, ViewParams, pair_iou
from pipelines.philox import Purpose, uniform
from pipelines.policies import IouScript, Policy, ViewPolicy

TRIES = 10  # of a crop before the fallback to a centre crop, as in torchvision
Ints = NDArray[np.integer]


def draw(
    policy: Policy,
    sample_B: Ints,
    epoch_B: Ints,
    seed: int,
    sizes_B2: Ints,
    positions_B: Ints | None = None,
) -> ViewParams:
    """[B, N]: the parameters of all views of all groups, side by side.

    Args:
        epoch_B: each sample's own epoch, so that a sample seen again gets other views.
        sizes_B2: height and width of each image, pixels.
        positions_B: global index of each sample since the start of training; only a scripted overlap reads it.
    """
    views_N = np.arange(policy.views)
    params = _boxes(policy, sample_B, epoch_B, seed, sizes_B2, attempt=0)
    if policy.iou.samples:
        assert positions_B is not None, "a scripted overlap depends on the position in training"
        params = _script(params, policy, policy.iou, sample_B, epoch_B, seed, sizes_B2, positions_B)
    flips_N = np.array([view.flip for view in policy.view_policies])
    flip = uniform(seed, epoch_B, sample_B, views_N, Purpose.FLIP, 1)[..., 0] < flips_N
    drawn = uniform(seed, epoch_B, sample_B, views_N, Purpose.COLOUR, 12)
    return replace(params, flip=flip, **_colours(policy.view_policies, drawn))


def static_colour(policy: Policy, params: ViewParams, sample_B: Ints, epoch_B: Ints, seed: int) -> ViewParams:
    """The same crops and flips with one colour draw for all views of an image, from the first view's policy.

    HVP, section 6: with colour held fixed while selecting, hardness comes from the crops alone.
    """
    drawn = uniform(seed, epoch_B, sample_B, [0], Purpose.STATIC_COLOUR, 12)
    colours = _colours(policy.view_policies[:1], drawn)
    return replace(params, **{name: np.repeat(value, params.shape[1], axis=1) for name, value in colours.items()})


def crop_boxes(
    scale_N2: NDArray[np.floating], ratio_N2: NDArray[np.floating], drawn_BNT4: NDArray[np.floating], sizes_B2: Ints
) -> tuple[NDArray[np.int32], ...]:
    """Top, left, height, width, [B, N] each: torchvision's RandomResizedCrop.get_params, all tries at once.

    The first try that fits inside the image counts; where none does, a centre crop as large as the ratio allows.

    Args:
        drawn_BNT4: four uniform numbers a try: area, ratio, top, left.
    """
    height_B11, width_B11 = (sizes_B2[:, i].astype(np.float64)[:, None, None] for i in (0, 1))
    log_N2 = np.log(ratio_N2)
    area = height_B11 * width_B11 * _between(scale_N2[:, None, 0], scale_N2[:, None, 1], drawn_BNT4[..., 0])
    ratio = np.exp(_between(log_N2[:, None, 0], log_N2[:, None, 1], drawn_BNT4[..., 1]))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= width_B11) & (height > 0) & (height <= height_B11)
    first_BN1 = fits.argmax(-1)[..., None]

    def chosen(values_BNT: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.take_along_axis(values_BNT, first_BN1, -1)[..., 0]

    high, wide = chosen(height), chosen(width)
    top = np.floor(chosen(drawn_BNT4[..., 2]) * (height_B11[..., 0] - high + 1))
    left = np.floor(chosen(drawn_BNT4[..., 3]) * (width_B11[..., 0] - wide + 1))
    any_fits = fits.any(-1)
    boxes = zip((top, left, high, wide), centre_boxes(ratio_N2, sizes_B2), strict=True)
    return tuple(np.where(any_fits, random, centre).astype(np.int32) for random, centre in boxes)


def centre_boxes(ratio_N2: NDArray[np.floating], sizes_B2: Ints) -> tuple[NDArray[np.floating], ...]:
    """Top, left, height, width, [B, N] each: the largest centre crop whose ratio is in the range."""
    height_B1, width_B1 = (sizes_B2[:, i].astype(np.float64)[:, None] for i in (0, 1))
    least_N, greatest_N = ratio_N2[:, 0], ratio_N2[:, 1]
    tall, wide = width_B1 / height_B1 < least_N, width_B1 / height_B1 > greatest_N
    height = np.where(tall, np.rint(width_B1 / least_N), height_B1)
    width = np.where(wide, np.rint(height_B1 * greatest_N), width_B1)
    return (height_B1 - height) // 2, (width_B1 - width) // 2, height, width


def iou_bounds(script: IouScript, positions_B: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest allowed overlap for each position; 0 and 1 in the plain stretches."""
    share_B = np.clip(np.asarray(positions_B, np.float64) / script.samples, 0, 1)
    least_B, greatest_B = (script.start[i] + (script.end[i] - script.start[i]) * share_B for i in (0, 1))
    if script.alternate:
        plain_B = (np.asarray(positions_B) // script.alternate) % 2 == 1
        least_B, greatest_B = np.where(plain_B, 0.0, least_B), np.where(plain_B, 1.0, greatest_B)
    return least_B, greatest_B


def _boxes(policy: Policy, sample_B: Ints, epoch_B: Ints, seed: int, sizes_B2: Ints, attempt: int) -> ViewParams:
    """[B, N] crop boxes without flip or colour; each attempt has its own numbers."""
    views = policy.view_policies
    numbers = uniform(seed, epoch_B, sample_B, np.arange(len(views)), Purpose.CROP, 4 * TRIES, block=attempt * TRIES)
    scale_N2, ratio_N2 = np.array([view.scale for view in views]), np.array([view.ratio for view in views])
    drawn_BNT4 = numbers.reshape(len(sample_B), len(views), TRIES, 4)
    return ViewParams.identity(*crop_boxes(scale_N2, ratio_N2, drawn_BNT4, sizes_B2))


def _script(
    params: ViewParams,
    policy: Policy,
    script: IouScript,
    sample_B: Ints,
    epoch_B: Ints,
    seed: int,
    sizes_B2: Ints,
    positions_B: Ints,
) -> ViewParams:
    """Draws boxes again, image by image, until every pair of the first group overlaps as the script says."""
    least_B, greatest_B = iou_bounds(script, positions_B)

    def outside(drawn: ViewParams, rows: Ints) -> NDArray[np.float64]:
        iou = pair_iou(drawn[:, policy.spans[0]])
        return np.maximum(least_B[rows, None] - iou, iou - greatest_B[rows, None]).max(1)

    rows = np.arange(len(params))
    best_B = outside(params, rows)
    arrays = {name: getattr(params, name).copy() for name in ("top", "left", "height", "width")}
    for attempt in range(1, script.tries):
        rows = np.flatnonzero(best_B > 0)
        if not len(rows):
            break
        again = _boxes(policy, sample_B[rows], epoch_B[rows], seed, sizes_B2[rows], attempt)
        apart = outside(again, rows)
        better = apart < best_B[rows]
        best_B[rows[better]] = apart[better]
        for name, array in arrays.items():
            array[rows[better]] = getattr(again, name)[better]
    return replace(params, **arrays)


def _colours(views: tuple[ViewPolicy, ...], drawn_BNK: NDArray[np.floating]) -> dict[str, NDArray[np.generic]]:
    """Every colour field from twelve uniform numbers a view: four flags, four factors, order, sigma, two spare."""

    def of(name: str) -> NDArray[np.floating]:
        return np.array([getattr(view, name) for view in views], np.float64)

    jitter = drawn_BNK[..., 0] < of("jitter")
    factors = {}
    for column, name in enumerate(("brightness", "contrast", "saturation"), start=4):
        value = _between(np.maximum(1 - of(name), 0), 1 + of(name), drawn_BNK[..., column])
        factors[name] = np.where(jitter, value, 1).astype(np.float32)
    hue = _between(-of("hue"), of("hue"), drawn_BNK[..., 7])
    order = np.floor(drawn_BNK[..., 8] * len(JITTER_ORDERS))
    sigma_N2 = np.array([view.blur_sigma for view in views])
    sigma = _between(sigma_N2[:, 0], sigma_N2[:, 1], drawn_BNK[..., 9])
    return {
        "jitter": jitter,
        **factors,
        "hue": np.where(jitter, hue, 0).astype(np.float32),
        "order": np.where(jitter, order, 0).astype(np.uint8),
        "gray": drawn_BNK[..., 1] < of("gray"),
        "blur": np.where(drawn_BNK[..., 2] < of("blur"), sigma, 0).astype(np.float32),
        "solarize": drawn_BNK[..., 3] < of("solarize"),
    }


def _between(
    least: NDArray[np.floating], greatest: NDArray[np.floating], share: NDArray[np.floating]
) -> NDArray[np.floating]:
    return least + (greatest - least) * share
