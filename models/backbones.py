"""Backbones from timm: any model with one feature an image, with MoCo v3's changes for ViTs as options.

B images, D feature width.
"""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.heads import BatchNorm, BatchNorm2d, has_batchnorm


@dataclass(frozen=True)
class BackboneConfig:
    """Which encoder is trained."""

    name: str = "vit_tiny_patch16_224"
    """timm model by its name: any ViT, DeiT, DINOv2, DINOv3, EVA, Swin, ResNet, ConvNeXt and other with one feature an
    image."""
    image_size: int = 224
    """Side of the views (pixels)."""
    patch_size: int | None = None
    """Side of a ViT's patches (pixels); None = the model's own."""
    width: int | None = None
    """A ViT's embedding width; None = the model's own."""
    depth: int | None = None
    """A ViT's blocks; None = the model's own."""
    heads: int | None = None
    """A ViT's attention heads; None = the model's own (timm's ViT-S has 6, MoCo v3's has 12)."""
    drop_path: float = 0.0
    """Stochastic depth rate of the online encoder (0 to 1)."""
    target_drop_path: float = 0.0
    """Stochastic depth rate of the target encoder (0 to 1)."""
    pool: str = ""
    """How a ViT's tokens become one feature: token (class token) or avg (mean of patches); empty = the model's own."""
    fixed_patch: bool = False
    """Freeze the random patch projection (MoCo v3, section 4.2)."""
    sincos: bool = False
    """Fixed 2-D sine-cosine position embedding instead of a learned one (MoCo v3, section 5)."""
    batchnorm_mlp: bool = False
    """BatchNorm instead of LayerNorm before the MLP blocks (MoCo v3, section 5.1)."""
    init: Literal["timm", "moco_v3"] = "timm"
    """A ViT's random initial weights: timm's, or those of MoCo v3's code, which are 1.6 to 2.5 times as large."""
    positions: Literal["antialiased", "plain"] = "antialiased"
    """How a ViT's position embedding is resampled (bicubic) for views of other sizes: antialiased, as timm does; plain,
    as DINO's and iBOT's code does."""

    def __post_init__(self) -> None:
        for field in ("image_size", "patch_size", "width", "depth", "heads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"backbone.{field}: {value} must be at least 1")
        for field in ("drop_path", "target_drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"backbone.{field}: {getattr(self, field)} must lie in [0, 1)")
        if self.patch_size and self.image_size % self.patch_size:
            raise ValueError(
                f"backbone.patch_size: {self.patch_size} does not divide the image size {self.image_size}; "
                f"take a divisor of it"
            )
        if self.init not in ("timm", "moco_v3"):
            raise ValueError(f"backbone.init: {self.init!r} is unknown; take timm or moco_v3")
        if self.positions not in ("antialiased", "plain"):
            raise ValueError(f"backbone.positions: {self.positions!r} is unknown; take antialiased or plain")
        if self.pool not in ("", "token", "avg"):
            raise ValueError(f"backbone.pool: {self.pool!r} is unknown; take token, avg or nothing")


# Fields of a ViT's shape → timm's names.
VIT_OPTIONS = {
    "patch_size": "patch_size",
    "width": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "pool": "global_pool",
}


# Options that ViTs alone have: switches, and choices with what others do.
ONLY_VIT = ("fixed_patch", "sincos", "batchnorm_mlp")
OF_VITS = {"init": "timm", "positions": "antialiased"}


def timm_options(config: BackboneConfig) -> dict[str, Any]:
    """Arguments of timm.create_model for the config's architecture.

    Raises:
        ValueError: an unknown name, or an option that this kind of model does not have.
    """
    kind = _kind(config.name)
    refused = {"vit": (), "eva": ONLY_VIT, "swin": (*VIT_OPTIONS, "fixed_patch", "sincos")}.get(
        kind, (*VIT_OPTIONS, *ONLY_VIT)
    )
    given = [field for field in refused if getattr(config, field)]
    if kind != "vit":
        given += [name for name, own in OF_VITS.items() if getattr(config, name) != own]
    if given:
        lacks = "has no LayerNorm before MLPs" if given[0] == "batchnorm_mlp" else "has no such option"
        raise ValueError(f"backbone.{given[0]}: {config.name} {lacks}; leave it out")
    options: dict[str, Any] = {VIT_OPTIONS[f]: getattr(config, f) for f in VIT_OPTIONS if getattr(config, f)}
    known = timm.get_pretrained_cfg(config.name)
    if kind in ("vit", "eva", "swin") or (known is not None and known.fixed_input_size):
        options["img_size"] = config.image_size
    return options


def build_backbone(config: BackboneConfig, drop_path: float) -> nn.Module:
    """A timm model without classifier: float [B, 3, S, S] → features [B, D]; `.num_features` is D.

    ViTs, EVAs and Swins also take views of other sizes than `image_size` (smaller ones while selecting, local crops): a
    ViT's position embedding is resampled then.

    Raises:
        ValueError: an unknown name, or an option that this kind of model does not have.
    """
    options, kind = timm_options(config), _kind(config.name)
    if kind == "resnet":
        options["norm_layer"] = BatchNorm2d
    elif kind != "other":
        options["dynamic_img_size"] = True
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        model = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
    except AssertionError as error:
        raise ValueError(
            f"backbone.heads: timm cannot build {config.name} with width {config.width or 'as it is'} and "
            f"{config.heads or 'its own'} heads ({error}); take heads that divide the width"
        ) from error
    except TypeError as error:
        option = "drop_path" if "drop_path_rate" in str(error) else "name"
        raise ValueError(f"backbone.{option}: timm cannot build {config.name} so ({error}); leave it out") from error
    if kind == "other":
        _check_other(model, config)
    elif kind != "resnet":
        _check_patches(model, config)
    if config.positions == "plain":
        model.__class__ = PlainPositions
    if config.init == "moco_v3":
        draw_as_moco_v3(model)
    if config.sincos:
        fix_sincos_positions(model)
    if config.fixed_patch:
        freeze_patch_projection(model)
    if config.batchnorm_mlp:
        replace_mlp_norms(model)
    return model


def feature_width(backbone: nn.Module) -> int:
    """D of a timm model's features."""
    width = backbone.num_features
    assert isinstance(width, int)
    return width


def check_layer(backbone: nn.Module, layer: int) -> VisionTransformer:
    """The backbone, which has at least `layer` blocks.

    Raises:
        ValueError: it is no ViT, or has fewer blocks.
    """
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"selection.layer: {layer} blocks asked for, but the backbone is no ViT")
    if layer > len(backbone.blocks):
        raise ValueError(f"selection.layer: {layer} blocks asked for, but the backbone has {len(backbone.blocks)}")
    return backbone


@contextmanager
def first_blocks(backbone: nn.Module, layer: int | None) -> Iterator[None]:
    """Inside, a ViT stops after `layer` blocks; its final norm and pooling still follow. None = all blocks.

    Raises:
        ValueError: the backbone is no ViT, or has fewer blocks.
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


def _kind(name: str) -> str:
    """vit, eva, swin, resnet or other, by the module of timm's entry point, so that nothing large is built to find out.

    Raises:
        ValueError: timm does not know the name, or the model has two class tokens.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or ["vit_tiny_patch16_224", "resnet50"]
        raise ValueError(f"backbone.name: timm has no model {name!r}; for example {', '.join(near)}")
    module = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    if "distilled" in name:
        raise ValueError(f"backbone.name: {name} has a second class token for distillation; take the model without")
    kinds = {"vision_transformer": "vit", "deit": "vit", "eva": "eva", "swin_transformer": "swin", "resnet": "resnet"}
    return kinds.get(module, "other")


@torch.no_grad()
def _check_other(model: nn.Module, config: BackboneConfig) -> None:
    """Of families that are not known here: one feature an image, and no statistics of batches, which would be each
    process's own."""
    name, side = config.name, config.image_size
    if not hasattr(model, "forward_features"):
        raise ValueError(f"backbone.name: {name} has no forward_features; take a model of one feature an image")
    if has_batchnorm(model):
        raise ValueError(
            f"backbone.name: {name} has BatchNorm, whose statistics are shared among processes for ResNets alone; take "
            f"a ResNet, or a family with LayerNorm such as ConvNeXt"
        )
    device = next(model.parameters()).device
    try:
        features = model.eval()(torch.zeros(1, 3, side, side, device=device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"backbone.image_size: {name} takes no images of {side} pixels ({' '.join(str(error).split())[:90]}); "
            f"take another size"
        ) from error
    finally:
        model.train()
    if not isinstance(features, Tensor) or features.shape != (1, feature_width(model)):
        raise ValueError(f"backbone.name: {name} gives no single feature an image; take another model")


def _check_patches(model: nn.Module, config: BackboneConfig) -> None:
    """A ViT whose own patches do not tile the image would leave out its border; a Swin would fail in training."""
    assert isinstance(model.patch_embed, PatchEmbed)
    side = model.patch_embed.proj.kernel_size[0]  # proj is the convolution
    if config.image_size % side:
        raise ValueError(
            f"backbone.image_size: {config.image_size} is no multiple of {config.name}'s patches of {side}; take one"
            + (", or set backbone.patch_size" if isinstance(model, VisionTransformer | Eva) else "")
        )


@torch.no_grad()
def draw_as_moco_v3(model: nn.Module) -> None:
    """Draws a ViT's weights anew as MoCo v3's code does (facebookresearch/moco-v3, vits.py): uniform with variance
    2 / (inputs + outputs) as Glorot and Bengio (2010) have it, the patch projection as the linear layer that it is,
    query, key and value as the three layers that they are; biases 0, the class token of standard deviation 1e-6."""
    assert isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)
    projection = model.patch_embed.proj
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) and layer is not projection:
            continue
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        outputs = len(weight) // 3 if name.endswith("qkv") else len(weight)
        bound = math.sqrt(6 / (weight[0].numel() + outputs))
        weight.uniform_(-bound, bound)
        if isinstance(bias, Tensor):
            bias.zero_()
    if model.cls_token is not None:
        model.cls_token.normal_(std=1e-6)


