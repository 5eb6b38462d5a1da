"""What a batch is made from and what comes out: rows with their parameters, the crops to make, the finished batch.

Shape suffixes: B images, N views over all groups, n views of one group, S side of a view in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.draw import draw, static_colour
from pipelines.params import FIELDS, ViewParams
from pipelines.policies import Interpolation, Policy
from shards.errors import InputError
from shards.reader import SampleError

STAGES = ("draw", "read", "decode", "crop", "colour", "copy")  # of making a batch, in the clocks of both producers
COLOURS = ("fused", "clamped", "exact")  # ways to compute the colour of views


def colour_step(name: str, fused: Callable[..., None]) -> Callable[..., None]:
    """The colour step on crops: (uint8 [V, S, S, 3], parameters, [V, 3, S, S] to write). `fused` is the backend's own,
    for all operations at once; `exact` serves both backends.

    Raises:
        InputError: for an unknown name.
    """
    if name not in COLOURS:
        raise InputError(f"views.colour: {name!r} is not known; choose one of {', '.join(COLOURS)}")
    if name == "exact":
        from pipelines.colour_exact import exact

        return exact
    return partial(fused, clamp=name == "clamped")


class Facts(Protocol):
    """Columns of the manifest that views need, one element per sample."""

    @property
    def height(self) -> NDArray[np.int32]: ...
    @property
    def width(self) -> NDArray[np.int32]: ...
    @property
    def label(self) -> NDArray[np.int32]: ...


class Reader(Protocol):
    """The part of `shards.reader.SampleReader` that views need."""

    def columns(self, ids: NDArray[np.int64]) -> Facts: ...
    def read(self, ids: NDArray[np.int64]) -> Sequence[NDArray[np.uint8] | SampleError]: ...
    def substitute(self, sample_id: int, attempt: int) -> int: ...
    def name(self, sample_id: int) -> tuple[str, str]: ...


class Samples(Protocol):
    """`shards.order.Samples`: what stands at a stretch of positions."""

    @property
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def sources(self) -> NDArray[np.int16]: ...
    @property
    def epochs(self) -> NDArray[np.int32]: ...


class Order(Protocol):
    """The part of `shards.order.SampleOrder` that views need."""

    def at(self, position: int, count: int) -> Samples: ...


@dataclass(frozen=True)
class ScoringViews:
    """How the views that pairs are chosen from differ from those that train; by default not at all."""

    size: int | None = None
    """Side in pixels of the first group's views while selecting, cropped from the same decode; None for the same."""
    static_colour: bool = False
    """One colour draw for all views of an image while selecting (HVP, section 6)."""

    @property
    def differs(self) -> bool:
        """Whether selection has crops of its own."""
        return self.size is not None or self.static_colour


@dataclass(frozen=True)
class Output:
    """One tensor of crops: a group of views at a size, with its own or the static colours."""

    span: slice
    """The group's columns among all views."""
    size: int
    """Side, pixels."""
    interpolation: Interpolation = "bilinear"
    static: bool = False
    blur_scale: float = 1.0
    """Sigma is in pixels of the trained view; a smaller view has a smaller one."""

    @property
    def count(self) -> int:
        """Views of an image."""
        return self.span.stop - self.span.start

    @property
    def key(self) -> tuple[int, int]:
        """What the crops depend on; outputs that agree in it share them."""
        return self.span.start, self.size

    def params(self, own: ViewParams, static: ViewParams | None) -> ViewParams:
        """[B, n]: the parameters of this output's views."""
        chosen = own if static is None or not self.static else static
        chosen = chosen[:, self.span]
        return chosen if self.blur_scale == 1 else replace(chosen, blur=chosen.blur * np.float32(self.blur_scale))


@dataclass(frozen=True)
class Recipe:
    """All that the views of a sample depend on, besides the sample."""

    policy: Policy
    seed: int
    selection: ScoringViews = ScoringViews()

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The trained groups, then, where selection differs, the same groups as selection sees them."""
        groups = self.policy.groups
        spans, interpolation = self.policy.spans, self.policy.interpolation
        trained = [Output(span, group.size, interpolation) for span, group in zip(spans, groups, strict=True)]
        if not self.selection.differs:
            return tuple(trained)
        scale = (self.selection.size or groups[0].size) / groups[0].size
        static = self.selection.static_colour
        return (
            *trained,
            *(replace(o, size=max(1, round(o.size * scale)), static=static, blur_scale=scale) for o in trained),
        )

    def draw(
        self,
        sample_B: NDArray[np.int64],
        epoch_B: NDArray[np.int32],
        sizes_B2: NDArray[np.int32],
        positions_B: NDArray[np.int64],
    ) -> tuple[ViewParams, ViewParams | None]:
        """[B, N]: the views' parameters, and those with static colour where selection has it."""
        params = draw(self.policy, sample_B, epoch_B, self.seed, sizes_B2, positions_B)
        if not self.selection.static_colour:
            return params, None
        return params, static_colour(self.policy, params, sample_B, epoch_B, self.seed)


