"""From the shard addresses of a configuration to manifests, the order of samples, and a stream of views."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from jobs.run.arithmetic import Arithmetic, arithmetic_of
from jobs.run.config import DataConfig, PretrainConfig
from jobs.run.world import World
from models.objectives import Length
from pipelines.batch import Recipe, ScoringViews
from pipelines.policies import Policy, build_policy
from pipelines.stream import ViewStream
from shards.cache import ShardCache
from shards.errors import InputError
from shards.manifest import Manifest, open_manifest
from shards.order import SampleOrder
from shards.reader import SampleError, SampleReader

PUBLISHED_SIZE = 224  # pixels a side of the views that the papers' blur is for


@dataclass(frozen=True)
class Data:
    """Opened shards and the order of their samples; source numbers are positions in `manifests`."""

    manifests: tuple[Manifest, ...]
    order: SampleOrder
    reader: SampleReader
    real: int
    """How many of the manifests, the first ones, are of real images."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Tags of the folders of shards, in the order of their numbers, no two alike."""
        return tags([manifest.source for manifest in self.manifests], [m.root for m in self.manifests], self.real)


def open_data(config: PretrainConfig) -> Data:
    """Opens the real and the synthetic shards that the configuration names.

    Raises:
        InputError: neither is named, one cannot be read, or a share asks for what is not there.
    """
    addresses = (*config.data.real, *config.data.synthetic)
    if not addresses:
        raise InputError("data.real: no shards given; name a folder that `hardviews build` made")
    manifests = tuple(open_manifest(address) for address in addresses)
    counts = [manifest.counts for manifest in manifests]
    seed, block = config.seed, config.data.block
    order = SampleOrder(counts, shares(config.data, counts, 1), seed, block)
    if config.data.final_synthetic_share is not None:
        epochs = config.epochs if config.steps is None else config.steps * config.batch / order.epoch_length
        order = SampleOrder(counts, shares(config.data, counts, ceil(epochs)), seed, block)
    cache = ShardCache(config.data.cache, int(config.data.cache_gb * 1e9))
    return Data(manifests, order, SampleReader(manifests, cache), len(config.data.real))


def tags(given: Sequence[str], roots: Sequence[str], real: int) -> tuple[str, ...]:
    """A tag for each folder: the one it was built with. Where real and synthetic folders share it, what they are; where
    folders of a side share it, with their own names behind it, or numbers where these are alike too."""
    sides = ["real"] * real + ["synthetic"] * (len(given) - real)
    shared = set(given[:real]) & set(given[real:])
    names = [side if tag in shared else tag for tag, side in zip(given, sides, strict=True)]
    for ends in ([root.rstrip("/").rpartition("/")[2] for root in roots], [str(n + 1) for n in range(len(names))]):
        names = [f"{name}-{end}" if names.count(name) > 1 else name for name, end in zip(names, ends, strict=True)]
    return tuple(names)


def shares(config: DataConfig, counts: Sequence[np.ndarray], epochs: int) -> list[list[Fraction]]:
    """Per epoch the share of each folder of shards: that of its side, real before synthetic, divided by weight.

    Args:
        counts: per folder int64[S], samples in each shard.
    """
    first = config.synthetic_share
    last = first if config.final_synthetic_share is None else config.final_synthetic_share
    ramp = [first + (last - first) * epoch / max(epochs - 1, 1) for epoch in range(max(epochs, 1))]
    weights = [Fraction(weight) for weight in config.weights or [int(count.sum()) for count in counts]]
    sides = [weights[: len(config.real)], weights[len(config.real) :]]
    if not all(sides):
        ramp = [float(not sides[0])]
    return [
        [
            Fraction(share) * weight / sum(side)
            for share, side in zip((1 - of, of), sides, strict=True)
            for weight in side
        ]
        for of in ramp
    ]


def run_length(config: PretrainConfig, order: SampleOrder) -> Length:
    """Steps of the run and of an epoch."""
    per_epoch = order.epoch_length / config.batch
    by_epochs = max(1, ceil(config.epochs * per_epoch - 1e-9))
    return Length(by_epochs if config.steps is None else config.steps, per_epoch)


def run_policy(config: PretrainConfig) -> Policy:
    """All views of an image."""
    return config.views.build(config.backbone.image_size, config.selection.views)