class PlainPositions(VisionTransformer):
    """A ViT whose positions are resampled without antialiasing for views of other sizes."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        assert isinstance(self.pos_embed, Tensor) and isinstance(self.patch_embed, PatchEmbed)
        height, width = x.shape[1:3]
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        own_1TD, grid = self.pos_embed, self.patch_embed.grid_size
        patches_1TD = resample_plainly(own_1TD[:, prefix:].unflatten(1, grid), height, width).flatten(1, 2)
        embedded = x.flatten(1, 2) + patches_1TD
        extra: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not extra:
            return self.pos_drop(embedded)
        tokens = torch.cat(extra, 1) + own_1TD[:, :prefix] if prefix else torch.cat(extra, 1)
        return self.pos_drop(torch.cat([tokens.expand(len(x), -1, -1), embedded], 1))


def resample_plainly(positions_1HWD: Tensor, height: int, width: int) -> Tensor:
    """[1, height, width, D]: a bicubic value of the four nearest positions each way, however much the grid shrinks.

    As in DINO's code (vision_transformer.py, interpolate_pos_encoding), the grid is taken to be 0.1 longer than it is.
    """
    rows, columns = positions_1HWD.shape[1:3]
    if (rows, columns) == (height, width):
        return positions_1HWD
    scale = ((height + 0.1) / rows, (width + 0.1) / columns)
    values_1DHW = positions_1HWD.permute(0, 3, 1, 2).float()
    resampled_1DHW = F.interpolate(values_1DHW, scale_factor=scale, mode="bicubic")
    return resampled_1DHW.permute(0, 2, 3, 1).to(positions_1HWD.dtype)


def fix_sincos_positions(model: nn.Module) -> None:
    """Replaces a ViT's position embedding by the fixed 2-D sine-cosine one (MoCo v3, section 5)."""
    assert isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)
    height, width = model.patch_embed.grid_size
    positions = sincos_positions(height, width, model.embed_dim)
    assert isinstance(model.pos_embed, nn.Parameter)
    prefix = model.pos_embed.shape[1] - height * width
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, prefix:] = positions
    model.pos_embed.requires_grad = False


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """[height·width, dim]: a quarter each of sin and cos of columns, sin and cos of rows.

    Raises:
        ValueError: dim is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"backbone.width: {dim} must be divisible by 4 for sine-cosine positions")
    omega = torch.exp(-math.log(10_000.0) * torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    x, y = (grid.flatten()[:, None] * omega for grid in (columns, rows))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()


def freeze_patch_projection(model: nn.Module) -> None:
    """Leaves a ViT's patch projection at its random initial values."""
    assert isinstance(model, VisionTransformer)
    for parameter in model.patch_embed.parameters():
        parameter.requires_grad = False


class TokenBatchNorm(nn.Module):
    """BatchNorm over batch and tokens of [B, T, D] (or [B, H, W, D]) in place of a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens.flatten(0, -2)).view_as(tokens)


def replace_mlp_norms(model: nn.Module) -> None:
    """BatchNorm instead of LayerNorm before every MLP block of a ViT or Swin."""
    assert isinstance(model, VisionTransformer | SwinTransformer)
    for module in model.modules():
        norm = getattr(module, "norm2", None)
        if isinstance(norm, nn.LayerNorm):
            module.norm2 = TokenBatchNorm(norm.normalized_shape[0])
