"""The exported backbone: plain timm in a clean process loads it, features are equal, heads are kept; ONNX too."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_runs import TINY, backbone_at, write_run
from PIL import Image

from jobs import export_backbone
from jobs.evaluation.backbones import ModelConfig, load_frozen
from jobs.evaluation.features import extract_features
from models.backbones import BackboneConfig
from shards.errors import InputError

# Twelve heads at ViT-S's name, whose own number is six: the weights' shapes alone would not tell.
TWELVE_HEADS = BackboneConfig(
    "vit_small_patch16_224", image_size=16, patch_size=8, width=48, depth=2, heads=12, sincos=True
)


def features_by_plain_timm(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Loads the folder in a process that knows nothing of this project."""
    np.save(folder / "x.npy", x.numpy())
    program = (
        "import sys, json, numpy, timm, torch\n"
        f"model = timm.create_model({'local-dir:' + str(folder)!r}, pretrained=True).eval()\n"
        f"x = torch.from_numpy(numpy.load({str(folder / 'x.npy')!r}))\n"
        "with torch.no_grad():\n"
        f"    numpy.save({str(folder / 'y.npy')!r}, model(x).numpy())\n"
        "facts = {'ours': [m for m in sys.modules if m.split('.')[0] in ('models', 'jobs', 'shards', 'pipelines')]}\n"
        "facts['heads'] = model.blocks[0].attn.num_heads\n"
        "facts['input'] = timm.data.resolve_model_data_config(model)['input_size']\n"
        "print(json.dumps(facts))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=folder, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(folder / "y.npy")), json.loads(done.stdout.splitlines()[-1])


def test_plain_timm_loads_equal_features_with_twelve_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", TWELVE_HEADS)
    export_backbone.main([str(run.path), "--out", str(tmp_path / "out"), "--step", "2"])
    assert "timm loads it" in capsys.readouterr().out
    x = torch.randn(3, 3, 16, 16)
    got, facts = features_by_plain_timm(tmp_path / "out", x)
    assert facts == {"ours": [], "heads": 12, "input": [3, 16, 16]}
    with torch.no_grad():
        torch.testing.assert_close(got, backbone_at(2, TWELVE_HEADS)(x))


def test_onnx_runs_any_batch_with_equal_features(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run = write_run(tmp_path / "run")
    export_backbone.main([str(run.path), "--out", str(tmp_path / "out"), "--only-onnx"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        (got,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), backbone_at(4)(x), rtol=1e-3, atol=1e-4)


def test_the_model_card_states_data_settings_and_scores(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my-run")
    config = json.loads(run.config.read_text())
    config["data"] |= {"real": "/somewhere/private/photos", "synthetic": "s3://bucket/clone", "synthetic_share": 0.25}
    run.config.write_text(json.dumps(config))
    run.write_state("finished", verdict="learning", verdict_reason="loss 11.02, chance 13.86")
    run.evaluation.mkdir()
    for step, top1 in ((2, 0.9), (4, 0.731)):
        score = {"kind": "linear", "model": {"source": "run", "step": step, "which": "online"}}
        score |= {"train": {"name": "jane/photos"}, "test": {"name": "held/out"}, "protocol": {"size": 16, "epochs": 9}}
        score |= {"scores": {"top1": top1, "top5": 0.95, "top1_deviation": 0.004}}
        (run.evaluation / f"linear-{step}.json").write_text(json.dumps(score))
    export_backbone.main([str(run.path), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    assert "library_name: timm" in front
    for words in (
        "| verdict | learning (loss 11.02, chance 13.86) |",
        "# my-run",
        "photos |",
        "clone |",
        "25.0 %",
        "| linear | photos | out | size 16, epochs 9 | 73.1 % ± 0.4 | 95.0 % |",
    ):
        assert words in body, words
    assert '"real": "photos"' in body and '"synthetic": "clone"' in body
    for words in ("/somewhere", "private", "bucket", "jane", "90.0 %"):  # places, and scores of other weights
        assert words not in card, words


@pytest.mark.parametrize("licence", ["", "cc-by-4.0"])
def test_the_weights_licence_is_declared_where_it_is_asked_for(tmp_path: Path, licence: str) -> None:
    run = write_run(tmp_path / "run")
    export_backbone.main([str(run.path), "--out", str(tmp_path / "out"), *(["--licence", licence] if licence else [])])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert config["pretrained_cfg"].get("license", "") == licence
    assert ("license: cc-by-4.0" in front) if licence else ("license" not in front)


@pytest.mark.parametrize(("size", "side"), [(16, (16, 16)), (16, (40, 56)), (96, (150, 111))])
def test_the_card_s_code_gives_the_features_that_evaluation_scores(
    tmp_path: Path, size: int, side: tuple[int, int]
) -> None:
    run = write_run(tmp_path / "run", replace(TINY, image_size=size))
    export_backbone.main([str(run.path), "--out", str(tmp_path / "out")])
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    (tmp_path / "images" / "one").mkdir(parents=True)
    smooth = Image.fromarray(picture).resize(side, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "images" / "one" / "image.jpg", quality=95)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("PATH/TO/THIS/FOLDER", str(tmp_path / "out")) + "\ntorch.save(features, 'features.pt')\n"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path / "images" / "one", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    by_card = torch.load(tmp_path / "images" / "one" / "features.pt")
    frozen, _ = load_frozen(ModelConfig(run=run.path))
    scored = extract_features(frozen, tmp_path / "images", size, torch.device("cpu")).features_nD
    assert (by_card - scored).abs().max() < 0.05 * scored.std()


def test_what_timm_cannot_build_is_refused_with_a_way_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", replace(TINY, batchnorm_mlp=True))
    with pytest.raises(InputError, match="--only-onnx"):
        export_backbone.main([str(run.path), "--out", str(tmp_path / "out")])


def test_mistakes_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        export_backbone.main([str(run.path), "--out", str(full)])
    with pytest.raises(InputError, match="there are: 2, 4"):
        export_backbone.main([str(run.path), "--out", str(tmp_path / "out"), "--step", "9"])
    with pytest.raises(InputError, match="no run folder"):
        export_backbone.main([str(full), "--out", str(tmp_path / "out")])
    export_backbone.main([str(run.path), "--out", str(full), "--overwrite"])
    assert (full / "thesis.tex").read_text() == "years of work"
