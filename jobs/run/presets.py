"""Presets: configurations by name, after the papers' table rows and this project's own small sizes."""

import difflib
from collections.abc import Callable
from dataclasses import replace

from jobs.run.config import PretrainConfig, ViewsConfig
from jobs.run.optim import OptimizerConfig
from models.backbones import BackboneConfig
from models.negatives import NONE, NegativesConfig
from models.objectives import (
    BYOLConfig,
    DINOConfig,
    IBOTConfig,
    MoBYConfig,
    MoCoV3Config,
    ObjectiveConfig,
    SimCLRConfig,
    SimSiamConfig,
    SwAVConfig,
)
from models.selection import SelectionConfig
from shards.errors import InputError

RANDOM_PAIR = SelectionConfig(views=2, rule="random")
HARDEST_OF_4 = SelectionConfig(views=4, rule="hardest")
DEIT_S = BackboneConfig("deit_small_patch16_224")
SWIN_T = BackboneConfig("swin_tiny_patch4_window7_224")
RESNET_50 = BackboneConfig("resnet50")
# MoCo v3's ViT-S has 12 heads, its positions are fixed (section 5 there), and its initial weights are the code's.
VIT_S_MOCO_V3 = BackboneConfig("vit_small_patch16_224", heads=12, sincos=True, init="moco_v3")
VIT_S = BackboneConfig("vit_small_patch16_224", drop_path=0.1, positions="plain")
# For 32×32 images: 16 tokens, 0.8 M parameters.
VIT_TINY_32 = BackboneConfig("vit_tiny_patch16_224", 32, patch_size=8, width=128, depth=4, heads=4, pool="avg")


def moby(backbone: BackboneConfig) -> PretrainConfig:
    """MoBY with the values of the authors' code: two random views, drop path 0.2 in the online encoder, no synthetic
    negatives; docs/methods.md says what differs."""
    return PretrainConfig(
        backbone=replace(backbone, drop_path=0.2),
        objective=MoBYConfig(negatives=NONE),
        selection=RANDOM_PAIR,
        views=ViewsConfig("byol", colour="clamped"),
        optimizer=OptimizerConfig(
            "adamw",
            lr=1e-3,
            lr_batch=512,
            final_lr=5e-6,
            weight_decay=0.05,
            decay="tokens",
            warmup_epochs=5,
            clip_norm=5.0,
        ),
        epochs=300,
        batch=512,
    )


def synby(backbone: BackboneConfig) -> PretrainConfig:
    """SynBY on the paper's DeiT-S or Swin-T with the values of the authors' code, N = 256, 128 of each of six kinds,
    but the drop path of 0.05 that the paper's table 3 finds best; the code's configurations have MoBY's 0.2."""
    base = moby(backbone)
    return replace(base, backbone=replace(backbone, drop_path=0.05), objective=MoBYConfig(NegativesConfig()))


def synby_paper(backbone: BackboneConfig) -> PretrainConfig:
    """SynBY with the values of the paper's text: learning rate 0.03, weight decay 1e-4."""
    base = synby(backbone)
    return replace(base, optimizer=replace(base.optimizer, lr=0.03, weight_decay=1e-4))


def synco_v2() -> PretrainConfig:
    """SynCo-v2's configuration for ViT-S, which is MoCo v3's ViT there: SynBY's with drop path 0.2."""
    return replace(synby(VIT_S_MOCO_V3), backbone=replace(VIT_S_MOCO_V3, drop_path=0.2))


def mochi(backbone: BackboneConfig) -> PretrainConfig:
    """MoCHi(1024, 512, 256) with the values of its ImageNet-100 table, on MoBY's symmetric loss with a predictor and a
    queue for each view, where MoCHi has MoCo v2's one-sided loss and one queue. No synthetic negatives before epoch 10.
    """
    mixed = replace(
        NONE, hardest=1024, mixing=512, interpolation=256, start_epoch=10, last_epochs_without=0, of_epochs=200
    )
    return PretrainConfig(
        backbone=backbone,
        objective=MoBYConfig(mixed, queue=16_384, momentum=0.999, hidden=2048, width=128),
        selection=RANDOM_PAIR,
        views=ViewsConfig("moco_v2", colour="clamped"),
        optimizer=OptimizerConfig("sgd", lr=0.03, lr_batch=256, weight_decay=1e-4, decay="all", warmup_epochs=0),
        epochs=200,
        batch=128,
    )


def on_vit(objective: ObjectiveConfig, lr: float, weight_decay: float) -> PretrainConfig:
    """A row of MoCo v3's table 4: ViT-S/16, 300 epochs, two views."""
    return PretrainConfig(
        backbone=replace(VIT_S_MOCO_V3, fixed_patch=True),  # section 4.2 there
        objective=objective,
        selection=RANDOM_PAIR,
        views=ViewsConfig("moco_v3", colour="clamped"),
        optimizer=OptimizerConfig(
            "adamw", lr=lr, lr_batch=256, weight_decay=weight_decay, decay="all", warmup_epochs=40
        ),
        epochs=300,
        batch=4096,
    )


