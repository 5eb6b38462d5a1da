"""Runs that start from weights: features as timm has them, both encoders alike, where they come from, mistakes."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from jobs import cli
from jobs.export_backbone import ExportBackboneConfig, export_backbone
from jobs.pretrain import pretrain
from jobs.reporting.card import model_card
from jobs.reporting.rundata import read_run
from jobs.run import checkpoint
from jobs.run.config import OptimizerConfig, PretrainConfig, load_config
from jobs.run.folder import RunFolder
from models.backbones import BackboneConfig
from models.objectives.dino import DINOConfig
from models.objectives.simsiam import SimSiamConfig
from shards.errors import InputError

# As small as timm's names allow, by the arguments that both timm and a backbone take.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 32, {"depth": 2}, {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", 32, {"depth": 2}, {"depth": 2}),
    "deit3": ("deit3_small_patch16_224", 32, {"depth": 2}, {"depth": 2}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 28, {"depth": 2}, {"depth": 2}),
    "dinov3": ("vit_small_patch16_dinov3", 32, {"depth": 2}, {"depth": 2}),
    "eva02": ("eva02_tiny_patch14_224", 28, {"depth": 2}, {"depth": 2}),
    "swin": ("swin_tiny_patch4_window7_224", 56, {}, {}),
    "resnet": ("resnet10t", 32, {}, {}),
    "convnext": ("convnext_atto", 32, {}, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_every_family_are_timm_s(family: str, tiny: PretrainConfig, tmp_path: Path) -> None:
    name, size, options, ours = FAMILIES[family]
    torch.manual_seed(0)
    if "resnet" not in name and "convnext" not in name:
        options = {**options, "img_size": size}
    theirs = timm.create_model(name, num_classes=7, **options).eval()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), file)
    config = replace(tiny, backbone=BackboneConfig(name, size, drop_path=0.1, **ours), init=str(file), steps=0)
    assert pretrain(config, tmp_path / "run") == "finished"
    x = torch.randn(2, 3, size, size)
    overlay = {"file": str(file), "num_classes": 7}
    expected = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **options).eval()
    for which in ("online", "target"):
        model = checkpoint.load_backbone(tmp_path / "run", which).backbone
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))


@pytest.fixture
def first(tiny: PretrainConfig, tmp_path: Path) -> Path:
    """A finished run."""
    pretrain(tiny, tmp_path / "first")
    return tmp_path / "first"


def encoder(run: Path, name: str, part: str = "backbone") -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint."""
    tensors = checkpoint.load_newest(RunFolder(run).checkpoints)["objective"]
    prefix = f"{name}.{part}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("which", ["kept", "online", "target"])
@pytest.mark.parametrize("heads", [False, True])
def test_a_run_begins_with_another_run_s_encoder(
    which, heads: bool, tiny: PretrainConfig, first: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(replace(tiny, init=str(first), which=which, init_heads=heads, steps=0, seed=1), run)
    source = "target" if which == "target" else "online"
    for name in ("online", "target"):
        assert same(encoder(run, name), encoder(first, source))
        assert same(encoder(run, name, "projector"), encoder(first, source, "projector")) == heads
    assert same(encoder(run, "online", "predictor"), encoder(first, "online", "predictor")) == heads
    origin = load_config(run / "config.json").origin
    entry = checkpoint.entries(first / "checkpoints")[-1]
    assert origin is not None and (origin.kind, origin.name, origin.step, origin.encoder) == ("run", "first", 6, source)
    assert origin.sha256 == entry.facts["sha256"]
    assert checkpoint.load_newest(run / "checkpoints")["config"]["origin"]["sha256"] == origin.sha256
    card = model_card(read_run(run), 4, "online")
    assert f"| started from | run first, step 6, {source} encoder (SHA-256 {origin.sha256[:12]}) |" in card


def test_of_dino_the_teacher_is_kept_also_from_its_file(tiny: PretrainConfig, tmp_path: Path) -> None:
    dino = replace(tiny, objective=DINOConfig(outputs=32, hidden=16, bottleneck=8, local_views=0))
    pretrain(dino, tmp_path / "dino")
    assert not same(encoder(tmp_path / "dino", "online"), encoder(tmp_path / "dino", "target"))
    file = checkpoint.entries(tmp_path / "dino" / "checkpoints")[-1].path
    pretrain(replace(tiny, init=str(file), steps=0), tmp_path / "run")
    assert same(encoder(tmp_path / "run", "online"), encoder(tmp_path / "dino", "target"))


def test_an_exported_backbone_goes_on_at_another_size(tiny: PretrainConfig, first: Path, tmp_path: Path) -> None:
    """Its positions are resampled as timm does it; a step is taken, and a resumed run needs the folder no more."""
    export_backbone(ExportBackboneConfig(first, tmp_path / "out"))
    larger = replace(tiny, init=str(tmp_path / "out"), backbone=replace(tiny.backbone, image_size=32))
    pretrain(replace(larger, steps=0), tmp_path / "start")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_backbone(tmp_path / "start")[0](x), theirs(x))
    pretrain(replace(larger, steps=1), tmp_path / "run")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert pretrain(replace(larger, steps=1), tmp_path / "run", resume=True) == "finished"
    origin = load_config(tmp_path / "run" / "config.json").origin
    assert origin is not None and (origin.kind, origin.name, origin.step) == ("backbone", "out", None)


