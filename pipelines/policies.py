"""Augmentation policies: which ranges and probabilities each view is drawn from.

A policy is groups of views; a group is one output size and a cycle of view policies, so that with BYOL's pair (T, T′)
even views use T and odd ones T′ however many there are. All resizing is antialiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from shards.errors import InputError

Interpolation = Literal["bilinear", "bicubic"]


def _check(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise InputError(f"views.{name}: {value!r} is out of range; {remedy}")


@dataclass(frozen=True)
class ViewPolicy:
    """One view's ranges and probabilities, applied in the order of the fields."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn on a log scale."""
    flip: float = 0.5
    """Probability of a mirror image."""
    jitter: float = 0.8
    """Probability of ColorJitter, whose four operations come in random order."""
    brightness: float = 0.4
    """ColorJitter's brightness b: factors from max(0, 1 − b) to 1 + b."""
    contrast: float = 0.4
    """ColorJitter's contrast, likewise."""
    saturation: float = 0.2
    """ColorJitter's saturation, likewise."""
    hue: float = 0.1
    """ColorJitter's hue h: shifts from −h to h turns of the colour circle, at most 0.5."""
    gray: float = 0.2
    """Probability of grayscale."""
    blur: float = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's sigma, pixels of the view."""
    solarize: float = 0.0
    """Probability of solarization: values of 128 and more (of 255) inverted."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability is between 0 and 1")
        for name in ("brightness", "contrast", "saturation"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "give a strength of 0 or more")
        _check(0 <= self.hue <= 0.5, "hue", self.hue, "give a shift between 0 and 0.5 turns")
        _check(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "give 0 < least ≤ greatest ≤ 1")
        _check(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "give 0 < least ≤ greatest")
        _check(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", self.blur_sigma, "give 0 < least ≤ greatest")


@dataclass(frozen=True)
class ViewGroup:
    """`count` views of one output size; view v uses `views[v % len(views)]`."""

    views: tuple[ViewPolicy, ...]
    """The view policies to cycle through."""
    count: int = 2
    """Views of an image in this group."""
    size: int = 224
    """Side of the square view, pixels."""

    def __post_init__(self) -> None:
        _check(len(self.views) > 0, "views", self.views, "give at least one view policy")
        _check(self.count >= 1, "count", self.count, "give at least 1 view")
        _check(self.size >= 1, "size", self.size, "give a side of at least 1 pixel")

    def view(self, index: int) -> ViewPolicy:
        """The policy of the group's view `index`."""
        return self.views[index % len(self.views)]


@dataclass(frozen=True)
class IouScript:
    """A scripted difficulty (HVP, appendix F): an image's views are drawn again until their overlap is in a range.

    The range moves linearly from `start` to `end` over `samples` and rests there. A switch between scripted and plain
    stretches follows the same counter, so what is drawn depends on nothing but the position in training.
    """

    start: tuple[float, float] = (0.0, 0.30)
    """Least and greatest intersection over union of each pair of the first group's views, at the beginning."""
    end: tuple[float, float] = (0.0, 0.35)
    """The same at the end."""
    samples: int = 0
    """Length of the schedule, images; 0 = no script, free draws."""
    tries: int = 20
    """Draws per image; after them, the draw nearest to the range is kept."""
    alternate: int = 0
    """Scripted and plain draws take turns every so many images, scripted first; 0 for always scripted."""

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            least, greatest = getattr(self, name)
            _check(0 <= least <= greatest <= 1, name, (least, greatest), "give 0 ≤ least ≤ greatest ≤ 1")
        _check(self.samples >= 0, "samples", self.samples, "give 0 or a number of images")
        _check(1 <= self.tries <= 400, "tries", self.tries, "give 1 to 400 draws")
        _check(self.alternate >= 0, "alternate", self.alternate, "give 0 or a number of images")


