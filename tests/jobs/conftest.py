"""A small data set and a small run, made once for all tests of the jobs."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.benches.digits import write_digits
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.run.config import CheckpointConfig, DataConfig, MonitorConfig, PretrainConfig, ViewsConfig
from jobs.run.optim import OptimizerConfig
from models.backbones import BackboneConfig
from models.negatives import NegativesConfig
from models.objectives.moby import MoBYConfig

# Helper modules lie beside the tests; pytest's importlib mode leaves sys.path alone.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards `train` and `test` of the scanned digits at 16×16."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images", pixels=16)
    for part in ("train", "test"):
        build(BuildConfig(f"imagefolder:{folder / 'images' / part}", folder / part, shard_samples=100, workers=1))
    return folder


@pytest.fixture
def tiny(digits: Path) -> PretrainConfig:
    """Six steps of SynBY with hard views on a ViT of one block, every feature on."""
    negatives = NegativesConfig(8, 4, 4, 4, 4, 4, 4, start_epoch=0, last_epochs_without=0)
    return PretrainConfig(
        data=DataConfig(
            real=str(digits / "train"), synthetic=str(digits / "test"), synthetic_share=0.25, threads=1, block=2
        ),
        objective=MoBYConfig(negatives, queue=50, hidden=32, width=16),
        backbone=BackboneConfig("vit_tiny_patch16_224", 16, 8, 32, 1, 2, drop_path=0.1),
        optimizer=OptimizerConfig(warmup_share=0.1),
        views=ViewsConfig(crop_scale=(0.2, 1.0)),
        monitor=MonitorConfig(every=2, health_every=3, bank=512, loggers=("json",)),
        checkpoint=CheckpointConfig(every=2, keep=2),
        steps=6,
        batch=16,
        device="cpu",
    )


@pytest.fixture
def without_chance(tiny: PretrainConfig) -> PretrainConfig:
    """The same with nothing random in a step, so that it can be compared across world sizes and batch parts."""
    objective = MoBYConfig(NegativesConfig(1, 0, 0, 0, 0, 0, 0), queue=50, hidden=32, width=16)
    return replace(tiny, objective=objective, backbone=replace(tiny.backbone, drop_path=0.0))