def test_heads_of_another_width_are_named_and_fresh(
    tiny: PretrainConfig, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = replace(tiny, objective=replace(tiny.objective, hidden=48), init=str(first), init_heads=True, steps=0)
    pretrain(wide, tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "init_heads: projector.0.weight, projector." in said and "the predictor is fresh" in said


def test_dino_s_own_file_with_its_flags_is_read(tiny: PretrainConfig, first: Path, tmp_path: Path) -> None:
    teacher = {f"backbone.{name}": tensor for name, tensor in encoder(first, "target").items()}
    torch.save({"teacher": teacher, "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3}, tmp_path / "dino.pth")
    pretrain(replace(tiny, init=str(tmp_path / "dino.pth"), steps=0), tmp_path / "run")
    assert same(encoder(tmp_path / "run", "online"), encoder(first, "target"))


def test_the_verdict_compares_with_the_starting_weights(
    tiny: PretrainConfig, first: Path, digits: Path, tmp_path: Path
) -> None:
    monitor = replace(tiny.monitor, knn_train=str(digits / "train"), knn_test=str(digits / "test"))
    pretrain(replace(tiny, monitor=monitor, init=str(first)), tmp_path / "run")
    state = RunFolder(tmp_path / "run").read_state()
    assert "% by the starting weights)" in state["verdict_reason"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["knn/top1"] for line in lines if "knn/top1" in line}
    assert state["verdict_figures"]["first_knn"] == by_step[0] and state["verdict_figures"]["knn"] == by_step[6]


def test_timm_s_weights_by_name(tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found on this machine without asking the network; its ViTs had pixels of another mean, which is told."""
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("jobs.run.weights.cached_weights", lambda name: str(tmp_path / "model.safetensors"))
    config = replace(tiny, init="vit_tiny_patch16_224", backbone=BackboneConfig("vit_tiny_patch16_224", 32), steps=0)
    pretrain(config, tmp_path / "run")
    assert torch.equal(
        encoder(tmp_path / "run", "target")["blocks.3.attn.qkv.weight"], theirs.blocks[3].attn.qkv.weight
    )
    origin = load_config(tmp_path / "run" / "config.json").origin
    assert origin is not None and (origin.kind, origin.name) == ("timm", "vit_tiny_patch16_224")


def test_mistakes_are_one_line_and_leave_nothing(
    tiny: PretrainConfig, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("jobs.run.weights.cached_weights", lambda name: None)
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 30)
    (tmp_path / "cut.pth").write_bytes(b"nothing")
    torch.save({"config": Path("x"), "model": {}}, tmp_path / "pickle.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    (tmp_path / "empty").mkdir()
    wide = replace(tiny.backbone, width=48, heads=3)
    cases = [
        ({"init": "vit_tinny_patch16_224"}, r"init: vit_tinny_patch16_224 is neither .* did you mean vit_tiny_patch16"),
        ({"init": "nowhere.pth"}, "init: nowhere.pth is neither a file, a folder nor a model"),
        ({"init": "vit_tiny_patch16_224"}, "init: the weights of vit_tiny_patch16_224 are not on this machine and can"),
        ({"init": "vit_base_patch16_xp_224"}, "init: timm has no weights for vit_base_patch16_xp_224; with"),
        ({"init": str(tmp_path / "cut.safetensors")}, "cut.safetensors cannot be read"),
        ({"init": str(tmp_path / "cut.pth")}, "cut.pth is damaged or holds other things than tensors"),
        ({"init": str(tmp_path / "pickle.pth")}, "pickle.pth is damaged or holds other things than tensors"),
        ({"init": str(tmp_path / "tensor.pth")}, "tensor.pth holds a Tensor instead of tensors by name"),
        ({"init": str(tmp_path / "empty")}, "empty is neither a run"),
        ({"init": str(first), "backbone": wide}, "init: .*first has cls_token of shape .* choose backbone.name"),
        (
            {"init": str(first), "backbone": BackboneConfig("resnet10t", 16)},
            "init: .*first has no tensor that this backbone",
        ),
        (
            {"init": str(first), "init_heads": True, "objective": SimSiamConfig(), "optimizer": OptimizerConfig("sgd")},
            "init_heads: the run first trained MoBY, and its heads are not SimSiam's; leave it out",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            pretrain(replace(tiny, **changes), tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
    for changes, field in (
        ({"which": "target"}, "which"),
        ({"init_heads": True}, "init_heads"),
        ({"steps": -1}, "steps"),
    ):
        with pytest.raises(InputError, match=f"^{field}: "):
            replace(tiny, **changes)


def test_flags_start_a_second_stage(digits: Path, first: Path, tmp_path: Path) -> None:
    """At a higher resolution, from a run, by the command line; the origin is no flag."""
    flags = f"--data.real {digits / 'train'} --backbone.width 32 --backbone.depth 1 --backbone.heads 2 --batch 16"
    shape = "--backbone.pool token --backbone.image-size 32 --steps 1 --monitor.bank 0 --device cpu"
    command = ["pretrain", "moby-vit-tiny", "--run", str(tmp_path / "run"), *flags.split(), *shape.split()]
    assert cli.run([*command, "--init", str(first), "--which", "target"]) == 0
    assert load_config(tmp_path / "run" / "config.json").origin is not None
    assert cli.run([*command, "--overwrite", "--origin.name", "x"]) == 2