@dataclass(frozen=True)
class Policy:
    """All views of an image. The first group's views are the ones that pairs are chosen from."""

    groups: tuple[ViewGroup, ...]
    """Groups in the order of the crops: with multi-crop, the global views and then the local ones."""
    iou: IouScript = IouScript()
    """Scripted overlap; off by default."""
    interpolation: Interpolation = "bilinear"
    """How crops are resized: bilinear, or bicubic as in DINO's and iBOT's code."""

    def __post_init__(self) -> None:
        known = get_args(Interpolation)
        _check(self.interpolation in known, "interpolation", self.interpolation, f"take {' or '.join(known)}")
        _check(len(self.groups) > 0, "groups", self.groups, "give at least one group of views")
        _check(self.groups[0].count >= 2, "views", self.groups[0].count, "give at least 2 views, to have a pair")

    @property
    def views(self) -> int:
        """Views of an image over all groups."""
        return sum(group.count for group in self.groups)

    @property
    def view_policies(self) -> tuple[ViewPolicy, ...]:
        """The policy of each view, groups side by side."""
        return tuple(group.view(v) for group in self.groups for v in range(group.count))

    @property
    def spans(self) -> tuple[slice, ...]:
        """Each group's columns among all views."""
        ends = [sum(group.count for group in self.groups[: g + 1]) for g in range(len(self.groups))]
        return tuple(slice(end - group.count, end) for end, group in zip(ends, self.groups, strict=True))

    def with_views(self, *counts: int) -> Policy:
        """The same policy with other numbers of views: the first group's, then, if given, the next ones'.

        Raises:
            InputError: for more counts than groups, or fewer than 2 views in the first group.
        """
        if len(counts) > len(self.groups):
            raise InputError(f"views: {counts}: the policy has {len(self.groups)} groups; give as many counts")
        resized = [replace(group, count=count) for group, count in zip(self.groups, counts, strict=False)]
        return replace(self, groups=(*resized, *self.groups[len(resized) :]))


BLURRED = ViewPolicy((0.08, 1.0), blur=1.0)
SOLARIZED = ViewPolicy((0.08, 1.0), blur=0.1, solarize=0.2)


def byol(size: int) -> Policy:
    """BYOL's asymmetric pair T, T′ (Grill et al. 2020, appendix B), which MoBY and SynBY use too."""
    return Policy((ViewGroup((BLURRED, SOLARIZED), 2, size),))


def moco_v2(size: int) -> Policy:
    """MoCo v2 (Chen et al. 2020), also SimSiam's and MoCHi's: stronger saturation, blur half of the time."""
    return Policy((ViewGroup((ViewPolicy(saturation=0.4, blur=0.5),), 2, size),))


def simclr(size: int) -> Policy:
    """SimCLR (Chen et al. 2020, appendix A) at colour strength 1, crops from 0.08."""
    view = ViewPolicy((0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)
    return Policy((ViewGroup((view,), 2, size),))


def moco_v3(size: int) -> Policy:
    """MoCo v3 for ViTs (Chen et al. 2021, section 4): BYOL's pair."""
    return byol(size)


def dino(size: int) -> Policy:
    """DINO's multi-crop (Caron et al. 2021): 2 global views of 0.4–1, 8 local ones of 0.05–0.4 at 3/7 of the side."""
    return multi_crop(size, split=(0.05, 0.4, 1.0), local_views=8)


def ibot(size: int) -> Policy:
    """iBOT's multi-crop (Zhou et al. 2022): 2 global views of 0.25–1, 10 local ones of 0.05–0.25 at 3/7 of the side."""
    return multi_crop(size, split=(0.05, 0.25, 1.0), local_views=10)


def small(size: int) -> Policy:
    """For images of about 32 pixels: SimCLR's for CIFAR-10 (Chen et al. 2020, appendix B.9), jitter at half
    strength, no blur, which takes away what so few pixels show; with crops from 0.2."""
    return Policy((ViewGroup((ViewPolicy(saturation=0.4),), 2, size),))


def multi_crop(size: int, split: tuple[float, float, float], local_views: int) -> Policy:
    """Global views of the areas split[1]–split[2] at `size`, local ones of split[0]–split[1] at 3/7 of it."""
    views = tuple(replace(view, scale=split[1:]) for view in (BLURRED, SOLARIZED))
    local = ViewPolicy(scale=split[:2], blur=0.5)
    return Policy((ViewGroup(views, 2, size), ViewGroup((local,), local_views, round(size * 3 / 7))))


POLICIES: dict[str, Callable[[int], Policy]] = {
    "byol": byol,
    "moco_v2": moco_v2,
    "simclr": simclr,
    "moco_v3": moco_v3,
    "dino": dino,
    "ibot": ibot,
    "small": small,
}


def build_policy(name: str, size: int, *counts: int) -> Policy:
    """A policy by name at a view size in pixels, with `counts` views in its groups where given.

    Raises:
        InputError: for an unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise InputError(f"views.policy: {name!r} is not known; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](size).with_views(*counts)