def check_crops(config: PretrainConfig, backbone: nn.Module) -> None:
    """A ViT's or Swin's patches have to tile every crop it is given.

    Raises:
        InputError: they do not; the message names the field that decides the crop's size.
    """
    embed = getattr(backbone, "patch_embed", None)
    if not isinstance(embed, PatchEmbed):  # a ResNet takes any size
        return
    patch = int(embed.patch_size[0])
    policy = run_policy(config)
    trained = [("views.local_size", group.size) for group in policy.groups[1:]]
    scored = [("selection.resolution", crop.size) for crop in Recipe(policy, 0, scored_views(config)).outputs]
    for field, size in trained + scored:
        if size % patch:
            raise InputError(f"{field}: crops of {size} pixels are not tiled by patches of {patch}; take a multiple")


def strong_blur(config: PretrainConfig) -> str | None:
    """Advice where the blur, in proportion to the view's side, exceeds its policy's at 224 pixels; else None."""
    drawn = run_policy(config).groups
    for group, published in zip(drawn, build_policy(config.views.policy, PUBLISHED_SIZE).groups, strict=True):
        share = group.size / published.size
        least, greatest = (max(view.blur_sigma[end] for view in published.views) * share for end in (0, 1))
        blurs = [view.blur_sigma[1] for view in group.views if view.blur]
        if blurs and max(blurs) > 1.01 * greatest:  # the remedy is rounded
            return (
                f"views.blur_sigma: up to {max(blurs):g} pixels in views of {group.size} is "
                f"{max(blurs) / greatest:.1f} times the blur that {config.views.policy} means, in proportion; "
                f"give --views.blur-sigma {least:.3g} {greatest:.3g}, or --views.blur 0 for none"
            )
    return None


def check_labels(config: PretrainConfig, data: Data) -> None:
    """The oracle run needs every image's class, and one list of classes.

    Raises:
        InputError: a source has no classes, or the sources have different ones.
    """
    if not getattr(config.objective, "oracle", False):
        return
    for manifest in data.manifests:
        if not manifest.classes:
            raise InputError(
                f"objective.oracle: it leaves out negatives of the query's class, and {manifest.root} has no labels; "
                f"build it from labelled images or set it to false"
            )
    if len({tuple(manifest.classes) for manifest in data.manifests}) > 1:
        raise InputError(
            "objective.oracle: it leaves out negatives of the query's class, and data.real and data.synthetic have "
            "different classes; build them with the same or set it to false"
        )


def scored_views(config: PretrainConfig) -> ScoringViews:
    """How the views that selection scores differ from those that train."""
    return ScoringViews(config.selection.resolution, config.selection.static_colour)


def check_shards(logged: Sequence[Mapping[str, str]], manifests: Sequence[Manifest], flags: str) -> None:
    """Whether the shards are those that a log was written from, wherever they lie now.

    Args:
        logged: of each source, `source` and `fingerprint`.
        flags: by which a user can name where they lie.

    Raises:
        InputError: they differ.
    """
    if len(logged) != len(manifests):
        raise InputError(
            f"shards: the log was written from {len(logged)} data sets, here are {len(manifests)}; name the same"
        )
    for then, manifest in zip(logged, manifests, strict=True):
        if then["fingerprint"] != manifest.fingerprint:
            raise InputError(
                f"shards: {manifest.root} has changed since the log was written ({then['source']} shards "
                f"{then['fingerprint'][:12]}, now {manifest.fingerprint[:12]}); restore it, or name where the old ones "
                f"lie with {flags}"
            )


def check_batch(config: PretrainConfig, world: World) -> None:
    """Raises InputError where the batch does not divide among the ranks and the parts of each."""
    if config.batch % (parts := world.size * config.accumulate):
        raise InputError(
            f"batch: {config.batch} images do not divide into {parts} equal parts ({world.size} processes, "
            f"accumulate {config.accumulate}); take a multiple of {parts}"
        )


def view_dtype(arithmetic: Arithmetic, device: torch.device) -> torch.dtype:
    """Of the views that a run in this arithmetic trains on. On CUDA bf16 halves them: under autocast the encoders would
    round them themselves, at every forward."""
    return torch.bfloat16 if device.type == "cuda" and arithmetic == "bf16" else torch.float32


def open_stream(
    config: PretrainConfig, data: Data, world: World, step: int, quarantine: Callable[[SampleError], None]
) -> ViewStream:
    """This rank's batches from `step` on; the batch has been checked."""
    data.reader.follow(data.order, step * config.batch)
    return ViewStream(
        data.reader,
        data.order,
        run_policy(config),
        seed=config.seed,
        batch=config.batch // world.size,
        rank=world.rank,
        world=world.size,
        position=step * config.batch,
        device=world.device,
        dtype=view_dtype(arithmetic_of(config.precision, world.device), world.device),
        colour=config.views.colour,
        compiled=config.compile != "off",
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        selection=scored_views(config),
        quarantine=quarantine,
        max_failure_share=config.data.max_failures,
    )
