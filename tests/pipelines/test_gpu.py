"""The pipeline on a CUDA device: every colour operation, and both backends against each other. Run by `make gpu-check`.

What can run without such a device runs in the other tests: the torch colour path on CPU tensors (test_colour_device.py)
and DALI's graph on its CPU operators (test_decode.py, test_stream.py).
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from jobs.benches.accuracy import Case, cases, torchvision_views, ways
from jobs.benches.photographs import jpeg, photograph
from pipelines.buffers import Buffers
from pipelines.colour import STD
from pipelines.colour_device import fused_on_device
from pipelines.colour_exact import exact
from pipelines.decode import DaliViews
from pipelines.params import ViewParams
from pipelines.policies import Policy, ViewGroup, ViewPolicy, build_policy
from pipelines.stream import ViewStream
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import SampleReader
from shards.writer import Sample, finish, shard_name, write_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode"),  # a prototype, says torch
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # a hint of torch's compiler
]

CASES = cases(64, photographs=2)
PHOTOGRAPHS = 12
PLAIN = ViewPolicy(jitter=0, gray=0)


def png(seed: int) -> bytes:
    """The photograph of this seed without loss: what differs then is not the decoder."""
    sink = io.BytesIO()
    Image.fromarray(photograph(seed)).save(sink, "PNG")
    return sink.getvalue()


def shards_of(folder: Path, extension: str, contents: list[bytes]) -> Manifest:
    sizes = [photograph(seed).shape[:2] for seed in range(len(contents))]
    samples = [
        Sample(f"{i:04}", content, extension, *size, label=0)
        for i, (content, size) in enumerate(zip(contents, sizes, strict=True))
    ]
    result = write_shard(folder, shard_name(0), samples, {})
    return finish(folder, [result], source="real", classes=("photograph",), provenance={})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return shards_of(tmp_path_factory.mktemp("photographs"), "jpg", [jpeg(seed) for seed in range(PHOTOGRAPHS)])


def stream_of(
    manifest: Manifest,
    policy: Policy,
    backend: str,
    dtype: torch.dtype = torch.float32,
    prefetch: int = 0,
    compiled: bool = False,
) -> ViewStream:
    order = SampleOrder([manifest.counts], [1.0], seed=0)
    reader = SampleReader([manifest])
    named = {"device": "cuda", "backend": backend, "dtype": dtype, "prefetch": prefetch, "compiled": compiled}
    return ViewStream(reader, order, policy, seed=0, batch=PHOTOGRAPHS, **named)


def batch_of(manifest: Manifest, policy: Policy, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, N, 3, S, S] on the device: the first batch."""
    with stream_of(manifest, policy, backend, dtype) as stream:
        return next(stream).crops[0].clone()


def apart_before_colour(manifest: Manifest) -> Tensor:
    """Absolute differences between the backends, of 255."""
    policy = Policy((ViewGroup((PLAIN,), 4, 224),))
    scale = torch.tensor(STD, device="cuda")[:, None, None] * 255
    return (batch_of(manifest, policy, "host") - batch_of(manifest, policy, "device")).abs() * scale


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
    apart = apart_before_colour(manifest)
    assert (apart.mean() <= 0.2, apart.max() <= 3.05) == (True, True), (apart.mean(), apart.max())


def test_backends_crop_alike_where_nothing_is_lost_by_the_format(tmp_path: Path) -> None:
    apart = apart_before_colour(shards_of(tmp_path, "png", [png(seed) for seed in range(PHOTOGRAPHS)]))
    assert (apart.mean() <= 0.2, apart.max() <= 3.05) == (True, True), (apart.mean(), apart.max())


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 95}),
        ("JPEG", "RGB", {"quality": 95, "progressive": True}),
        ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
        ("JPEG", "L", {"quality": 95}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
        ("WEBP", "RGB", {"quality": 95}),
    ],
)
def test_every_format_decodes_as_on_the_cpu(kind: str, mode: str, options: dict[str, object]) -> None:
    sink = io.BytesIO()
    Image.fromarray(photograph(0)[:224, :224]).convert(mode).save(sink, kind, **options)
    data = [np.frombuffer(sink.getvalue(), np.uint8)]
    start, length = np.zeros((1, 1), np.int32), np.full((1, 1), 224, np.int32)
    params = [ViewParams.identity(start, start, length, length)]
    here, there = (DaliViews(1, [(1, 224)], torch.device(d), 1).crops(data, params)[0].cpu() for d in ("cpu", "cuda"))
    apart = (here.int() - there.int()).abs().float()
    assert (apart.mean() <= 0.5, apart.max() <= 4) == (True, True), (apart.mean(), apart.max())


