"""A ViT's forward in parts: its first blocks, and the rest of them.

Shape suffixes: B images, T tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width


def check_layer(backbone: nn.Module, layer: int) -> VisionTransformer:
    """The backbone, which has as many blocks.

    Raises:
        ValueError: it has no blocks, or fewer.
    """
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"selection.layer: {layer} blocks asked for, but the backbone is no ViT")
    if layer > len(backbone.blocks):
        raise ValueError(f"selection.layer: {layer} blocks asked for, but the backbone has {len(backbone.blocks)}")
    return backbone


def half_depth(config: BackboneConfig) -> int:
    """Half of a ViT's blocks, at least 1.

    Raises:
        ValueError: for another kind of model.
    """
    with torch.device("meta"):
        backbone = build_backbone(config, 0.0)
    return max(1, len(check_layer(backbone, 1).blocks) // 2)


@contextmanager
def first_blocks(backbone: nn.Module, layer: int | None) -> Iterator[None]:
    """Inside, a ViT stops after `layer` blocks (its final norm and pooling still follow).

    Raises:
        ValueError: the backbone has no blocks, or fewer.
    """
    if layer is None:
        yield
        return
    vit = check_layer(backbone, layer)
    blocks = vit.blocks
    try:
        vit.blocks = blocks[:layer]
        yield
    finally:
        vit.blocks = blocks


def begin(backbone: nn.Module, x_B3HW: Tensor, layer: int) -> Tensor:
    """[B, T, D]: all tokens after `layer` blocks, class token first.

    Raises:
        ValueError: the backbone has no blocks, or fewer.
    """
    vit = check_layer(backbone, layer)
    found: Any = vit.forward_intermediates(
        x_B3HW, [layer - 1], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    if not vit.num_prefix_tokens:
        return found[0]
    ((patches, prefix),) = found
    return torch.cat([prefix, patches], 1)


def finish(backbone: nn.Module, tokens_BTD: Tensor, layer: int) -> Tensor:
    """[B, D]: the backbone's features, from its tokens after `layer` blocks."""
    vit = check_layer(backbone, layer)
    return vit.forward_head(vit.norm(vit.blocks[layer:](tokens_BTD)))


def summary_width(vit: VisionTransformer) -> int:
    """Numbers in a ViT's `summary`."""
    return feature_width(vit) * (2 if vit.num_prefix_tokens else 1)


def summary(backbone: nn.Module, tokens_BTD: Tensor) -> Tensor:
    """[B, 2D], or [B, D] without class token: the class token and the mean of the patches' tokens, each brought to
    mean 0 and variance 1; fp32."""
    prefix = check_layer(backbone, 0).num_prefix_tokens
    parts = [tokens_BTD[:, 0].float()] if prefix else []
    parts.append(tokens_BTD[:, prefix:].mean(1, dtype=torch.float32))
    return torch.cat([F.layer_norm(part_BD, part_BD.shape[-1:]) for part_BD in parts], 1)
