"""The weights that a run starts from: finding them, putting them into its encoders, saying where they come from."""

import argparse
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jobs.run import checkpoint
from jobs.run.config import Origin, PretrainConfig, Which, from_plain
from jobs.run.terminal import note, warn
from models.objectives import Objective, ObjectiveConfig
from models.objectives.base import Encoder
from models.weights import backbone_weights, load_weights
from pipelines.colour import MEAN, STD
from shards.errors import InputError

IMAGENET = (MEAN, STD)


@dataclass(frozen=True)
class StartingWeights:
    """Tensors by name, nested as in their file, and where they come from."""

    content: Mapping[str, Any]
    origin: Origin
    encoder: Which
    objective: ObjectiveConfig | None = None
    """Of a run."""
    input: Mapping[str, Any] | None = None
    """What timm says of the model's input: mean and std."""


def open_weights(config: PretrainConfig) -> StartingWeights:
    """What --init names.

    Raises:
        InputError: there is nothing of that name, it cannot be read, or holds other things than tensors.
    """
    path = Path(config.init)
    if path.is_dir():
        source = _from_folder(path, config)
    elif path.is_file():
        source = _from_file(path, config)
    elif timm.is_model(config.init):
        source = _from_timm(config.init)
    else:
        near = difflib.get_close_matches(config.init, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"init: {config.init} is neither a file, a folder nor a model of timm {timm.__version__}; {hint}"
            f"give a timm name, a safetensors or PyTorch file, a run or a folder of export-backbone"
        )
    if config.init_heads and source.objective is None:
        raise InputError(f"init_heads: {config.init} is no run and has no heads of ours; leave it out")
    if config.init_heads and type(source.objective) is not type(config.objective):
        theirs, ours = (type(one).__name__.removesuffix("Config") for one in (source.objective, config.objective))
        raise InputError(
            f"init_heads: the run {source.origin.name} trained {theirs}, and its heads are not {ours}'s; leave it out"
        )
    return source


def start(objective: Objective, weights: StartingWeights, config: PretrainConfig) -> None:
    """Puts the weights into the online encoder, and makes the target the same; says what did not fit.

    Raises:
        InputError: nothing fits, or tensors of another shape.
    """
    online = objective.online
    try:
        tensors = backbone_weights(weights.content, online.backbone, weights.encoder)
        misfits = load_weights(online.backbone, tensors)
    except ValueError as error:
        raise InputError(
            f"init: {config.init} {error}; choose backbone.name and its width, depth and heads to match"
        ) from error
    if misfits.fresh:
        warn(f"init: {config.init} lacks {', '.join(misfits.fresh)}, which begin at random")
    if misfits.unused:
        warn(f"init: {config.backbone.name} has no place for {', '.join(misfits.unused)} of {config.init}")
    if config.init_heads:
        _load_heads(online, weights, config.init)
    if objective.target is not None:
        objective.target.backbone.load_state_dict(online.backbone.state_dict())
        objective.target.projector.load_state_dict(online.projector.state_dict())
    _check_input(weights)
    o = weights.origin
    step = f", step {o.step}" if o.step is not None else ""
    note(f"starting from {o.name}{step} ({len(tensors)} tensors, SHA-256 {o.sha256[:12]})")


def _load_heads(online: Encoder, weights: StartingWeights, name: str) -> None:
    parts: dict[str, tuple[str, nn.Module]] = {"projector": (weights.encoder, online.projector)}
    if online.predictor is not None:
        parts["predictor"] = ("online", online.predictor)  # a target has none
    for part, (encoder, head) in parts.items():
        prefix = f"{encoder}.{part}."
        tensors = weights.content["objective"]
        theirs = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        own = head.state_dict()
        if {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in own.items()}:
            head.load_state_dict(theirs)
        else:
            differing = [f"{part}.{n}" for n in own if n not in theirs or theirs[n].shape != own[n].shape]
            warn(f"init_heads: {', '.join(differing)} of {name} are missing or of another shape; the {part} is fresh")