def test_compiled_colour_is_the_same_and_so_is_any_part_of_a_batch() -> None:
    case = next(case for case in CASES if case.operation == "whole policy")
    crops = torch.from_numpy(case.crops_VSS3).cuda()
    eager, compiled = (torch.empty(len(crops), 3, *crops.shape[1:3], device="cuda") for _ in range(2))
    fused_on_device(crops, case.params, eager)
    fused_on_device(crops, case.params, compiled, compiled=True)
    apart = (eager - compiled).abs()
    assert apart.mean() < 1e-4  # a value next to solarize's threshold may jump
    for way, whole in ((False, eager), (True, compiled)):
        for rows in (slice(0, 1), slice(2, 5), slice(3, 20)):
            part = torch.empty_like(whole[rows])
            fused_on_device(crops[rows], case.params[rows], part, compiled=way)
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("compiled", [False, True])
def test_colour_does_not_make_the_host_wait(compiled: bool) -> None:
    case = next(case for case in CASES if case.operation == "whole policy")
    crops = torch.from_numpy(case.crops_VSS3).cuda()
    out = torch.empty(len(crops), 3, *crops.shape[1:3], dtype=torch.bfloat16, device="cuda")
    fused_on_device(crops, case.params, out, compiled=compiled)  # what is made once is made here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_on_device(crops, case.params, out, compiled=compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("backend", "compiled"), [("device", False), ("device", True), ("host", False)])
def test_batches_made_side_by_side_are_those_made_alone(manifest: Manifest, backend: str, compiled: bool) -> None:
    """While the device is busy with a step's work: memory that is used again too early would show."""
    policy = build_policy("byol", 96, 4)
    weights = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    taken: dict[int, list[Tensor]] = {}
    for prefetch in (0, 3):
        with stream_of(manifest, policy, backend, torch.bfloat16, prefetch, compiled) as stream:
            for _ in range(12):
                crops = next(stream).crops[0]
                for _ in range(20):
                    weights = (weights @ weights).clamp(-1, 1)
                taken.setdefault(prefetch, []).append(crops * 1)  # queued behind the products, while others are made
                del crops
    assert all(torch.equal(alone, beside) for alone, beside in zip(taken[0], taken[3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_host_s_batch_goes_to_the_device_without_blocking_copies(manifest: Manifest, dtype: torch.dtype) -> None:
    with stream_of(manifest, build_policy("byol", 96, 2), "host", dtype, prefetch=2) as stream:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [next(stream).crops[0] for _ in range(4)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(crops.is_cuda and crops.dtype == dtype for crops in found)
    assert Buffers(pinned=True).take((2, 3)).is_pinned()


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


def test_damage_is_replaced_on_the_device(tmp_path: Path) -> None:
    contents = [jpeg(seed) for seed in range(PHOTOGRAPHS)]
    contents[1] = contents[1][:2] + bytes(300) + b"\xff\xd9"  # nothing to decode
    contents[2] = contents[2][:2000] + bytes(500) + b"\xff\xd9"  # its markers stand, its scan does not
    torn = shards_of(tmp_path, "jpg", contents)
    with stream_of(torn, build_policy("byol", 64, 2), "device") as stream:
        batch = next(stream)
    assert batch.crops[0].is_cuda
    assert np.isfinite(batch.crops[0].float().cpu().numpy()).all()
    assert 1 not in batch.sample_B  # what a scan is worth that ends early, decoders judge differently
    assert any(error.key == "0001" for error in batch.replaced)
