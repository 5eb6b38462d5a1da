"""Which backbone is evaluated: a run's checkpoint, a timm model with weights from this machine, or an untrained one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from jobs.evaluation.frozen import IMAGENET_MEAN, IMAGENET_STD, Frozen, Pool
from jobs.run.checkpoint import Which, load_backbone
from jobs.run.config import load_config
from jobs.run.folder import open_run
from jobs.run.weights import cached_weights
from models.backbones import build_backbone
from shards.errors import InputError

LARGEST = 4096  # side of the crops, pixels


@dataclass(frozen=True)
class ModelConfig:
    """The backbone to evaluate: --run, or --timm, each also untrained; or the pixels that a run's backbone sees."""

    run: Path | None = None
    """Run folder whose checkpoint is evaluated; scores are kept in it."""
    step: int | None = None
    """Step of the checkpoint; None = the newest."""
    which: Which = "kept"
    """Encoder of the checkpoint: kept = the one the objective's paper evaluates (DINO and iBOT the momentum target,
    the others the online encoder), or one by name; without a target, target means online."""
    timm: str = ""
    """Instead of a run: a timm model's name (weights from the local cache) or local-dir:DIR."""
    weights: Path | None = None
    """Weights for --timm: a safetensors or .pth file on this machine."""
    download: bool = False
    """Let timm fetch weights that are not on this machine."""
    untrained: bool = False
    """Fresh weights (seed 0) in the run's or timm's architecture: the baseline."""
    pixels: bool = False
    """With --run: the crops' own pixels instead of a backbone's features, a baseline."""
    size: int = 0
    """Side of the crops (pixels); 0 = the model's own."""
    pool: Pool = "default"
    """Features: the model's own pooling, the class token, the mean of the patches, or both side by side."""


def load_frozen(config: ModelConfig) -> tuple[Frozen, dict[str, Any]]:
    """The backbone and what the scores file says of it.

    Raises:
        InputError: none or two are asked for; no checkpoint; other architecture; weights that are not on this machine.
    """
    if (config.run is None) == (not config.timm):
        raise InputError("run: give either --run RUN or --timm NAME")
    if config.pixels and (config.run is None or config.untrained or config.pool != "default"):
        raise InputError("pixels: they are features by themselves; give --run and --size at most beside them")
    frozen, facts = _from_run(config, config.run) if config.run is not None else _from_timm(config)
    if config.size:
        check_size(frozen)
    return frozen, facts


def check_size(frozen: Frozen) -> None:
    """Raises InputError for a side of crops that the backbone does not take."""
    try:
        if frozen.size > LARGEST:
            raise ValueError(f"at most {LARGEST} pixels are taken")
        with torch.inference_mode():
            frozen.features(torch.zeros(1, 3, frozen.size, frozen.size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"size: {frozen.name} cannot take crops of {frozen.size} pixels ({reason})") from error


def _from_run(config: ModelConfig, run: Path) -> tuple[Frozen, dict[str, Any]]:
    folder = open_run(run)
    name = folder.path.resolve().name
    if config.pixels:
        size = config.size or load_config(folder.config).backbone.image_size
        return Frozen(nn.Flatten(), "raw pixels", size), {"source": "pixels", "name": "raw pixels", "step": None}
    if config.untrained:
        settings = load_config(folder.config)
        with fresh(seed=0):
            model = build_backbone(settings.backbone, 0.0)
        facts: dict[str, Any] = {"source": "untrained", "name": f"untrained {settings.backbone.name}", "step": None}
    else:
        model, settings, step, which = load_backbone(folder.path, which=config.which, step=config.step)
        facts = {"source": "run", "name": name, "step": step, "which": which}
    size = config.size or settings.backbone.image_size
    return Frozen(model, facts["name"], size, config.pool), facts


def _from_timm(config: ModelConfig) -> tuple[Frozen, dict[str, Any]]:
    name = config.timm
    if config.step is not None:
        raise InputError(f"step: {config.step} is a run's; leave it out with --timm")
    if not name.startswith("local-dir:") and not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise InputError(f"timm: {name} is no model of timm {timm.__version__}; known ones: {near}")
    known = None if name.startswith("local-dir:") else timm.get_pretrained_cfg(name)
    fixed = known is not None and known.fixed_input_size  # others take any size, and no such argument
    options: dict[str, Any] = {"img_size": config.size} if config.size and fixed else {}
    with fresh(seed=0):
        try:
            model: Any = timm.create_model(name, num_classes=0, **weights_of(config), **options)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"timm: {name} cannot be made ({str(error).splitlines()[0]})") from error
    cfg = model.pretrained_cfg
    size = config.size or int(cfg.get("input_size", (3, 224, 224))[-1])
    facts = {"source": "untrained" if config.untrained else "timm", "step": None,
             "name": f"untrained {name}" if config.untrained else name}  # fmt: skip
    mean, std = tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))
    return Frozen(model, facts["name"], size, config.pool, mean, std), facts


def weights_of(config: ModelConfig) -> dict[str, Any]:
    """Arguments of timm.create_model that find the weights without a network, unless the user asks for it.

    Raises:
        InputError: the weights are not on this machine.
    """
    if config.untrained:
        return {"pretrained": False}
    if config.weights is not None:
        if not config.weights.is_file():
            raise InputError(f"weights: {config.weights} does not exist; give a safetensors or .pth file")
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(config.weights)}}
    if config.download or config.timm.startswith("local-dir:"):
        return {"pretrained": True}
    cached = cached_weights(config.timm)
    if cached is None:
        raise InputError(
            f"weights: those of {config.timm} are not on this machine; give --weights FILE, or --download to fetch them"
        )
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}


@contextmanager
def fresh(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on `seed` alone, and torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
