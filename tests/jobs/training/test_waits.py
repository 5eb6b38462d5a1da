"""How often a training step waits for the device, counted on CUDA tensors without values."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.run.config import PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.optim import build_optimizer
from jobs.run.world import World
from jobs.training import step as stepping
from jobs.training.opening import open_training
from models.selection import pair_index
from tests.fake_cuda import GPU, NoWaits, as_fake, fake_cuda, move


@pytest.fixture(autouse=True)
def indices_of_their_own():
    """What is made once for a device, others must not find without values."""
    pair_index.cache_clear()
    yield
    pair_index.cache_clear()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("selection", "accumulate"),
    [
        ({"rule": "random"}, 1),
        ({"rule": "lowest-iou"}, 1),
        ({"random_share": 0.25}, 1),
        ({"encoder": "target", "layer": 1, "audit_every": 1}, 1),
        ({"every": 2}, 2),
    ],
    ids=["random", "lowest IoU", "hardest", "audited", "accumulated"],
)
def test_a_step_waits_once(
    tiny: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    selection: dict[str, Any],
    accumulate: int,
    ranks: int,
) -> None:
    """Where it reads loss, norm, choices and pair losses, which lie on the device until then."""
    config = replace(
        tiny,
        accumulate=accumulate,
        precision="bf16",
        steps=100,
        selection=replace(tiny.selection, **selection),
        monitor=replace(tiny.monitor, bank=0, health_every=2),
    )
    waits = []

    def on_host(*tensors: torch.Tensor | None) -> list[Any]:
        waits.append([None if tensor is None else tensor.device for tensor in tensors])
        return [None if tensor is None else np.zeros(tensor.shape, kind_of(tensor)) for tensor in tensors]

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == GPU
        for parameter in t.learned:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(stepping, "on_host", on_host)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with ExitStack() as stack:
        t = open_training(config, RunFolder(tmp_path / "run"), World(0, 1, torch.device("cpu")), stack, False)
        batches = [next(t.stream) for _ in range(3)]
        with fake_cuda(monkeypatch, ranks):
            move(t.objective)
            t.world, t.optimizer = World(0, ranks, GPU), build_optimizer(config.optimizer, t.objective)
            for batch in batches:
                on_device = replace(batch, crops=tuple(as_fake(crops) for crops in batch.crops))
                pair_index(config.selection.views, GPU)  # made once, which waits
                with NoWaits():
                    stepping.train_step(t, on_device)
                devices = {device for device in waits.pop() if device is not None}
                assert devices == {GPU} and not waits


def kind_of(tensor: torch.Tensor) -> type[np.generic]:
    """numpy's type of the tensor's."""
    return {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}[tensor.dtype]
