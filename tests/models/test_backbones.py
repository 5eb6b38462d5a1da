"""Backbones from timm and MoCo v3's changes: what is asked for is what is built, or it is refused."""

import math
from dataclasses import replace

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.backbones import (
    BackboneConfig,
    TokenBatchNorm,
    build_backbone,
    feature_width,
    first_blocks,
    resample_plainly,
    sincos_positions,
)
from models.heads import BatchNorm2d
from models.objectives.base import has_drop

from .toys import VIT, moby

TINY_DEIT = BackboneConfig("deit_small_patch16_224", 32, width=48, depth=1, heads=12)
SWIN = BackboneConfig("swin_tiny_patch4_window7_224", 56)
DINO_V3 = BackboneConfig("vit_small_patch16_dinov3", 32, width=48, depth=1, heads=3)
DINO_V2 = BackboneConfig("vit_small_patch14_reg4_dinov2", 28, width=48, depth=1, heads=3)


@pytest.mark.parametrize(
    ("config", "kind", "width"),
    [
        (VIT, VisionTransformer, 32),
        (TINY_DEIT, VisionTransformer, 48),
        (SWIN, SwinTransformer, 768),
        (DINO_V3, Eva, 48),
        (DINO_V2, VisionTransformer, 48),
        (BackboneConfig("convnext_atto", 64), ConvNeXt, 320),
        (BackboneConfig("resnet10t", 64), ResNet, 512),
    ],
    ids=["vit", "deit", "swin", "dinov3", "dinov2", "convnext", "resnet"],
)
def test_kinds_and_other_view_sizes(config, kind, width):
    model = build_backbone(config, 0.0).eval()
    assert isinstance(model, kind) and feature_width(model) == width
    with torch.no_grad():
        for side in (config.image_size, config.image_size // 2):
            assert model(torch.randn(2, 3, side, side)).shape == (2, width)


def test_resnets_normalise_over_all_ranks():
    model = build_backbone(BackboneConfig("resnet10t", 32), 0.0)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(norm) is BatchNorm2d for norm in norms)


def test_vit_s_can_have_twelve_heads():
    assert build_backbone(TINY_DEIT, 0.0).blocks[0].attn.num_heads == 12
    assert build_backbone(replace(TINY_DEIT, heads=None), 0.0).blocks[0].attn.num_heads == 6


def test_asked_for_batchnorm_is_there():
    """MoBY's code swallows a misspelt keyword and trains LayerNorm."""
    for config in (VIT, replace(SWIN, image_size=56)):
        model = build_backbone(replace(config, batchnorm_mlp=True), 0.0)
        blocks = [m for m in model.modules() if hasattr(m, "norm2")]
        assert blocks and all(type(block.norm2) is TokenBatchNorm for block in blocks)
        assert all(isinstance(block.norm1, nn.LayerNorm) for block in blocks)
    tokens = torch.randn(4, 5, 32) * 3 + 1
    out = TokenBatchNorm(32)(tokens)
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(32), atol=1e-5, rtol=0)


def test_a_fixed_patch_projection_and_fixed_positions_do_not_move():
    objective = moby(backbone=replace(VIT, fixed_patch=True, sincos=True))
    backbone = objective.online.backbone
    fixed = [*backbone.patch_embed.parameters(), backbone.pos_embed]
    before = [p.clone() for p in fixed]
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.1)
    loss, _ = objective.loss(objective.take((torch.randn(4, 2, 3, 16, 16),), torch.zeros(4, dtype=torch.int64), None))
    loss.backward()
    optimizer.step()
    objective.after_step()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(fixed, before, strict=True))
    assert backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_sincos_positions_are_unit_phases_of_columns_and_rows():
    table = sincos_positions(3, 5, 16).view(3, 5, 4, 4)
    torch.testing.assert_close(table[..., 0, :] ** 2 + table[..., 1, :] ** 2, torch.ones(3, 5, 4))
    assert torch.equal(table[0, :, :2], table[2, :, :2]) and torch.equal(table[:, 0, 2:], table[:, 4, 2:])
    torch.testing.assert_close(table[1, 2, 0, 0], torch.tensor(2.0).sin())  # column 2, the fastest wave
    torch.testing.assert_close(table[1, 2, 2, 0], torch.tensor(1.0).sin())  # row 1
    assert len(sincos_positions(4, 4, 32).unique(dim=0)) == 16


