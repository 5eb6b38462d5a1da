"""Checkpoints: tensors and plain dicts, whole or absent, checked before they are believed.

A checkpoint is `step-00001200.pt` and, written after it, `step-00001200.json` with size and SHA-256: the JSON file
is the done-marker, so that a kill between the two leaves nothing that looks like a checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from jobs.run.config import PretrainConfig, Which, load_config
from jobs.run.folder import open_run, write_json
from jobs.run.terminal import warn
from models.backbones import build_backbone
from models.objectives import ObjectiveConfig, kept_encoder
from shards.errors import InputError

SCHEMA_VERSION = 2


class SchemaError(InputError):
    """A checkpoint of another schema version: whole, but not for this program."""


@dataclass(frozen=True)
class Entry:
    """One finished checkpoint: its step, its file, what the done-marker says of it."""

    step: int
    path: Path
    facts: dict[str, Any]


def entries(folder: Path) -> list[Entry]:
    """Finished checkpoints, oldest first."""
    found = []
    for marker in sorted(folder.glob("step-*.json")):
        try:
            facts = json.loads(marker.read_text())
            found.append(Entry(facts["step"], marker.with_suffix(".pt"), facts))
        except (ValueError, KeyError, TypeError):
            warn(f"checkpoint: {marker} is damaged; leaving out the checkpoint it belongs to")
    return found


def save(folder: Path, step: int, content: dict[str, Any], score: float | None = None) -> Path:
    """Writes the checkpoint of `step` under a temporary name, syncs it, renames it, then marks it done.

    `content` holds tensors, numbers, strings and containers of these; `score` (higher is better) ranks it for
    `prune`. A write that fails, for want of space say, raises OSError and leaves the earlier checkpoints alone.
    """
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(f".pt.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"schema": SCHEMA_VERSION, "step": step, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256(temporary)
        size = temporary.stat().st_size
        path.with_suffix(".json").unlink(missing_ok=True)
        temporary.replace(path)
        write_json(path.with_suffix(".json"), {"step": step, "bytes": size, "sha256": digest, "score": score})
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` and the one with the best score, and leftovers of kills."""
    done = entries(folder)
    best = max((e for e in done if e.facts["score"] is not None), key=lambda e: e.facts["score"], default=None)
    kept = {e.path for e in done[-keep:]} | ({best.path} if best else set())
    for path in folder.glob("step-*.pt*"):
        if path not in kept:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def load(path: Path, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; with `facts` of its done-marker, only if every byte is as it was written.

    Raises:
        SchemaError: another schema version.
        InputError: a missing or damaged file.
    """
    if not path.is_file():
        raise InputError(f"checkpoint: {path} does not exist")
    if facts and (path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]):
        raise InputError(f"checkpoint: {path} is damaged (its size or SHA-256 is not what was written)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # torch raises a dozen kinds for damaged files; all mean the same to a user
        raise InputError(f"checkpoint: {path} cannot be read ({error}); take another one") from error
    if content.get("schema") != SCHEMA_VERSION:
        raise SchemaError(
            f"checkpoint: {path} has schema version {content.get('schema')}, this program reads {SCHEMA_VERSION}; "
            f"use the version of hardviews that wrote it, or train anew with --overwrite"
        )
    return content


def load_newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint that is intact; each damaged newer one is named in a warning.

    Raises:
        SchemaError: the newest intact one has another schema version; those before it were written no later.
        InputError: no intact checkpoint is left.
    """
    return newest(folder)[1]


def newest(folder: Path) -> tuple[Entry, dict[str, Any]]:
    """`load_newest`, with the checkpoint's entry."""
    for entry in reversed(entries(folder)):
        try:
            return entry, load(entry.path, entry.facts)
        except SchemaError:
            raise
        except InputError as error:
            warn(f"{error}; taking the one before")
    raise InputError(f"checkpoint: {folder} holds no intact checkpoint; start anew with --overwrite")


def load_step(folder: Path, step: int | None) -> dict[str, Any]:
    """The checkpoint of `step`, or the newest intact one where `step` is None.

    Raises:
        InputError: no such checkpoint; the message lists the steps there are.
    """
    if step is None:
        return load_newest(folder)
    for entry in entries(folder):
        if entry.step == step:
            return load(entry.path, entry.facts)
    steps = ", ".join(str(entry.step) for entry in entries(folder)) or "none"
    raise InputError(f"step: {folder} has no checkpoint of step {step}; there are: {steps}")


class LoadedBackbone(NamedTuple):
    """A run's backbone in evaluation mode on the CPU, the run's configuration, and which weights these are."""

    backbone: nn.Module
    config: PretrainConfig
    step: int
    which: Literal["online", "target"]


def load_backbone(run: str | Path, which: Which = "kept", step: int | None = None) -> LoadedBackbone:
    """The backbone of a run's checkpoint of `step`, or of its newest intact one.

    `which`: the encoder that the objective's paper evaluates, the online one, or the momentum target (the online one
    where the objective has none).

    Raises:
        InputError: no run, no such checkpoint, or one of another architecture than the run's config.json.
    """
    folder = open_run(run)
    config = load_config(folder.config)
    content = load_step(folder.checkpoints, step)
    weights = content["objective"]
    encoder = encoder_in(weights, config.objective, which)
    prefix = f"{encoder}.backbone."
    backbone = build_backbone(config.backbone, 0.0)
    try:
        backbone.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    except RuntimeError as error:
        raise InputError(
            f"backbone: the checkpoint in {folder.checkpoints} does not fit {config.backbone.name} of config.json "
            f"({' '.join(str(error).split())[:200]}); was config.json changed?"
        ) from error
    return LoadedBackbone(backbone.eval(), config, content["step"], encoder)


def encoder_in(weights: Iterable[str], objective: ObjectiveConfig, which: Which) -> Literal["online", "target"]:
    """The encoder that `which` means among weights of these names: the online one where there is no target."""
    encoder = kept_encoder(objective) if which == "kept" else which
    return encoder if any(name.startswith(f"{encoder}.backbone.") for name in weights) else "online"


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
