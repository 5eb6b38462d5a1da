"""Small labelled images and runs with checkpoints, for tests of evaluation, export and the report's pictures."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.log.writer import AugmentationLog, batch_rows
from jobs.run import checkpoint
from jobs.run.config import DataConfig, PretrainConfig, save_config
from jobs.run.data import open_data, open_stream, run_policy
from jobs.run.folder import RunFolder
from jobs.run.world import World
from models.backbones import BackboneConfig, build_backbone
from models.selection import SelectionConfig

COLOURS = {"amber": (230, 160, 40), "blue": (40, 60, 220), "green": (40, 190, 60), "grey": (120, 120, 120),
           "pink": (240, 120, 190), "white": (250, 250, 250)}  # fmt: skip
TINY = BackboneConfig("vit_tiny_patch16_224", image_size=16, patch_size=8, width=24, depth=2, heads=3)
STEPS = (2, 4)


def image_folder(root: Path, per_class: int, seed: int = 0, classes: int = 6, side: int = 20) -> Path:
    """An ImageFolder whose classes are colours, with noise: even an untrained backbone tells most of them apart."""
    rng = np.random.default_rng(seed)
    for name, colour in itertools.islice(COLOURS.items(), classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.normal(0, 25, (side, side + i % 3, 3))
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


def backbone_at(step: int, config: BackboneConfig = TINY) -> torch.nn.Module:
    """The backbone that `write_run` stores for a step: other weights at every step."""
    with torch.random.fork_rng():
        torch.manual_seed(step)
        return build_backbone(config, 0.0).eval()


def write_run(path: Path, config: BackboneConfig = TINY, data: DataConfig | None = None) -> RunFolder:
    """A run folder with a configuration and a checkpoint for each of STEPS, without a log."""
    run = RunFolder(path)
    run.clear()
    save_config(PretrainConfig(data=data or DataConfig(), selection=SelectionConfig(views=3), backbone=config,
                               batch=6, device="cpu"), run.config)  # fmt: skip
    for step in STEPS:
        weights = backbone_at(step, config).state_dict()
        objective = {f"online.backbone.{name}": tensor for name, tensor in weights.items()}
        checkpoint.save(run.checkpoints, step, {"objective": objective})
    return run


def write_logged_run(folder: Path) -> RunFolder:
    """The same with shards of two sources and a log of three steps, as training writes it."""
    for seed, source in enumerate(("real", "synthetic")):
        images = image_folder(folder / f"{source}-images", 3, seed)
        build(BuildConfig(f"imagefolder:{images}", folder / source, source=source))
    run = write_run(folder / "run", data=DataConfig(real=str(folder / "real"), synthetic=str(folder / "synthetic")))
    from jobs.run.config import load_config

    config = load_config(run.config)
    data = open_data(config)
    facts = {"shards": [{"root": m.root, "source": m.source, "fingerprint": m.fingerprint} for m in data.manifests]}
    log = AugmentationLog(run.log, 0, run_policy(config).views, scored=3, sources=data.sources, facts=facts)
    rng = np.random.default_rng(0)
    with open_stream(config, data, World(0, 1, torch.device("cpu")), 0, lambda error: None) as stream:
        for step, batch in enumerate(itertools.islice(stream, 3)):
            losses = rng.random((6, 3), np.float32)
            log.append(batch_rows(batch, step, log.scored, losses, losses.argmax(1)))
    log.close()
    data.reader.close()
    return run
