"""`hardviews export-backbone`: a checkpoint → a folder that timm, the Hugging Face hub and ONNX runtimes load."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.evaluation.hub import check_onnx, check_timm_folder, write_onnx, write_timm_folder
from jobs.reporting.card import model_card
from jobs.reporting.rundata import read_run
from jobs.run.checkpoint import Which, load_backbone
from jobs.run.folder import open_run
from jobs.run.terminal import parse
from shards.errors import InputError


@dataclass(frozen=True)
class ExportBackboneConfig:
    """Writes a run's backbone with its config and a model card, and checks that the features are the same."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path
    """Folder to write: config.json, model.safetensors, README.md, and model.onnx if asked for."""
    step: int | None = None
    """Step of the checkpoint; None = the newest."""
    which: Which = "kept"
    """Encoder: kept = the one the objective's paper evaluates (DINO and iBOT the momentum target, the others the online
    encoder), or one by name."""
    onnx: bool = False
    """Write model.onnx too."""
    only_onnx: bool = False
    """Write model.onnx alone, for an architecture that timm cannot build."""
    licence: str = ""
    """Licence of the weights for the model card and config.json, such as apache-2.0; empty = none is declared."""
    overwrite: bool = False
    """Write into a folder that holds files already."""


def export_backbone(config: ExportBackboneConfig) -> list[str]:
    """Writes the folder and returns a line for each file that was written and checked.

    Raises:
        InputError: no run or checkpoint; the folder holds files; the architecture or a package is missing.
    """
    folder = open_run(config.run)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())) and not config.overwrite:
        raise InputError(f"out: {config.out} exists and is not empty; choose another --out or give --overwrite")
    model, settings, step, which = load_backbone(folder.path, which=config.which, step=config.step)
    size = settings.backbone.image_size
    done = []
    if not config.only_onnx:
        write_timm_folder(settings.backbone, model, config.out, config.licence)
        (config.out / "README.md").write_text(model_card(read_run(folder.path), step, which, config.licence))
        difference = check_timm_folder(model, size, config.out)
        done.append(f"{config.out}: timm loads it, features differ by at most {difference:.1g} of their deviation")
    if config.onnx or config.only_onnx:
        write_onnx(model, size, config.out)
        difference = check_onnx(model, size, config.out)
        done.append(f"{config.out / 'model.onnx'}: features differ by at most {difference:.1g} of their deviation")
    return done


def main(argv: list[str]) -> None:
    config = parse(ExportBackboneConfig, argv, prog="hardviews export-backbone")
    for line in export_backbone(config):
        print(line)
