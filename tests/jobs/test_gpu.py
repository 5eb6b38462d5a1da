"""Training on a CUDA device: short runs, compiled and not; the CPU's losses; one wait a step. By `make gpu-check`."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs_of_training import rows, same_rows

from jobs.log.replaying import replay_step
from jobs.pretrain import pretrain
from jobs.run.config import PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.run.world import World
from jobs.training.opening import open_training
from jobs.training.state import save
from jobs.training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode"),  # a prototype, says torch
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # a hint of torch's compiler
]


@pytest.fixture
def on_gpu(tiny: PretrainConfig) -> PretrainConfig:
    """The small run on the device."""
    return replace(tiny, device="cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", ["off", "on"], ids=["plain", "compiled"])
def test_a_short_run(on_gpu: PretrainConfig, tmp_path: Path, compiled: str, precision: str) -> None:
    config = replace(on_gpu, compile=compiled, precision=precision)
    assert pretrain(config, tmp_path / "run") == "finished"
    metrics = list(read_metrics(RunFolder(tmp_path / "run").metrics))
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert losses and np.isfinite(losses).all()
    logged = rows(tmp_path / "run")
    assert np.isfinite(logged["loss_BP"]).all()
    assert len(logged["choice_B"]) == config.steps * config.batch


def test_compiled_steps_learn_what_plain_ones_do(without_chance: PretrainConfig, tmp_path: Path) -> None:
    config = replace(without_chance, device="cuda", precision="fp32", steps=2)
    for name in ("off", "on"):
        pretrain(replace(config, compile=name), tmp_path / name)
    one, two = (rows(tmp_path / name)["loss_BP"] for name in ("off", "on"))
    np.testing.assert_allclose(two, one, rtol=1e-2)


def test_the_cpu_s_losses_and_choices(without_chance: PretrainConfig, tmp_path: Path) -> None:
    """Views that two decoders made differ by a little, and so do losses; the weights are drawn alike."""
    for device in ("cpu", "cuda"):
        config = replace(without_chance, device=device, precision="fp32", compile="off", steps=2)
        pretrain(config, tmp_path / device)
    here, there = rows(tmp_path / "cpu"), rows(tmp_path / "cuda")
    for name in ("sample_B", "top", "blur"):
        np.testing.assert_array_equal(here[name], there[name])
    np.testing.assert_allclose(there["loss_BP"], here["loss_BP"], rtol=0.05)
    assert np.corrcoef(here["loss_BP"].ravel(), there["loss_BP"].ravel())[0, 1] > 0.98
    assert (here["choice_B"] == there["choice_B"]).mean() > 0.8


def test_a_resumed_run_goes_on(on_gpu: PretrainConfig, tmp_path: Path) -> None:
    """With the same samples and views; sums whose order a GPU leaves open move the losses by their last digits."""
    config = replace(on_gpu, compile="off", precision="fp32")
    pretrain(config, tmp_path / "whole")
    with ExitStack() as stack:  # 4 of 6 steps, then a checkpoint is what is left of the process
        folder = RunFolder(tmp_path / "broken")
        t = open_training(config, folder, World(0, 1, torch.device("cuda", 0)), stack, False)
        for _ in range(4):
            batch = next(t.stream)
            result = train_step(t, batch)
            t.monitor.after_step(t.step, batch, result)
        save(t)
    pretrain(config, tmp_path / "broken", resume=True)
    same_rows(tmp_path / "whole", tmp_path / "broken", exact=False)


@pytest.mark.parametrize("changes", [{}, {"encoder": "target", "layer": 1}], ids=["online", "target early"])
@pytest.mark.parametrize("compiled", ["off", "on"], ids=["plain", "compiled"])
def test_a_step_waits_for_the_device_once(
    on_gpu: PretrainConfig, tmp_path: Path, compiled: str, changes: dict[str, Any]
) -> None:
    """Where it reads loss, choices and pair losses, by an event, which the mode lets pass."""
    config = replace(on_gpu, compile=compiled, steps=100, selection=replace(on_gpu.selection, **changes))
    with ExitStack() as stack:
        folder = RunFolder(tmp_path / "run")
        t = open_training(config, folder, World(0, 1, torch.device("cuda", 0)), stack, False)
        batches = [next(t.stream) for _ in range(6)]
        for batch in batches[:3]:
            train_step(t, batch)
        t.stream.close()  # its threads may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[3:]:
                assert np.isfinite(train_step(t, batch).loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_views_are_replayed_to_the_bit(on_gpu: PretrainConfig, tmp_path: Path, precision: str) -> None:
    with ExitStack() as stack:
        folder = RunFolder(tmp_path / "run")
        config = replace(on_gpu, compile="on", precision=precision)
        t = open_training(config, folder, World(0, 1, torch.device("cuda", 0)), stack, False)
        batch = next(t.stream)
        seen = batch.crops[0].clone()
        train_step(t, batch)
        t.log.commit()
    found = replay_step(folder, 0, images=[1, 5, 6])
    assert torch.equal(found.crops[0].cpu(), seen[[1, 5, 6]].cpu())
