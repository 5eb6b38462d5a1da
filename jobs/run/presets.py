"""Presets: configurations by name, after the papers' table rows and this project's own small sizes."""

from collections.abc import Callable
from dataclasses import replace

from jobs.run.config import PretrainConfig, ViewsConfig
from jobs.run.optim import OptimizerConfig
from models.backbones import BackboneConfig
from models.negatives import NONE, NegativesConfig
from models.objectives.moby import MoBYConfig
from models.selection import SelectionConfig
from shards.errors import InputError

DEIT_S = BackboneConfig("deit_small_patch16_224")
SWIN_T = BackboneConfig("swin_tiny_patch4_window7_224")
# For 32×32 images: 16 tokens, 0.8 M parameters.
VIT_TINY_32 = BackboneConfig("vit_tiny_patch16_224", 32, patch_size=8, width=128, depth=4, heads=4, pool="avg")


def moby(backbone: BackboneConfig) -> PretrainConfig:
    """MoBY as published: two random views, drop path 0.2 in the online encoder, no synthetic negatives."""
    return PretrainConfig(
        backbone=replace(backbone, drop_path=0.2),
        objective=MoBYConfig(negatives=NONE),
        selection=SelectionConfig(views=2, rule="random"),
        views=ViewsConfig("byol"),
        optimizer=OptimizerConfig("adamw", lr=1e-3, lr_batch=512, weight_decay=0.05, warmup_epochs=5),
        epochs=300,
        batch=512,
    )


def synby(backbone: BackboneConfig) -> PretrainConfig:
    """SynBY with the values of the authors' code: drop path 0.05, N = 256, 128 of each of the six kinds."""
    base = moby(backbone)
    return replace(base, backbone=replace(backbone, drop_path=0.05), objective=MoBYConfig(NegativesConfig()))


def synby_paper(backbone: BackboneConfig) -> PretrainConfig:
    """SynBY with the values of the paper's text: learning rate 0.03, weight decay 1e-4."""
    base = synby(backbone)
    return replace(base, optimizer=replace(base.optimizer, lr=0.03, weight_decay=1e-4))


def hard(config: PretrainConfig) -> PretrainConfig:
    """The same with the hardest of four views' pairs (HVP)."""
    return replace(config, selection=SelectionConfig(views=4, rule="hardest"))


def small(config: PretrainConfig) -> PretrainConfig:
    """The same at a size that a CPU trains in minutes: narrower heads, a shorter queue, fewer epochs."""
    assert isinstance(config.objective, MoBYConfig)
    objective = replace(config.objective, hidden=512, width=128, queue=2048)
    return replace(config, objective=objective, epochs=20, batch=128)


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "synby-vit-tiny": lambda: small(hard(synby(VIT_TINY_32))),
    "moby-vit-tiny": lambda: small(moby(VIT_TINY_32)),
    "moby-deit-s": lambda: moby(DEIT_S),
    "moby-swin-t": lambda: moby(SWIN_T),
    "synby-deit-s": lambda: synby(DEIT_S),
    "synby-swin-t": lambda: synby(SWIN_T),
    "synby-hard-deit-s": lambda: hard(synby(DEIT_S)),
    "synby-hard-swin-t": lambda: hard(synby(SWIN_T)),
    "synby-paper-deit-s": lambda: synby_paper(DEIT_S),
    "synby-paper-swin-t": lambda: synby_paper(SWIN_T),
}


def preset(name: str) -> PretrainConfig:
    """A preset by name.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise InputError(f"preset: {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
