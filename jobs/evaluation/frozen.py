"""A backbone as evaluation sees it: the model, how its tokens become one feature, how its input is normalised.

Suffixes: B images, S side in pixels, D width.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shards.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pool = Literal["default", "cls", "mean", "cls+mean"]


@dataclass(frozen=True)
class Frozen:
    """A backbone with what its features depend on. `name` is for people."""

    model: nn.Module
    name: str
    size: int
    pool: Pool = "default"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def features(self, crops_B3SS: Tensor) -> Tensor:
        """Features [B, D], float32."""
        return pooled(self.model, crops_B3SS, self.pool).float()

    def identity(self) -> str:
        """SHA-256 over every weight and buffer, and over size, pooling and normalisation."""
        digest = hashlib.sha256(repr((self.size, self.pool, self.mean, self.std)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def timm_module(model: nn.Module) -> nn.Module:
    """The timm model inside a backbone: the outermost module with `forward_features`.

    Raises:
        InputError: there is none, so neither pooling nor a head can be chosen.
    """
    for module in model.modules():
        if hasattr(module, "forward_features"):
            return module
    raise InputError(f"backbone: {type(model).__name__} is no timm model; only --pool default works for it")


def pooled(model: nn.Module, crops_B3SS: Tensor, pool: Pool) -> Tensor:
    """Features [B, D] ([B, 2D] for cls+mean): the backbone's own pooling, the class token, or the patches' mean.

    Raises:
        InputError: the class token is asked of a backbone without one.
    """
    if pool == "default":
        return model.forward(crops_B3SS)  # not compiled, which would be done again for the last, smaller batch
    tokens, prefix = all_tokens(model, crops_B3SS)
    mean = tokens[:, prefix:].mean(dim=1)
    if pool == "mean":
        return mean
    if prefix == 0:
        raise InputError(
            f"pool: {pool} needs a class token, and {type(timm_module(model)).__name__} has none; use default or mean"
        )
    return tokens[:, 0] if pool == "cls" else torch.cat([tokens[:, 0], mean], dim=1)


def all_tokens(model: nn.Module, crops_B3SS: Tensor) -> tuple[Tensor, int]:
    """Tokens [B, T, D] before pooling, and how many of the first ones are no patches."""
    inner = timm_module(model)
    tokens = inner.forward_features(crops_B3SS)  # type: ignore[operator]
    if tokens.ndim == 4:
        if (
            getattr(inner, "output_fmt", "NCHW") == "NCHW"
        ):  # Swin keeps its map as [B, H, W, D], networks of convolutions don't
            tokens = tokens.permute(0, 2, 3, 1)
        tokens = tokens.flatten(1, 2)
        prefix = 0
    else:
        prefix = int(getattr(inner, "num_prefix_tokens", 0))
    return tokens, prefix


def patch_tokens(model: nn.Module, crops_B3SS: Tensor) -> Tensor:
    """Tokens [B, T, D] of the patches, row by row."""
    tokens, prefix = all_tokens(model, crops_B3SS)
    return tokens[:, prefix:]
