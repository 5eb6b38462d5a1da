"""The pipeline on a CUDA device: every colour operation, and both backends against each other. Run by `make gpu-check`.

What can run without such a device runs in the other tests: the torch colour path on CPU tensors (test_photometric.py)
and DALI's graph on its CPU operators (test_decode.py, test_stream.py).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.benches.accuracy import Case, cases, torchvision_views, ways
from jobs.benches.photographs import jpeg, photograph
from pipelines.exact import exact
from pipelines.photometric import STD
from pipelines.photometric_device import fused_on_device
from pipelines.policies import Policy, ViewGroup, ViewPolicy, build_policy
from pipelines.stream import ViewStream
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import SampleReader
from shards.writer import Sample, finish, shard_name, write_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASES = cases(64, photographs=2)
PHOTOGRAPHS = 12
PLAIN = ViewPolicy(jitter=0, gray=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("photographs")
    samples = [
        Sample(f"{seed:04}", jpeg(seed), "jpg", *photograph(seed).shape[:2], label=0) for seed in range(PHOTOGRAPHS)
    ]
    result = write_shard(folder, shard_name(0), samples, {})
    return finish(folder, [result], source="real", classes=("photograph",), provenance={})


def batch_of(manifest: Manifest, policy: Policy, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, N, 3, S, S] on the device: the first batch."""
    order = SampleOrder([manifest.counts], [1.0], seed=0)
    with ViewStream(
        SampleReader([manifest]),
        order,
        policy,
        seed=0,
        batch=PHOTOGRAPHS,
        device="cuda",
        backend=backend,
        dtype=dtype,
        prefetch=0,
    ) as stream:
        return next(stream).crops[0].clone()


@pytest.mark.parametrize("case", CASES, ids=[f"{c.operation}-{c.values}".replace(" ", "_") for c in CASES])
@pytest.mark.parametrize("way", ["fused in torch (cuda)", "exact (cuda)"])
def test_every_operation_on_the_device_is_near_torchvision(case: Case, way: str) -> None:
    apart = (ways("cuda")[way](case) - torchvision_views(case, floating=True)).abs()
    assert apart.mean() < 0.5
    if not case.values.startswith("drawn"):
        assert apart.max() <= 1.1  # solarize jumps by 1 at its threshold


@pytest.mark.parametrize("function", [fused_on_device, exact])
def test_the_device_agrees_with_the_cpu(function: Callable[..., None]) -> None:
    case = next(case for case in CASES if case.operation == "whole policy")
    crops = torch.from_numpy(case.crops_VSS3)
    here = torch.empty(len(crops), 3, *crops.shape[1:3])
    there = torch.empty_like(here, device="cuda")
    function(crops, case.params, here)
    function(crops.cuda(), case.params, there)
    apart = (there.cpu() - here).abs() * torch.tensor(STD)[:, None, None] * 255
    assert apart.mean() < 0.05
    assert apart.max() <= 1.1  # solarize again


def test_backends_agree_before_colour(manifest: Manifest) -> None:
    policy = Policy((ViewGroup((PLAIN,), 4, 224),))
    scale = torch.tensor(STD, device="cuda")[:, None, None] * 255
    apart = (batch_of(manifest, policy, "host") - batch_of(manifest, policy, "device")).abs() * scale
    assert apart.mean() <= 0.2
    assert apart.max() <= 3.05


def test_backends_agree_with_the_whole_policy_on_average(manifest: Manifest) -> None:
    policy = build_policy("byol", 224, 4)
    scale = torch.tensor(STD, device="cuda")[:, None, None] * 255
    apart = (batch_of(manifest, policy, "host") - batch_of(manifest, policy, "device")).abs() * scale
    assert apart.mean() <= 1


def test_the_device_writes_bfloat16(manifest: Manifest) -> None:
    policy = build_policy("byol", 96, 2)
    full = batch_of(manifest, policy, "device")
    half = batch_of(manifest, policy, "device", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(full.bfloat16(), half)


def test_a_device_batch_is_the_same_again(manifest: Manifest) -> None:
    policy = build_policy("dino", 96, 2, 4)
    assert torch.equal(batch_of(manifest, policy, "device"), batch_of(manifest, policy, "device"))


def test_damage_is_replaced_on_the_device(manifest: Manifest, tmp_path: Path) -> None:
    sizes = [photograph(seed).shape[:2] for seed in range(4)]
    contents = [jpeg(seed) for seed in range(4)]
    contents[2] = contents[2][:2000] + bytes(500) + b"\xff\xd9"  # its markers stand, its scan does not
    samples = [Sample(f"{i:04}", content, "jpg", *sizes[i], label=0) for i, content in enumerate(contents)]
    torn = finish(
        tmp_path, [write_shard(tmp_path, shard_name(0), samples, {})], source="real", classes=("a",), provenance={}
    )
    order = SampleOrder([torn.counts], [1.0], seed=0)
    policy = build_policy("byol", 64, 2)
    with ViewStream(SampleReader([torn]), order, policy, seed=0, batch=4, device="cuda", prefetch=0) as stream:
        batch = next(stream)
    assert batch.crops[0].is_cuda
    assert np.isfinite(batch.crops[0].float().cpu().numpy()).all()
    assert set(batch.ids_B.tolist()) <= {0, 1, 2, 3}