@dataclass
class BatchPlan:
    """A batch before its pixels: its samples and all parameters. A broken sample is replaced and its row drawn anew."""

    recipe: Recipe
    position: int
    sample_B: NDArray[np.int64]
    source_B: NDArray[np.int16]
    epoch_B: NDArray[np.int32]
    label_B: NDArray[np.int32]
    sizes_B2: NDArray[np.int32]
    params: ViewParams
    static: ViewParams | None
    replaced: list[SampleError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_B)

    def substitute(self, rows: Sequence[int], ids: Sequence[int], reader: Reader) -> None:
        """Puts other samples of the same source, and so of the same epoch count, into some rows."""
        index = np.asarray(rows)
        self.sample_B[index] = ids
        self.label_B[index], self.sizes_B2[index] = _facts(reader, self.sample_B[index])
        drawn = self.recipe.draw(self.sample_B[index], self.epoch_B[index], self.sizes_B2[index], self.position + index)
        for old, new in zip((self.params, self.static), drawn, strict=True):
            if old is not None and new is not None:
                for name in FIELDS:
                    getattr(old, name)[index] = getattr(new, name)


def plan_batch(order: Order, reader: Reader, recipe: Recipe, position: int, *, count: int) -> BatchPlan:
    """The rows at `count` positions from `position` on, with all parameters drawn."""
    samples = order.at(position, count)
    sample_B, source_B, epoch_B = samples.ids.copy(), samples.sources, samples.epochs
    label_B, sizes_B2 = _facts(reader, sample_B)
    params, static = recipe.draw(sample_B, epoch_B, sizes_B2, position + np.arange(count))
    return BatchPlan(recipe, position, sample_B, source_B, epoch_B, label_B, sizes_B2, params, static)


@dataclass(frozen=True)
class ViewBatch:
    """N views of B images with everything that is known about them."""

    crops: tuple[Tensor, ...]
    """[B, n, 3, S, S] per group of views, normalised by ImageNet's mean and standard deviation, on the device."""
    params: ViewParams
    """[B, N], all groups side by side."""
    sample_B: NDArray[np.int64]
    source_B: NDArray[np.int16]
    epoch_B: NDArray[np.int32]
    label_B: NDArray[np.int32]
    sizes_B2: NDArray[np.int32]
    """Height and width of the images, pixels."""
    position: int
    """Global index of this rank's first row since the start of training."""
    replaced: tuple[SampleError, ...]
    """What was wrong with the samples that others stand in for here."""
    selection_crops: tuple[Tensor, ...] | None
    """Like `crops`, as selection sees them; None where it sees the same."""

    def __len__(self) -> int:
        return len(self.sample_B)

    @property
    def scored(self) -> tuple[Tensor, ...]:
        """The crops that pairs are chosen from."""
        return self.crops if self.selection_crops is None else self.selection_crops

    def rows(self, part: slice) -> ViewBatch:
        """Neighbouring rows as a batch of their own, sharing memory; what was replaced stays with the whole."""
        start, _, step = part.indices(len(self))
        assert step == 1, "positions of a batch are consecutive"
        scored = self.selection_crops
        return ViewBatch(
            crops=tuple(crops[part] for crops in self.crops),
            params=self.params[part],
            sample_B=self.sample_B[part],
            source_B=self.source_B[part],
            epoch_B=self.epoch_B[part],
            label_B=self.label_B[part],
            sizes_B2=self.sizes_B2[part],
            position=self.position + start,
            replaced=(),
            selection_crops=None if scored is None else tuple(crops[part] for crops in scored),
        )


def finish(rows: BatchPlan, tensors: Sequence[Tensor]) -> ViewBatch:
    """The batch of finished rows; `tensors` in the order of the recipe's outputs."""
    groups = len(rows.recipe.policy.groups)
    return ViewBatch(
        crops=tuple(tensors[:groups]),
        params=rows.params,
        sample_B=rows.sample_B,
        source_B=rows.source_B,
        epoch_B=rows.epoch_B,
        label_B=rows.label_B,
        sizes_B2=rows.sizes_B2,
        position=rows.position,
        replaced=tuple(rows.replaced),
        selection_crops=tuple(tensors[groups:]) or None,
    )


def wait_for(stream: torch.cuda.Stream) -> None:
    """Sleeps until the stream has done what it was given: a batch is whole when its promise is kept, and whoever takes
    it needs no stream of the producer's."""
    done = torch.cuda.Event(blocking=True)
    done.record(stream)
    done.synchronize()


def _facts(reader: Reader, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    columns = reader.columns(ids)
    return columns.label.copy(), np.stack([columns.height, columns.width], 1)
