"""What `precision` means: the flags that are set, the dtype of views, what the log says, what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jobs.log.reader import open_log
from jobs.pretrain import pretrain
from jobs.run import data
from jobs.run.arithmetic import arithmetic_of, use_arithmetic
from jobs.run.config import PretrainConfig
from jobs.run.folder import RunFolder
from jobs.run.world import World
from shards.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def flags() -> tuple[bool, bool]:
    """Whether products of matrices and convolutions are TF32 on CUDA."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def flags_as_before() -> Iterator[None]:
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions


def test_auto_is_bf16_on_cuda_and_fp32_elsewhere() -> None:
    assert arithmetic_of("auto", CUDA) == "bf16" and arithmetic_of("auto", CPU) == "fp32"
    assert arithmetic_of("bf16", CPU) == "bf16" and arithmetic_of("fp32", CUDA) == "fp32"


def test_tf32_is_refused_where_no_unit_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"precision: tf32 is for NVIDIA GPUs .*, not cpu; take fp32"):
        arithmetic_of("tf32", CPU)
    for capability in ((7, 5), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability[0] >= 8:
            assert arithmetic_of("tf32", CUDA) == "tf32"
        else:
            with pytest.raises(InputError, match=r"precision: tf32 is for NVIDIA GPUs .*, not cuda:0; take fp32"):
                arithmetic_of("tf32", CUDA)


def test_flags_are_those_of_what_is_asked_for() -> None:
    for arithmetic, wanted in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        use_arithmetic(arithmetic)  # type: ignore[arg-type]
        assert flags() == (wanted, wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_a_run_sets_them_and_its_log_says_what_it_computed_in(
    tiny: PretrainConfig, tmp_path: Path, precision: str
) -> None:
    use_arithmetic("tf32")
    pretrain(replace(tiny, precision=cast(Any, precision), steps=1), tmp_path / "run")
    assert flags() == (False, False)
    facts = open_log(RunFolder(tmp_path / "run").log).facts
    assert facts["precision"] == ("bf16" if precision == "bf16" else "fp32")


def test_a_run_that_cannot_have_tf32_writes_nothing(tiny: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision: tf32"):
        pretrain(replace(tiny, precision="tf32"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("tf32", torch.float32), ("auto", torch.bfloat16)]
)
def test_views_on_cuda_are_rounded_in_bf16_alone(
    tiny: PretrainConfig, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(data, "ViewStream", lambda *given, **named: named)
    shards = cast(Any, SimpleNamespace(reader=SimpleNamespace(follow=lambda *given: None), order=None))
    config = replace(tiny, precision=cast(Any, precision))
    opened = data.open_stream(config, shards, World(0, 1, CUDA), 0, lambda error: None)
    assert cast(Any, opened)["dtype"] == dtype
