"""Other people's checkpoints: whose keys are whose, what is resampled, what is refused."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor

from models.backbones import BackboneConfig, build_backbone
from models.weights import backbone_weights, load_weights

from .toys import VIT

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def drawn(seed: int, config: BackboneConfig = VIT) -> dict[str, Tensor]:
    """A state dict of random weights."""
    torch.manual_seed(seed)
    return build_backbone(config, 0.0).state_dict()


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


ONLINE, TARGET = drawn(1), drawn(2)
LAYOUTS = {
    "timm": {"state_dict": under("module.", ONLINE), "epoch": 3},
    "DINO": {
        "student": under("module.backbone.", ONLINE) | {"module.head.mlp.0.weight": torch.ones(2, 2)},
        "teacher": under("backbone.", TARGET),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
    "MoCo v3": {"state_dict": under("module.base_encoder.", ONLINE) | under("module.momentum_encoder.", TARGET)},
    "MoBY": {"model": under("encoder.", ONLINE) | under("encoder_k.", TARGET)},
    "ours": {"objective": under("online.backbone.", ONLINE) | under("target.backbone.", TARGET)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["kept", "online", "target"])
def test_each_encoder_is_found_in_each_layout(layout: str, which) -> None:
    model = build_backbone(VIT, 0.0)
    misfits = load_weights(model, backbone_weights(LAYOUTS[layout], model, which))
    target = layout != "timm" and (which == "target" or (which == "kept" and layout == "DINO"))
    expected = TARGET if target else ONLINE
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not misfits.fresh and not misfits.unused


def test_dinov2_s_names_are_timm_s() -> None:
    """Its code keeps blocks in chunks, registers under another name, and adds a position to the class token."""
    config = BackboneConfig("vit_small_patch14_reg4_dinov2", 28, width=48, depth=2, heads=3)
    weights = drawn(1, config)
    theirs = {name: tensor for name, tensor in weights.items() if name not in ("reg_token", "pos_embed")}
    theirs = {name.replace("blocks.", "blocks.0.", 1): tensor for name, tensor in theirs.items()}
    place = torch.randn(1, 1, 48)
    theirs |= {
        "cls_token": weights["cls_token"] - place,
        "pos_embed": torch.cat([place, weights["pos_embed"]], 1),
        "register_tokens": weights["reg_token"],
        "mask_token": torch.zeros(1, 48),
    }
    model = build_backbone(config, 0.0)
    misfits = load_weights(model, backbone_weights({"teacher": under("backbone.", theirs)}, model, "kept"))
    assert not misfits.fresh and not misfits.unused
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name])


def test_dinov3_s_names_are_timm_s(capsys: pytest.CaptureFixture[str]) -> None:
    config = BackboneConfig("vit_small_patch16_dinov3", 32, width=48, depth=2, heads=3)
    weights = drawn(1, config)
    theirs = {name.replace("reg_token", "storage_tokens"): tensor for name, tensor in weights.items()}
    theirs = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for name, t in theirs.items()}
    theirs |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(144) for i in range(2)} | {"mask_token": torch.zeros(1, 48)}
    model = build_backbone(config, 0.0)
    assert not load_weights(model, backbone_weights(theirs, model, "kept")).fresh
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # in timm's own loading
@pytest.mark.parametrize(
    ("name", "size", "options", "ours"),
    [
        ("vit_tiny_patch16_224", 64, {"patch_size": 8}, {"patch_size": 8}),
        ("vit_tiny_patch16_224", 64, {"depth": 1}, {"depth": 1, "positions": "plain"}),
        ("vit_small_patch16_dinov3", 64, {"patch_size": 8}, {"patch_size": 8}),
        ("swin_tiny_patch4_window7_224", 96, {}, {}),
    ],
)
def test_positions_patches_and_windows_are_resampled_as_timm_does(name: str, size: int, options, ours) -> None:
    torch.manual_seed(0)
    depth = {"depth": options["depth"]} if "depth" in options else {}
    pretrained = timm.create_model(name, num_classes=0, img_size=112 if "swin" in name else 32, **depth).state_dict()
    overlay = {"state_dict": dict(pretrained), "num_classes": 0}
    theirs = timm.create_model(
        name, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay, **options
    ).eval()
    model = build_backbone(BackboneConfig(name, size, **ours), 0.0).eval()
    assert not load_weights(model, pretrained).fresh
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x))


def test_what_does_not_fit_is_named() -> None:
    deep = drawn(1, replace(VIT, depth=3))
    model = build_backbone(VIT, 0.0)
    misfits = load_weights(model, {name: t for name, t in deep.items() if name != "cls_token"} | {"head.weight": X})
    assert misfits.fresh == ("cls_token",)
    assert "head.weight" in misfits.unused and "blocks.2.norm1.weight" in misfits.unused
    assert not [name for name in misfits.unused if name.startswith("blocks.1.")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no weights of such a backbone"),
        ({"layer1.0.conv1.weight": torch.ones(4, 4, 1, 1)}, "holds no weights of such a backbone"),
        (
            drawn(1, replace(VIT, width=48, heads=3)),
            r"has cls_token of shape \[1, 1, 48\], the backbone's is \[1, 1, 32",
        ),
    ],
    ids=["nothing", "another family", "another width"],
)
def test_what_cannot_fit_is_refused(content, message: str) -> None:
    model = build_backbone(VIT, 0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, backbone_weights(content, model, "kept"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
