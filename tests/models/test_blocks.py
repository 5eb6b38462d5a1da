"""A ViT's forward in two parts is its forward."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.backbones import BackboneConfig, build_backbone
from models.blocks import begin, finish, first_blocks, half_depth, summary, summary_width

VIT = BackboneConfig("vit_tiny_patch16_224", 16, 8, width=16, depth=3, heads=2)
WITHOUT_CLASS_TOKEN = replace(VIT, name="vit_base_patch16_siglip_gap_224")


def vit(config: BackboneConfig = VIT) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(config, 0.0).eval()


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize(
    "config", [VIT, replace(VIT, pool="avg"), WITHOUT_CLASS_TOKEN], ids=["token", "avg", "no class token"]
)
def test_the_first_blocks_and_then_the_rest_are_the_whole(config, layer):
    backbone, x = vit(config), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        tokens = begin(backbone, x, layer)
        assert tokens.shape == (3, 4 + backbone.num_prefix_tokens, 16)
        assert torch.equal(finish(backbone, tokens, layer), backbone(x))


def test_views_of_another_size_have_as_many_tokens_as_patches():
    assert begin(vit(), torch.randn(2, 3, 32, 32), 1).shape == (2, 17, 16)


@pytest.mark.parametrize("config", [VIT, WITHOUT_CLASS_TOKEN], ids=["class token", "none"])
def test_a_summary_is_the_class_token_and_the_mean_patch_at_one_scale(config):
    backbone = vit(config)
    prefix = backbone.num_prefix_tokens
    tokens = 10 * begin(backbone, torch.randn(3, 3, 16, 16), 2).detach()
    for image, found in zip(tokens, summary(backbone, tokens), strict=True):
        parts = [*image[:prefix], image[prefix:].mean(0)]
        wanted = torch.cat([(part - part.mean()) / part.std(correction=0) for part in parts])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert len(found) == summary_width(backbone)
    assert summary(backbone, tokens.bfloat16()).dtype == torch.float32


def test_a_backbone_that_stops_early_is_whole_again_afterwards():
    backbone = vit()
    with pytest.raises(RuntimeError), first_blocks(backbone, 2):
        assert len(backbone.blocks) == 2
        raise RuntimeError
    assert len(backbone.blocks) == 3


def test_a_layer_that_the_backbone_does_not_have_is_refused():
    resnet = build_backbone(BackboneConfig("resnet18", 32), 0.0)
    for part in (lambda b: begin(b, torch.randn(1, 3, 16, 16), 5), lambda b: first_blocks(b, 5).__enter__()):
        with pytest.raises(ValueError, match=r"selection.layer: 5 blocks asked for, but the backbone has 3"):
            part(vit())
        with pytest.raises(ValueError, match=r"selection.layer: 5 blocks asked for, but the backbone is no ViT"):
            part(resnet)


def test_half_of_the_blocks_is_at_least_one():
    assert [half_depth(replace(VIT, depth=depth)) for depth in (1, 3, 4, None)] == [1, 1, 2, 6]
    with pytest.raises(ValueError, match="the backbone is no ViT"):
        half_depth(BackboneConfig("swin_tiny_patch4_window7_224"))