def test_drop_path_is_each_encoders_own():
    objective = moby(backbone=replace(VIT, drop_path=0.3))
    assert has_drop(objective.online) and not has_drop(objective.target)
    assert has_drop(moby(backbone=replace(VIT, drop_path=0.0, target_drop_path=0.1)).target)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "vit_bogus"}, "backbone.name: timm has no model 'vit_bogus'; for example"),
        (
            {"name": "mobilenetv3_small_050"},
            "backbone.name: mobilenetv3_small_050 has BatchNorm, .* take a ResNet, or a family with LayerNorm",
        ),
        ({"name": "resnet18", "heads": 3}, "backbone.heads: resnet18 has no such option; leave it out"),
        ({"name": "convnext_atto", "width": 64}, "backbone.width: convnext_atto has no such option; leave it out"),
        ({"name": "vit_small_patch16_dinov3", "sincos": True}, "backbone.sincos: vit_small_patch16_dinov3 has no such"),
        ({"name": "deit_small_distilled_patch16_224"}, "backbone.name: .* second class token for distillation; take"),
        ({"name": "resnet18", "sincos": True}, "backbone.sincos: resnet18 has no such option"),
        ({"name": "resnet18", "batchnorm_mlp": True}, "backbone.batchnorm_mlp: resnet18 has no LayerNorm before MLPs"),
        ({"image_size": 30}, "backbone.image_size: 30 is no multiple of vit_tiny_patch16_224's patches of 16"),
        (
            {"name": "swin_tiny_patch4_window7_224", "image_size": 30},
            "backbone.image_size: 30 is no multiple of swin_tiny_patch4_window7_224's patches of 4; take one$",
        ),
        ({"image_size": 32, "patch_size": 5}, "backbone.patch_size: 5 does not divide the image size 32"),
        ({"width": 100}, "backbone.heads: timm cannot build .* take heads that divide the width"),
        ({"depth": 0}, "backbone.depth: 0 must be at least 1"),
        ({"drop_path": 1.0}, r"backbone.drop_path: 1.0 must lie in \[0, 1\)"),
        ({"pool": "max"}, "backbone.pool: 'max' is unknown; take token, avg or nothing"),
        ({"image_size": 32, "patch_size": 8, "width": 30, "heads": 3, "depth": 1, "sincos": True}, "divisible by 4"),
    ],
)
def test_bad_values_say_field_value_and_remedy(config, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneConfig(**config), 0.0)


def test_a_backbone_that_stops_early_is_whole_again_afterwards():
    backbone = build_backbone(replace(VIT, depth=3), 0.0)
    with pytest.raises(RuntimeError), first_blocks(backbone, 2):
        assert len(backbone.blocks) == 2
        raise RuntimeError
    assert len(backbone.blocks) == 3


@pytest.mark.parametrize("layer", [1, 3])
def test_the_first_blocks_are_those_of_a_shallower_backbone(layer):
    deep, x = build_backbone(replace(VIT, depth=3), 0.0).eval(), torch.randn(2, 3, 16, 16)
    shallow = build_backbone(replace(VIT, depth=layer), 0.0).eval()
    shallow.load_state_dict({name: value for name, value in deep.state_dict().items() if name in shallow.state_dict()})
    with first_blocks(deep, layer):
        torch.testing.assert_close(deep(x), shallow(x))


def test_a_layer_that_the_backbone_does_not_have_is_refused():
    for name, there in (("vit_tiny_patch16_224", "the backbone has 2"), ("resnet18", "the backbone is no ViT")):
        backbone = build_backbone(VIT if there.endswith("2") else BackboneConfig(name, 32), 0.0)
        with pytest.raises(ValueError, match=f"selection.layer: 5 blocks asked for, but {there}"):
            first_blocks(backbone, 5).__enter__()


