"""How a run computes: memory layouts, recomputed activations, compiled encoders, what monitors make of features."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs_of_training import same_run, weights
from torch.distributed.run import get_args_parser

from jobs.benches import run as bench_run
from jobs.log.writer import open_log
from jobs.pretrain import pretrain
from jobs.run.config import PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.training import monitor
from jobs.training.health import forward_flops
from jobs.training.memory_bank import MemoryBank
from jobs.training.monitor import feature_health
from jobs.training.opening import make_objective
from models.backbones import BackboneConfig, build_backbone
from models.objectives import Length
from models.objectives.base import Chosen
from models.probes import positives_report
from pipelines.params import ViewParams, pairs
from shards.errors import InputError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """Of one loss on fixed pixels, drop path included."""
    objective = make_objective(config, Length(10, 5.0), torch.device("cpu")).train()
    torch.manual_seed(1)
    crops = torch.randn(8, 2, 3, 16, 16)
    torch.manual_seed(2)
    loss, _ = objective.loss(Chosen((crops,)))
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradients(tiny: PretrainConfig) -> None:
    tiny = replace(tiny, backbone=replace(tiny.backbone, depth=3, drop_path=0.3))
    plain, recomputed = gradients(tiny), gradients(replace(tiny, checkpoint_activations=True))
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_activations_with_batchnorm_are_not_recomputed(tiny: PretrainConfig) -> None:
    config = replace(tiny, backbone=replace(tiny.backbone, batchnorm_mlp=True), checkpoint_activations=True)
    with pytest.raises(InputError, match="checkpoint_activations: not for vit_tiny"):
        make_objective(config, Length(10, 5.0), torch.device("cpu"))


def test_resnets_run_channels_last_and_resume_to_the_bit(tiny: PretrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, backbone=BackboneConfig("resnet10t", 16), steps=2, batch=4)
    objective = make_objective(config, Length(10, 5.0), torch.device("cpu")).eval()
    for encoder in (objective.online, objective.target):
        assert encoder is not None
        layouts = {
            p.is_contiguous(memory_format=torch.channels_last) for p in encoder.backbone.parameters() if p.ndim == 4
        }
        assert layouts == {True}
    plain = build_backbone(config.backbone, 0.0).eval()
    plain.load_state_dict(objective.online.backbone.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(objective.online.backbone(x), plain(x), rtol=1e-4, atol=1e-4)
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for file in (tmp_path / "again" / "checkpoints").glob("step-00000002.*"):
        file.unlink()
    assert pretrain(config, tmp_path / "again", resume=True) == "finished"
    same_run(tmp_path / "whole", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"encoder": "target", "layer": 1}], ids=["online", "target early"])
def test_compiled_encoders_learn_what_plain_ones_do(
    without_chance: PretrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = replace(without_chance, steps=2, selection=replace(without_chance.selection, **changes))
    config = replace(config, backbone=replace(config.backbone, depth=2))
    for how in ("off", "on"):
        assert pretrain(replace(config, compile=how), tmp_path / how) == "finished"  # type: ignore[arg-type]
    plain, compiled = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        if name.endswith("weight"):
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_flops_of_a_deit_s_are_the_published_ones() -> None:
    """4.6 billion multiply-adds (Touvron et al. 2021, table 5)."""
    backbone = build_backbone(BackboneConfig("deit_small_patch16_224"), 0.0)
    assert forward_flops(backbone, 224, torch.device("cpu")) == pytest.approx(2 * 4.6e9, rel=0.03)


def test_health_is_told_by_source_and_features_that_are_not_finite_do_not_stop_a_run() -> None:
    torch.manual_seed(0)
    collapsed, spread = torch.ones(8, 4), torch.randn(8, 4)
    source_B = torch.arange(2).repeat_interleave(8)
    found = feature_health(torch.cat([collapsed, spread]), source_B, ("real", "synthetic"))
    assert found["health/feature_std/real"] < 1e-6 < 0.3 < found["health/feature_std/synthetic"]
    assert found["health/rankme/real"] == pytest.approx(1, abs=0.01) and found["health/rankme/synthetic"] > 3
    assert feature_health(torch.full((4, 4), torch.nan), torch.zeros(4), ("real",)) == {}


def test_the_bank_votes_by_class_and_never_for_itself() -> None:
    bank, sample_B, labels_B = MemoryBank(8, 2, 2), torch.arange(4), torch.tensor([0, 0, 1, 1])
    features_BD = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])

    def scored() -> list[list[bool]]:
        return [found_B.tolist() for found_B in bank.score(sample_B, features_BD, labels_B)]

    assert scored() == [[False] * 4] * 2  # nobody is in it
    bank.update(sample_B[:1], features_BD[:1], labels_B[:1])
    assert scored() == [[False, True, False, False], [False, True, True, True]]
    bank.update(sample_B, features_BD, labels_B)
    assert scored() == [[True] * 4] * 2


def test_images_are_scored_before_the_bank_takes_them_in(tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(replace(tiny, steps=2, monitor=replace(tiny.monitor, every=1)), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert ["monitor/bank_knn" in line for line in lines] == [False, True]  # nobody is in it at the first step


def test_contrastive_tasks_are_analysed_on_health_steps(tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(tiny, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "contrast/proxy" in line]
    assert [line["step"] for line in lines] == [3, 6]
    names = {f"contrast/{name}" for name in ("proxy", "proxy_synthetic", "false_negatives")}
    assert names | {"contrast/proxy/real", "contrast/false_negatives/synthetic"} <= lines[-1].keys()
    assert lines[-1]["contrast/proxy_synthetic"] <= lines[-1]["contrast/proxy"]
    curve = read_metrics(tmp_path / "run" / "curves.jsonl")[-1]["matching_probabilities"]
    assert curve["rank"][0] == 1 and curve["rank"][-1] == 50  # the queue's length
    assert curve["value"] == sorted(curve["value"], reverse=True) and 0 < sum(curve["value"]) <= 1


def overlap(params: ViewParams, image: int, a: int, b: int) -> float:
    """Intersection over union of two crop boxes of an image."""
    first, second = (
        {
            (y, x)
            for y in range(params.top[image, view], params.top[image, view] + params.height[image, view])
            for x in range(params.left[image, view], params.left[image, view] + params.width[image, view])
        }
        for view in (a, b)
    )
    return len(first & second) / len(first | second)


def test_choices_are_told_by_source_as_the_log_has_them(tiny: PretrainConfig, tmp_path: Path) -> None:
    selection = replace(tiny.selection, random_share=0.4)
    pretrain(replace(tiny, steps=2, selection=selection), tmp_path / "run")  # its only line is about both steps
    (line,) = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "selection/chosen_iou" in line]
    (log,) = open_log(RunFolder(tmp_path / "run").log).chunks(1000)
    wanted: dict[str, list[float]] = {}
    gains = []
    for image, (choice, source) in enumerate(zip(log.choice_B, log.source_B, strict=True)):
        ious = [overlap(log.params, image, a, b) for a, b in pairs(4)]
        losses = log.loss_BP[image]
        found = {
            "chosen_iou": ious[choice],
            "lowest_iou_share": float(ious[choice] == min(ious)),
            "chosen_loss": losses[choice],
        }
        gains.append(losses[choice] - losses.mean())
        if not log.at_random_B[image]:  # the rule chose nothing there
            found["gain"] = gains[-1]
        for name, value in found.items():
            for suffix in ("", ("/real", "/synthetic")[source]):
                wanted.setdefault(f"selection/{name}{suffix}", []).append(value)
    assert len(wanted) == 4 * 3 and 32 == len(wanted["selection/chosen_iou"]) > len(wanted["selection/gain"])
    # Synthetic negatives do not take part in scores.
    assert line["train/loss_random_pair"] == pytest.approx(line["train/loss_real"] - np.mean(gains), rel=1e-5)
    for name, values in wanted.items():
        assert line[name] == pytest.approx(np.mean(values), rel=1e-4), name


def test_audits_are_told_in_the_next_line(tiny: PretrainConfig, tmp_path: Path) -> None:
    """Whatever steps they fall on: here the first and the fourth, where lines are about two steps each."""
    pretrain(replace(tiny, selection=replace(tiny.selection, audit_every=3)), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("selection/agreement", "selection/regret"):
        assert [line["step"] for line in lines if name in line] == [2, 4]
    agreements = [line["selection/agreement"] for line in lines if "selection/agreement" in line]
    assert agreements == [1.0, 1.0]  # the rule in full is what chose


def test_embeddings_of_the_last_part_are_told_by_its_own_sources(
    tiny: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(pairs_, source_B, names):
        seen.append((len(pairs_[0][0]), source_B.tolist()))
        return positives_report(pairs_, source_B, names)

    monkeypatch.setattr(monitor, "positives_report", noted)
    data = replace(tiny.data, synthetic_share=0.4)  # so that parts have sources of their own
    pretrain(replace(tiny, data=data, steps=3, accumulate=2), tmp_path / "run")
    log = list(open_log(RunFolder(tmp_path / "run").log).chunks(1000))
    newest_B = np.concatenate([part.source_B for part in log])[-16:].tolist()
    assert newest_B[:8] != newest_B[8:] and seen == [(8, newest_B[8:])]


def test_the_bank_is_told_by_source(tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(replace(tiny, steps=4), tmp_path / "run")
    line = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line][-1]
    # A quarter of the 16 images is synthetic, and all have neighbours by then.
    real, synthetic = line["monitor/bank_knn/real"], line["monitor/bank_knn/synthetic"]
    assert real != synthetic and line["monitor/bank_knn"] == pytest.approx((12 * real + 4 * synthetic) / 16)


def test_the_run_benchmark_tells_what_watching_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LINE": 2, "FULL": 3, "WARM": 3}.items():
        monkeypatch.setattr(bench_run, name, value)
    found = bench_run.measure(bench_run.RunBench(batch=8, cycles=1, threads=1))
    assert found["bare_ms_cpu"][0] > 0
    for name in ("taken", "watched", "null"):
        for clock in ("cpu", "wall"):
            share, low, high = found[f"{name}_{clock}"]
            assert low <= share <= high, name
    assert found["taken_wall"][1] > 0


def test_the_cost_of_watching_is_found_in_noise() -> None:
    """1 % of every step, 10 % with a line besides, 110 % where all is written: 0.01 + 0.09·0.1 + 0.01·1.1 in all."""
    chance, kind = np.random.default_rng(0), bench_run.kinds(120)
    assert np.bincount(kind).tolist() == [96, 12, 12]
    speed = 1 + 0.3 * np.sin(np.arange(120) / 20)  # of a machine that others use
    load = [speed * (1 + 0.01 * chance.standard_normal(120) + 3 * (chance.random(120) < 0.05)) for _ in range(3)]
    bare, again = load[0], load[1]
    watched = load[2] * 1.01 + speed * np.choose(kind, (0.0, 0.1, 1.1))
    cost, low, high = bench_run.overhead(bare, watched, kind)
    assert low < 0.03 < high and high - low < 0.02 and cost == pytest.approx(0.03, abs=0.005)
    cost, low, high = bench_run.overhead(bare, again, kind)
    assert low < 0 < high and abs(cost) < 0.005


FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >> CALLS
case "$(basename "$0") $1" in
"scontrol show") echo node1; echo node2 ;;
srun*) trap 'sleep 0.5; echo saved >> CALLS; exit 130' TERM; echo $$ > PID; for _ in $(seq 200); do sleep 0.1; done ;;
scancel*) kill -TERM "$(cat PID)" ;;
esac
"""


def test_the_slurm_example_requeues_itself_behind_its_checkpoint(tmp_path: Path) -> None:
    for name in ("srun", "scontrol", "scancel", "hardviews"):
        tool = tmp_path / name
        tool.write_text(FAKE.replace("CALLS", str(tmp_path / "calls")).replace("PID", str(tmp_path / "pid")))
        tool.chmod(0o755)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000002.json").touch()
    names = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "RUN": str(tmp_path / "run")}
    script = Path(__file__).parents[3] / "docs" / "slurm.sh"
    job = subprocess.Popen(["bash", str(script)], env={"PATH": f"{tmp_path}:/usr/bin:/bin", **names})
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    job.terminate()
    assert job.wait(30) == 130
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["saved", "scontrol requeue 7"]
    words = calls[1].split()
    torchrun = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (torchrun.training_script, torchrun.nnodes) == (str(tmp_path / "hardviews"), "2")
    assert torchrun.training_script_args[:2] == ["pretrain", "synby-hard-deit-s"]
    assert "--resume" in torchrun.training_script_args
