"""The configuration of a pretraining run: frozen dataclasses, and their JSON form."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import cattrs
import tyro

from jobs.run.folder import write_json
from jobs.run.metrics import LOGGERS
from jobs.run.optim import OptimizerConfig
from jobs.run.terminal import check_numbers
from models.backbones import BackboneConfig
from models.objectives import OBJECTIVES, ObjectiveConfig
from models.objectives.moby import MoBYConfig
from models.selection import SelectionConfig
from pipelines.policies import POLICIES, Interpolation, IouScript, Policy, ViewPolicy, build_policy
from shards.errors import InputError

Which = Literal["kept", "online", "target"]


@dataclass(frozen=True)
class Origin:
    """Where the weights that a run began with come from."""

    kind: Literal["timm", "file", "run", "backbone"]
    """timm's pretrained weights, a file, a run of this project, or a folder of `export-backbone`."""
    name: str
    """The model's, file's, run's or folder's name."""
    sha256: str
    """Of the file that was read."""
    step: int | None = None
    """Of a run's checkpoint."""
    encoder: str | None = None
    """Of a run: online or target."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    real: tuple[str, ...] = ()
    """Shards of real images: one or several folders or fsspec addresses such as s3://bucket/shards; none = no real
    images."""
    synthetic: tuple[str, ...] = ()
    """Shards of synthetic images, likewise."""
    weights: tuple[float, ...] = ()
    """Weight of each folder among the real and among the synthetic ones, in the order of data.real and then
    data.synthetic; none = by their number of images."""
    synthetic_share: float = 0.5
    """Share of synthetic images in every stretch of the stream (0 to 1); without synthetic shards it is 0."""
    final_synthetic_share: float | None = None
    """Share in the last epoch, approached linearly by epoch; None = constant."""
    block: int = 16
    """Number of shards that are shuffled together, and the largest number open at once."""
    threads: int = 0
    """CPU threads that read, decode and augment per process; 0 = one per core."""
    prefetch: int = 2
    """Batches prepared ahead."""
    max_failures: float = 0.01
    """Share of unreadable samples above which a run stops (0 to 1)."""
    cache: str = ""
    """Folder for shards fetched from an address; empty = a folder below the user's cache folder."""
    cache_gb: float = 50.0
    """Size the cache may grow to (10⁹ bytes); the least recently used shards go first."""

    def __post_init__(self) -> None:
        for name in ("real", "synthetic"):
            if isinstance(address := getattr(self, name), str):  # as one address was written before there were several
                object.__setattr__(self, name, (address,) if address else ())
        check_weights(self)
        for name in ("synthetic_share", "max_failures"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.{name}: {getattr(self, name)} must lie between 0 and 1")
        if self.final_synthetic_share is not None and not 0 <= self.final_synthetic_share <= 1:
            raise InputError(f"data.final_synthetic_share: {self.final_synthetic_share} must lie between 0 and 1")
        if self.threads < 0:
            raise InputError(f"data.threads: {self.threads} must be 0 or above; 0 = one per core")
        for name in ("block", "prefetch", "cache_gb"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name}: {getattr(self, name)} must be at least 1")


def check_weights(config: DataConfig) -> None:
    """Raises InputError for weights that are not one for each folder, are negative, or leave a side without images."""
    if not config.weights:
        return
    sides = (len(config.real), len(config.synthetic))
    if len(config.weights) != sum(sides):
        raise InputError(
            f"data.weights: {len(config.weights)} for {sides[0]} folders of real and {sides[1]} of synthetic images; "
            f"give one for each"
        )
    # Numbers that are not finite have a check of their own.
    for side in (config.weights[: sides[0]], config.weights[sides[0] :]):
        if min(side, default=0) < 0 or (side and not any(side)):
            raise InputError(f"data.weights: {list(side)}; give numbers of 0 or above, one of each side above 0")


# Fields that ViewsConfig and ViewPolicy have in common.
SHARED = ("ratio", "flip", "brightness", "contrast", "saturation", "hue", "gray", "blur", "blur_sigma", "solarize")


@dataclass(frozen=True)
class ViewsConfig:
    """How views are drawn."""

    policy: str = "byol"
    """Augmentation policy by name: byol, moco_v2, simclr, moco_v3, dino, ibot; small, for images of about 32 pixels."""
    local_views: int | None = None
    """Local crops per image of a multi-crop policy; None = the policy's own number."""
    local_size: int | None = None
    """Side of the local crops (pixels); None = the policy's own, 3/7 of the image's."""
    crop_scale: tuple[float, float] | None = None
    """Crop area (share of the image) of the views that pairs are chosen from; None = the policy's own."""
    jitter: float = 1.0
    """Factor on the policy's four colour jitter strengths; 1 = as published."""
    ratio: tuple[float, float] | None = None
    """Range of the crops' width over height; None = the policy's own, here and below, for all views of an image."""
    flip: float | None = None
    """Probability of a mirror image (0 to 1)."""
    jitter_probability: float | None = None
    """Probability of colour jitter (0 to 1)."""
    brightness: float | None = None
    """Strength of the jitter's brightness b, factors from 1 − b to 1 + b; `jitter` leaves what is given here alone."""
    contrast: float | None = None
    """Strength of the jitter's contrast, likewise."""
    saturation: float | None = None
    """Strength of the jitter's saturation, likewise."""
    hue: float | None = None
    """Strength of the jitter's hue, turns of the colour circle (0 to 0.5)."""
    gray: float | None = None
    """Probability of grayscale (0 to 1)."""
    blur: float | None = None
    """Probability of Gaussian blur (0 to 1)."""
    blur_sigma: tuple[float, float] | None = None
    """Range of the blur's sigma (pixels of the view)."""
    solarize: float | None = None
    """Probability of solarization (0 to 1)."""
    interpolation: Interpolation = "bilinear"
    """How crops are resized: bilinear, or bicubic as in DINO's and iBOT's code."""
    colour: Literal["fused", "clamped", "exact"] = "fused"
    """Colour operations: fused into few passes; clamped = the same, but values are clamped after each operation, as
    torchvision does; exact = one by one by Kornia."""
    iou: IouScript = field(default_factory=IouScript)
    """Scripted overlap of an image's views instead of free draws."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"views.policy: {self.policy!r} is not known; choose one of {', '.join(POLICIES)}")
        if self.local_size is not None and self.local_size < 1:
            raise InputError(f"views.local_size: {self.local_size} must be at least 1")
        if self.local_views is not None and self.local_views < 0:
            raise InputError(f"views.local_views: {self.local_views} must be 0 or above")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(f"views.crop_scale: {self.crop_scale} is out of range; give 0 < least ≤ greatest ≤ 1")
        if self.jitter < 0:
            raise InputError(f"views.jitter: {self.jitter} must be 0 or above")
        if self.jitter_probability is not None and not 0 <= self.jitter_probability <= 1:
            raise InputError(f"views.jitter_probability: {self.jitter_probability} must lie between 0 and 1")
        ViewPolicy(**{name: value for name, value in self.given().items() if name != "jitter"})

    def build(self, size: int, views: int) -> Policy:
        """The policy with `views` views of `size` pixels that compete, and its local views.

        Raises:
            InputError: local views asked of a policy without any.
        """
        policy = build_policy(self.policy, size, views)
        if self.local_views is not None and len(policy.groups) == 1:
            raise InputError(f"views.local_views: {self.policy} has no local views; leave it out, or take dino or ibot")
        if self.local_views is not None:
            policy = build_policy(self.policy, size, views, self.local_views)
        first = policy.groups[0]
        if self.crop_scale is not None:
            first = replace(first, views=tuple(replace(view, scale=self.crop_scale) for view in first.views))
        local = tuple(replace(group, size=self.local_size or group.size) for group in policy.groups[1:])
        groups = (first, *local)
        groups = tuple(replace(g, views=tuple(self._changed(view) for view in g.views)) for g in groups)
        return replace(policy, groups=groups, iou=self.iou, interpolation=self.interpolation)

    def given(self) -> dict[str, Any]:
        """The fields of `ViewPolicy` that are set here for all views, by their names there."""
        values = {name: getattr(self, name) for name in SHARED} | {"jitter": self.jitter_probability}
        return {name: value for name, value in values.items() if value is not None}

    def _changed(self, view: ViewPolicy) -> ViewPolicy:
        return replace(_jittered(view, self.jitter), **self.given())


def _jittered(view: ViewPolicy, factor: float) -> ViewPolicy:
    strengths = {name: getattr(view, name) * factor for name in ("brightness", "contrast", "saturation")}
    return replace(view, **strengths, hue=min(view.hue * factor, 0.5))


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 1000
    """Steps between checkpoints; one more is written at the end, and where a signal stops the run."""
    keep: int = 3
    """Newest checkpoints that are kept; the one with the best held-out kNN accuracy is kept besides."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"checkpoint.{name}: {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while training."""

    every: int = 10
    """Steps between lines of metrics."""
    health_every: int = 100
    """Steps between gradient norms by layer, features' standard deviation and RankMe, embeddings' alignment and
    uniformity, and analyses of contrastive tasks; 0 = never."""
    bank: int = 16_384
    """Size of the memory bank, in images; 0 = none. Every step adds its images' features, and their kNN accuracy
    against the bank is logged."""
    knn_every: int = 0
    """Steps between kNN evaluations of the held-out shards; there is one at the start and the end besides."""
    knn_train: str = ""
    """Labelled shards or ImageFolder that the kNN evaluation learns from; empty = no evaluation."""
    knn_test: str = ""
    """Held-out shards or ImageFolder that the kNN evaluation is scored on."""
    max_bad_steps: int = 20
    """Steps in a row with a non-finite loss or gradient after which the run stops; such steps are skipped."""
    stop_not_learning: int = 0
    """End the run at the first line of metrics from this step on at which its verdict is not `learning`; 0 = never."""
    loggers: tuple[str, ...] = ("json", "tensorboard")
    """Where metrics go: json, tensorboard, wandb, mlflow."""

    def __post_init__(self) -> None:
        for name in ("every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"monitor.{name}: {getattr(self, name)} must be at least 1")
        for name in ("health_every", "bank", "knn_every", "stop_not_learning"):
            if getattr(self, name) < 0:
                raise InputError(f"monitor.{name}: {getattr(self, name)} must be 0 or above")
        if unknown := set(self.loggers) - set(LOGGERS):
            raise InputError(f"monitor.loggers: {', '.join(sorted(unknown))} unknown; known: {', '.join(LOGGERS)}")
        if self.stop_not_learning and not 0 < self.health_every <= self.stop_not_learning:
            raise InputError(
                f"monitor.stop_not_learning: {self.stop_not_learning} comes before embeddings are looked at "
                f"(monitor.health_every {self.health_every}), without which no run is learning; lower the latter"
            )
        if bool(self.knn_train) != bool(self.knn_test):
            raise InputError("monitor.knn_train and monitor.knn_test: one is given without the other; give both")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what a run computes."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = field(default_factory=MoBYConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    preset: Annotated[str, tyro.conf.Suppress] = ""
    """Name of the preset that the values come from; empty where none does."""
    init: str = ""
    """Weights to start from: a timm name (pretrained weights from this machine, or fetched), a safetensors or PyTorch
    file, a run's folder, or a folder of `export-backbone`; empty = random ones. Schedules begin anew."""
    which: Which = "kept"
    """Which encoder's weights --init takes of a run or a checkpoint with two: online, target, or kept = the one that is
    evaluated. Both encoders begin with them."""
    init_heads: bool = False
    """Take the heads of --init's run too, where they fit; otherwise they begin at random."""
    origin: Annotated[Origin | None, tyro.conf.Suppress] = None
    """What --init was; written when the run begins."""
    epochs: float = 300.0
    """Length in epochs: passes over the real images (over the synthetic ones where there are no real ones)."""
    steps: int | None = None
    """Length in steps; overrides epochs. 0 = write the first checkpoint and end, for the weights of --init as a run."""
    batch: int = 512
    """Images per step over all processes."""
    accumulate: int = 1
    """Parts that each process splits its images of a step into, to save memory. The parts' gradients add up to the
    whole batch's. What compares images of a batch sees one part only: BatchNorm's statistics, SwAV's assignments, the
    negatives of MoCo v3 and SimCLR, and the share on random pairs (selection.random_share). Queues
    and centres are updated once a step, by all parts."""
    seed: int = 0
    """Seed of every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto = cuda where there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Arithmetic: fp32; tf32 = the same, with products rounded to TF32 (cuda); bf16 = bf16 in the encoders, fp32 in
    losses and in all that is kept; auto = bf16 on cuda, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the encoders; auto = on for cuda."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, to save memory."""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise InputError(f"epochs: {self.epochs} must be above 0")
        if self.steps is not None and self.steps < 0:
            raise InputError(f"steps: {self.steps} must be 0 or above")
        if not self.init and (self.which != "kept" or self.init_heads):
            field = "init_heads" if self.init_heads else "which"
            raise InputError(f"{field}: it is about the weights of --init, and there is none; leave it out or give one")
        for name in ("batch", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be at least 1")
        check_numbers(self, "")


KINDS_OF_VALUE = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _strict() -> cattrs.Converter:
    """A converter that refuses unknown keys and values of a wrong type. cattrs alone would convert them: any text to
    True, and text to a list of its letters."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in KINDS_OF_VALUE:
        converter.register_structure_hook(kind, _exact)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _one_of)
    converter.register_structure_hook_func(
        lambda kind: get_origin(kind) is tuple, lambda value, kind: _list_of(converter, value, kind)
    )
    return converter


def _exact(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not {KINDS_OF_VALUE[kind]}")
    return value


def _one_of(value: Any, kind: Any) -> Any:
    if value not in get_args(kind):
        raise ValueError(f"{value!r} is not known; choose one of {', '.join(map(str, get_args(kind)))}")
    return value


def _list_of(converter: cattrs.Converter, value: Any, kind: Any) -> tuple[Any, ...]:
    kinds = get_args(kind)
    if not isinstance(value, list | tuple) or (kinds[-1] is not ... and len(value) != len(kinds)):
        length = "" if kinds[-1] is ... else f" of {len(kinds)}"
        raise ValueError(f"{value!r} is not a list{length}; write it as [a,b]")
    kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
    return tuple(converter.structure(part, kind) for part, kind in zip(value, kinds, strict=True))


def _converter() -> cattrs.Converter:
    """The strict converter; an objective's name in OBJECTIVES is stored beside its fields."""
    converter, plain = _strict(), _strict()
    names = {config: name for name, (config, _) in OBJECTIVES.items()}

    def structure(value: dict[str, Any], _: type) -> Any:
        name = value.get("name")
        if name not in OBJECTIVES:
            raise ValueError(f"objective.name: {name!r} is unknown; known: {', '.join(OBJECTIVES)}")
        return plain.structure({key: value[key] for key in value if key != "name"}, OBJECTIVES[name][0])

    converter.register_structure_hook_func(lambda kind: kind == ObjectiveConfig, structure)
    converter.register_unstructure_hook_func(
        lambda kind: kind == ObjectiveConfig, lambda value: {"name": names[type(value)], **plain.unstructure(value)}
    )
    return converter


def to_plain(config: PretrainConfig) -> dict[str, Any]:
    """Dicts, lists, numbers and strings, for JSON and checkpoints."""
    return _converter().unstructure(config, PretrainConfig)


def from_plain(plain: dict[str, Any]) -> PretrainConfig:
    """The inverse of `to_plain`.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range; with the field's dotted name.
    """
    data = plain.get("data")
    if isinstance(data, dict):  # an address by itself, as configurations of before hold it
        texts = {name: data[name] for name in ("real", "synthetic") if isinstance(data.get(name), str)}
        plain = {**plain, "data": {**data, **{name: [text] if text else [] for name, text in texts.items()}}}
    try:
        return _converter().structure(plain, PretrainConfig)
    except cattrs.BaseValidationError as error:
        message = cattrs.transform_error(error, path="config", format_exception=lambda reason, _: str(reason))
        raise InputError("; ".join(map(_named, message))) from error
    except ValueError as error:
        raise InputError(str(error)) from error


def _named(message: str) -> str:
    """cattrs' `reason @ config.field` as `field: reason`; our own messages begin with the field already."""
    reason, _, place = message.rpartition(" @ ")
    return reason if re.match(r"[\w.]+: ", reason) else f"{place.removeprefix('config').strip('.')}: {reason}"


def save_config(config: PretrainConfig, path: Path) -> None:
    """Writes `config.json` of a run folder."""
    write_json(path, to_plain(config))


def load_config(path: Path) -> PretrainConfig:
    """Reads `config.json` of a run folder.

    Raises:
        InputError: as `from_plain`, or no JSON.
    """
    try:
        return from_plain(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise InputError(f"config: {path} is no JSON ({error})") from error
