"""Grad-CAM (Selvaraju et al. 2017; Syn²Co, figure 2): which patches raise an image's score.

Suffixes: B images, S side in pixels, h × w patches, T tokens, D width, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.attention import grid
from jobs.evaluation.frozen import timm_module
from shards.errors import InputError

# Features [B, D] → one score per image [B].
Score = Callable[[Tensor], Tensor]


def grad_cam(model: nn.Module, crops_B3SS: Tensor, score: Score) -> Tensor:
    """relu(Σ_d w_d A_d) with w_d the mean over patches of ∂score/∂A_d: [B, h, w], each map's largest value 1 (or 0).

    A is what enters the last block of a ViT, behind which the class token still reads the patches, and what leaves
    the last stage of a network that keeps a map (Swin, ResNet).

    Raises:
        InputError: the backbone has neither blocks nor stages.
    """
    inner = timm_module(model)
    blocks, layers, stage = (getattr(inner, name, None) for name in ("blocks", "layers", "layer4"))
    if isinstance(blocks, nn.Sequential):
        target, before = blocks[-1], True
    elif isinstance(layers, nn.Sequential):
        target, before = layers[-1], False
    elif isinstance(stage, nn.Module):
        target, before = stage, False
    else:
        raise InputError(f"grad-cam: {type(inner).__name__} has no blocks or stages to look into")
    held: list[Tensor] = []

    def keep(activation: Any) -> Tensor:
        # A leaf of its own: gradients stop here, so frozen layers below cost no backward pass.
        held.append(activation.detach().requires_grad_())
        return held[0]

    if before:
        handle = target.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]),))
    else:
        handle = target.register_forward_hook(lambda _, inputs, output: keep(output))
    training = model.training
    try:
        with torch.enable_grad():
            total = score(model.eval()(crops_B3SS)).sum()
            (slope,) = torch.autograd.grad(total, held[0])
    finally:
        handle.remove()
        model.train(training)
    return weigh(held[0].detach(), slope, inner, crops_B3SS)


def weigh(activation: Tensor, slope: Tensor, inner: nn.Module, crops_B3SS: Tensor) -> Tensor:
    """The map from activations and their gradients, [B, T, D], [B, h, w, D] or [B, D, h, w] each."""
    if activation.ndim == 4:
        if getattr(inner, "output_fmt", "NCHW") == "NCHW":
            activation, slope = activation.permute(0, 2, 3, 1), slope.permute(0, 2, 3, 1)
        height, width = activation.shape[1:3]
        activation, slope = activation.flatten(1, 2), slope.flatten(1, 2)
    else:
        prefix = int(getattr(inner, "num_prefix_tokens", 0))
        activation, slope = activation[:, prefix:], slope[:, prefix:]
        height, width = grid(inner, crops_B3SS, activation.shape[1])
    map_BT = (activation * slope.mean(dim=1, keepdim=True)).sum(dim=2).relu()
    map_BT = map_BT / map_BT.amax(dim=1, keepdim=True).clamp_min(1e-12)
    return map_BT.reshape(-1, height, width)


def prototype_score(prototypes_CD: Tensor, labels_B: Tensor) -> Score:
    """Cosine similarity of each image to the mean feature of its class: a score without a trained head."""
    return lambda features_BD: F.cosine_similarity(features_BD, prototypes_CD[labels_B], dim=1)


def self_score(features_BD: Tensor) -> Tensor:
    """For images without labels: the feature's own squared norm, halved, whose gradient is the feature."""
    return features_BD.square().sum(dim=1) / 2