def simsiam() -> PretrainConfig:
    """HVP's table 10: ResNet-50, 100 epochs."""
    sgd = OptimizerConfig(
        "sgd", lr=0.05, lr_batch=256, weight_decay=1e-4, decay="all", warmup_epochs=0, constant_predictor=True
    )
    return PretrainConfig(
        backbone=RESNET_50,
        objective=SimSiamConfig(),
        selection=RANDOM_PAIR,
        views=ViewsConfig("moco_v2", colour="clamped"),
        optimizer=sgd,
        epochs=100,
        batch=512,
    )


def simclr() -> PretrainConfig:
    """HVP's table 11: ResNet-50, 100 epochs; τ, which it leaves out, is SimCLR's own 0.1 for this batch."""
    return PretrainConfig(
        backbone=RESNET_50,
        objective=SimCLRConfig(temperature=0.1),
        selection=RANDOM_PAIR,
        views=ViewsConfig("simclr", colour="clamped"),
        optimizer=OptimizerConfig("lars", lr=0.3, lr_batch=256, weight_decay=1e-4, warmup_epochs=10),
        epochs=100,
        batch=4096,
    )


def dino() -> PretrainConfig:
    """HVP's table 8: DINO's own values for ViT-S/16, 100 epochs (for 300, batch 1024)."""
    return PretrainConfig(
        backbone=VIT_S,
        objective=DINOConfig(),
        selection=RANDOM_PAIR,
        views=ViewsConfig("dino", interpolation="bicubic", colour="clamped"),
        optimizer=self_distillation(512),
        epochs=100,
        batch=512,
    )


def ibot() -> PretrainConfig:
    """iBOT's own values for ViT-S/16 with global views only, as HVP trains it, 100 epochs; crops from 0.14, as its code
    advises there."""
    return PretrainConfig(
        backbone=VIT_S,
        objective=IBOTConfig(norm_last_layer=False, local_views=0),
        selection=RANDOM_PAIR,
        views=ViewsConfig("byol", crop_scale=(0.14, 1.0), interpolation="bicubic", colour="clamped"),
        optimizer=self_distillation(512),
        epochs=100,
        batch=512,
    )


def self_distillation(batch: int) -> OptimizerConfig:
    """The optimizer that DINO and iBOT share."""
    return OptimizerConfig(
        "adamw",
        lr=5e-4,
        lr_batch=256,
        final_lr=1e-6 * 256 / batch,  # 1e-6 at any batch
        warmup_epochs=10,
        weight_decay=0.04,
        final_weight_decay=0.4,
        decay="tokens",
        clip_norm=3.0,
        clip_by="tensor",
    )


def hard(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the hardest pair of four views (HVP); with multi-crop of twice as many local views."""
    config = replace(config, selection=HARDEST_OF_4)
    if not isinstance(config.objective, DINOConfig) or not config.objective.local_views:
        return config
    return replace(config, views=replace(config.views, local_views=2 * config.objective.local_views))


def small(config: PretrainConfig) -> PretrainConfig:
    """At a size that a CPU trains in minutes: narrower heads, a shorter queue, views that suit images of 32
    pixels, fewer epochs, of which the warm-up is a tenth, however many."""
    assert isinstance(config.objective, MoBYConfig)
    objective = replace(config.objective, hidden=512, width=128, queue=1024, momentum=0.95)
    optimizer = replace(config.optimizer, lr=2e-3, lr_batch=128, warmup_share=0.1)
    views = ViewsConfig("small")
    return replace(config, objective=objective, optimizer=optimizer, views=views, epochs=20, batch=128)


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
    "synco-v2-vit-s": synco_v2,
    "mochi-rn50": lambda: mochi(RESNET_50),
    "moco-v3-vit-s": lambda: on_vit(MoCoV3Config(), 1.5e-4, 0.1),
    # Learning rates and weight decays are those that MoCo v3 names for SimCLR and BYOL (figure 6 there). It names none
    # for SwAV, which is taken as BYOL, being no stabler.
    "simclr-vit-s": lambda: on_vit(SimCLRConfig(hidden=4096, width=256, layers=3), 2e-4, 0.1),
    "byol-vit-s": lambda: on_vit(BYOLConfig(), 1e-4, 0.03),
    "swav-vit-s": lambda: on_vit(SwAVConfig(head_norm=False), 1e-4, 0.03),
    "simsiam-rn50": simsiam,
    "simsiam-hard-rn50": lambda: hard(simsiam()),
    "simclr-rn50": simclr,
    "simclr-hard-rn50": lambda: hard(simclr()),
    "dino-vit-s": dino,
    "dino-hard-vit-s": lambda: hard(dino()),
    "ibot-vit-s": ibot,
    "ibot-hard-vit-s": lambda: hard(ibot()),
}


def preset(name: str) -> PretrainConfig:
    """A preset by name.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"preset: {name!r} is not known; {hint}there are {', '.join(PRESETS)}")
    return PRESETS[name]()