def test_moco_v3_s_initial_weights_have_its_standard_deviations():
    """sqrt(2 / (inputs + outputs)) of layers as they are used: 0.0417 of patches, 0.051 of q, k, v, 0.032 of MLPs."""
    torch.manual_seed(0)
    config = BackboneConfig("vit_small_patch16_224", heads=12, fixed_patch=True, sincos=True, init="moco_v3")
    model = build_backbone(replace(config, depth=2), 0.0)
    block = model.blocks[1]
    wanted = {
        model.patch_embed.proj: (2 / (3 * 16 * 16 + 384)) ** 0.5,
        block.attn.qkv: (2 / (384 + 384)) ** 0.5,
        block.attn.proj: (2 / (384 + 384)) ** 0.5,
        block.mlp.fc1: (2 / (384 + 1536)) ** 0.5,
        block.mlp.fc2: (2 / (384 + 1536)) ** 0.5,
    }
    for layer, deviation in wanted.items():
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.01)
        assert layer.weight.abs().max().item() == pytest.approx(3**0.5 * deviation, rel=0.01)  # uniform
        assert not layer.bias.any()
    assert [round(wanted[layer], 4) for layer in (model.patch_embed.proj, block.attn.qkv)] == [0.0417, 0.051]
    assert model.cls_token.abs().max() < 1e-5 and not model.patch_embed.proj.weight.requires_grad
    timm_s = build_backbone(replace(config, depth=2, init="timm"), 0.0)
    assert timm_s.blocks[1].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    with pytest.raises(ValueError, match=r"backbone.init: resnet18 has no such option; leave it out"):
        build_backbone(BackboneConfig("resnet18", init="moco_v3"), 0.0)
    with pytest.raises(ValueError, match=r"backbone.init: 'moco' is unknown; take timm or moco_v3"):
        BackboneConfig(init="moco")  # type: ignore[arg-type]


def cubic_row(place, length):
    """Weights of `length` values for the cubic convolution, a = −0.75, at `place`; the ends stand for all beyond."""
    row = torch.zeros(length)
    for near in range(math.floor(place) - 1, math.floor(place) + 3):
        x, a = abs(place - near), -0.75
        weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
        row[min(max(near, 0), length - 1)] += weight
    return row


def test_plain_positions_are_the_cubic_convolution_without_antialiasing():
    own = torch.randn(1, 14, 14, 5)
    rows = torch.stack([cubic_row((i + 0.5) * 14 / 6.1 - 0.5, 14) for i in range(6)])
    wanted = torch.einsum("ir,jc,rcd->ijd", rows, rows, own[0])
    torch.testing.assert_close(resample_plainly(own, 6, 6)[0], wanted, rtol=1e-4, atol=1e-5)
    assert resample_plainly(own, 14, 14) is own


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_medium_patch16_reg4_gap_256"])
def test_only_views_of_other_sizes_see_how_positions_are_resampled(name):
    config = BackboneConfig(name, 64, patch_size=8, width=32, depth=1, heads=2)
    torch.manual_seed(0)
    smooth = build_backbone(config, 0.0).eval()
    plain = build_backbone(replace(config, positions="plain"), 0.0).eval()
    plain.load_state_dict(smooth.state_dict())
    large, small = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(plain(large), smooth(large))
        tokens, others = (model._pos_embed(model.patch_embed(small)) for model in (plain, smooth))
    first = tokens.shape[1] - 9  # behind class and register tokens
    assert torch.equal(tokens[:, :first], others[:, :first])
    assert ((tokens - others)[:, first:].abs().mean((0, 2)) > 1e-3).all()
    with pytest.raises(ValueError, match=r"backbone.positions: resnet18 has no such option"):
        build_backbone(BackboneConfig("resnet18", positions="plain"), 0.0)
