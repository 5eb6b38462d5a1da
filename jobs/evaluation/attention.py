"""Where a ViT looks: the last layer's attention, averaged over heads (SynBY, figure 1; DINO).

Suffixes: B images, S side in pixels, h × w patches, T tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.evaluation.frozen import timm_module
from shards.errors import InputError


@torch.no_grad()
def attention_maps(model: nn.Module, crops_B3SS: Tensor) -> Tensor:
    """Attention of the class token to each patch in the last block, mean over heads: [B, h, w], rows sum to at most 1.

    A backbone without a class token gives the mean over its patches as queries.

    Raises:
        InputError: the backbone has no attention over all patches (Swin, convolutional networks).
    """
    inner = timm_module(model)
    blocks = getattr(inner, "blocks", None)
    layer = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential) else None
    if layer is None or not hasattr(layer, "qkv") or not hasattr(layer, "num_heads"):
        raise InputError(
            f"attention: {type(inner).__name__} has no attention over all patches; take a ViT, or Grad-CAM"
        )
    held: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: held.append(inputs[0]))
    training = model.training
    try:
        model.eval()(crops_B3SS)
    finally:
        handle.remove()
        model.train(training)
    weights_BTT = attention_weights(layer, held[0]).mean(dim=1)
    prefix = int(getattr(inner, "num_prefix_tokens", 0))
    row_BT = weights_BTT[:, 0] if prefix else weights_BTT.mean(dim=1)
    height, width = grid(inner, crops_B3SS, row_BT.shape[1] - prefix)
    return row_BT[:, prefix:].reshape(-1, height, width)


def attention_weights(layer: nn.Module, x_BTD: Tensor) -> Tensor:
    """softmax(q kᵀ · scale) of a timm attention layer, [B, heads, T, T]; the fused kernel never shows it."""
    batch, tokens, _ = x_BTD.shape
    heads = int(layer.num_heads)  # type: ignore[arg-type]
    q, k, _ = layer.qkv(x_BTD).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    q, k = layer.q_norm(q), layer.k_norm(k)  # type: ignore[operator]
    return (q @ k.mT * float(layer.scale)).softmax(dim=-1)  # type: ignore[arg-type]


def grid(inner: nn.Module, crops_B3SS: Tensor, patches: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    size = getattr(getattr(inner, "patch_embed", None), "patch_size", None)
    if size is not None:
        height, width = crops_B3SS.shape[2] // size[0], crops_B3SS.shape[3] // size[1]
        if height * width == patches:
            return height, width
    side = round(patches**0.5)
    return side, patches // side


def overlay(image_HW3: np.ndarray, map_hw: np.ndarray, opacity: float = 0.65) -> np.ndarray:
    """uint8 image under a heat map that is stretched to its own range: dark where low, bright where high."""
    from matplotlib import colormaps

    height, width = image_HW3.shape[:2]
    stretched = F.interpolate(torch.from_numpy(map_hw)[None, None].float(), (height, width), mode="bilinear")[0, 0]
    low, high = stretched.min(), stretched.max()
    heat_HW = ((stretched - low) / (high - low).clamp_min(1e-12)).numpy()
    colours_HW3 = colormaps["inferno"](heat_HW)[..., :3] * 255
    gray_HW1 = image_HW3.mean(axis=2, keepdims=True)
    return np.clip((1 - opacity) * gray_HW1 + opacity * colours_HW3, 0, 255).astype(np.uint8)