def _check_input(weights: StartingWeights) -> None:
    mean, std = ((weights.input or {}).get(name) for name in ("mean", "std"))
    if mean and std and (tuple(mean), tuple(std)) != IMAGENET:
        warn(
            f"init: {weights.origin.name} had pixels with mean {tuple(mean)} and deviation {tuple(std)}; here they "
            f"have {IMAGENET[0]} and {IMAGENET[1]}, to which it has to get used"
        )


def _from_folder(path: Path, config: PretrainConfig) -> StartingWeights:
    name = path.resolve().name
    if (path / "checkpoints").is_dir():
        entry, content = checkpoint.newest(path / "checkpoints")
        return _ours(content, Origin("run", name, entry.facts["sha256"], entry.step), config)
    file = path / "model.safetensors"
    if not file.is_file():
        raise InputError(
            f"init: {path} is neither a run (no checkpoints) nor a folder of export-backbone (no model.safetensors)"
        )
    source = _from_file(file, config)
    facts = path / "config.json"
    settings = json.loads(facts.read_text()).get("pretrained_cfg") if facts.is_file() else None
    return replace(source, origin=Origin("backbone", name, source.origin.sha256), input=settings)


def _from_file(path: Path, config: PretrainConfig) -> StartingWeights:
    content, origin = read_tensors(path), Origin("file", path.name, checkpoint.sha256(path))
    if "schema" in content and "objective" in content:
        return _ours(content, replace(origin, step=content["step"]), config)
    return StartingWeights(content, origin, config.which)


def _ours(content: Mapping[str, Any], origin: Origin, config: PretrainConfig) -> StartingWeights:
    """A checkpoint of this project."""
    objective = from_plain(content["config"]).objective
    encoder = checkpoint.encoder_in(content["objective"], objective, config.which)
    return StartingWeights({"objective": content["objective"]}, replace(origin, encoder=encoder), encoder, objective)


def _from_timm(name: str) -> StartingWeights:
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        tags = timm.list_models(f"{name.split('.')[0]}*", pretrained=True)[:5] or [
            "see timm.list_models(pretrained=True)"
        ]
        raise InputError(f"init: timm has no weights for {name}; with weights: {', '.join(tags)}")
    if cached_weights(name) is None:
        try:
            timm.create_model(name, pretrained=True)
        except Exception as error:  # of whatever client timm fetches with
            raise InputError(
                f"init: the weights of {name} are not on this machine and cannot be fetched "
                f"({' '.join(str(error).split())[:150]}); give a file"
            ) from error
    path = cached_weights(name)
    if path is None:
        raise InputError(f"init: timm keeps no file of {name} on this machine; give a file")
    origin = Origin("timm", name, checkpoint.sha256(Path(path)))
    return StartingWeights(read_tensors(Path(path)), origin, "kept", input=known.to_dict())


def cached_weights(name: str) -> str | None:
    """The file of timm's pretrained weights in Hugging Face's local cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(cfg.hf_hub_id, file) if cfg is not None and cfg.hf_hub_id else None
        if isinstance(cached, str):
            return cached
    return None


def read_tensors(path: Path) -> Mapping[str, Any]:
    """A safetensors or PyTorch file on the CPU; nothing in it is run.

    Raises:
        InputError: it cannot be read, holds objects other than tensors and plain values, or no dict.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its flags so
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"init: {path} cannot be read ({error}); give a whole safetensors or PyTorch file") from error
    except Exception as error:  # torch raises a dozen kinds for damaged files and for pickles
        raise InputError(
            f"init: {path} is damaged or holds other things than tensors, which are not unpickled "
            f"({' '.join(str(error).split())[:150]}); save its state dict alone"
        ) from error
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise InputError(f"init: {path} holds a {type(content).__name__} instead of tensors by name; save a state dict")
    return content
