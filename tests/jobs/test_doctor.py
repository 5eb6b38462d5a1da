"""`hardviews doctor`: a sound installation is said to be one, and each defect is named with its remedy."""

import importlib
import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from jobs import doctor
from jobs.doctor import Finding, examine
from models import precision
from pipelines.crop import crop_by_torch, find_kernel


def states(findings) -> dict[str, str]:
    return {one.name: one.state for one in findings}


def lacking(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Makes packages look as if they were not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_this_machine_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json"])
    findings = [Finding(**one) for one in json.loads(capsys.readouterr().out)]
    found = states(findings)
    assert "broken" not in found.values()
    for name in ("torch", "timm", "torch with torchvision", "decode: Pillow", "decode: OpenCV"):
        assert found[name] == "ok"
    assert all(one.remedy for one in findings if one.state == "absent")
    versions = {one.name: one.detail for one in findings}
    assert versions["torch"] == importlib.metadata.version("torch")


def test_the_table_ends_with_a_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("x", "ok", "1.0"), Finding("y", "absent", "no", "get y")])
    doctor.main([])
    out = capsys.readouterr().out
    assert "get y" in out
    assert out.strip().splitlines()[-1] == "all that a run needs is there; 1 optional things are absent"


def test_something_broken_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("x", "broken", "torn", "mend x")])
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    assert ended.value.code == 1
    assert capsys.readouterr().out.strip().splitlines()[-1] == "broken: x"


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "timm", "nvidia-dali-cuda130", "ray")
    findings = {one.name: one for one in doctor.packages()}
    assert (findings["timm"].state, findings["timm"].remedy) == ("broken", "pip install timm")
    if "nvidia-dali-cuda130" in findings:  # asked for on Linux alone
        assert findings["nvidia-dali-cuda130"].state == "absent"
    assert findings["extra ray"].state == "absent"
    assert findings["extra ray"].remedy.endswith("pip install '.[ray]'")
    assert findings["numpy"].state == "ok"


def test_the_table_shows_remedies_with_their_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking(monkeypatch, "ray")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.packages,))
    doctor.main([])
    assert "pip install '.[ray]'" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_every_extra_has_a_purpose() -> None:
    assert set(doctor.requirements()) - {"", "dev"} == set(doctor.EXTRAS)


def test_another_build_of_a_package_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"opencv-python": "4.12"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.version_of("opencv-python-headless") == "4.12"
    assert doctor.version_of("numpy") is None


def test_a_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str):
        raise RuntimeError("operator torchvision::nms does not exist\nlong story")

    monkeypatch.setattr(importlib, "import_module", import_module)
    (finding,) = doctor.torch_pair()
    assert (finding.state, finding.detail) == ("broken", "operator torchvision::nms does not exist")
    assert "one pip command" in finding.remedy


@pytest.mark.parametrize(("bf16", "formats"), [(True, "fp32 and bf16"), (False, "fp32")])
def test_what_the_processor_multiplies_in(bf16: bool, formats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda device: bf16)
    (finding,) = doctor.number_formats()
    assert finding.state == "ok" and finding.detail == f"the processor multiplies in {formats}"


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    (finding,) = doctor.devices()
    assert finding.state == "broken"
    assert "update the NVIDIA driver" in finding.remedy


def test_decoders_that_fail_or_differ() -> None:
    picture = doctor.smooth_picture()

    def torn():
        raise OSError("libjpeg.so: cannot open\ntrace")

    cases = {
        "torn": (torn, "libjpeg.so: cannot open"),
        "small": (lambda: picture[:8], "(8, 64, 3)"),
        "dark": (lambda: picture // 2, "/255"),
    }
    for name, (decode, said) in cases.items():
        finding = doctor.agreement(name, decode, picture)
        assert finding.state == "broken"
        assert said in finding.detail
        assert finding.remedy
    assert doctor.agreement("same", lambda: picture, picture).state == "ok"


def test_a_decoder_that_says_no_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def decode(self, data):
            return ["DALI: no library"]

    real = importlib.import_module("pipelines.decode").open_decoder
    monkeypatch.setattr(
        "pipelines.decode.open_decoder",
        lambda batch, backend: Refusing() if backend == "dali" else real(batch, backend=backend),
    )
    monkeypatch.setattr("pipelines.decode.HAS_DALI", True)
    monkeypatch.setattr(doctor, "by_graph", lambda content, device: doctor.smooth_picture())
    findings = {one.name: one for one in doctor.decoders()}
    assert (findings["decode: DALI"].state, findings["decode: DALI"].detail) == ("broken", "DALI: no library")
    assert findings["decode: Pillow"].state == "ok"


def test_without_dali_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.decode.HAS_DALI", False)
    found = states(doctor.decoders())
    assert found == {"decode: Pillow": "ok", "decode: OpenCV": "ok", "decode: DALI": "absent"}


def test_how_crops_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    (here,) = doctor.crops()
    assert (here.state, "kernel" in here.detail) == ("absent" if isinstance(find_kernel(), str) else "ok", True)
    cases = {
        "absent": ("not compiled", "the kernel: not compiled"),
        "ok": (crop_by_torch, "equal to torch's"),
        "broken": (lambda image, params, out: out.zero_(), "other pixels"),
    }
    for state, (kernel, said) in cases.items():
        monkeypatch.setattr("pipelines.crop.find_kernel", lambda kernel=kernel: kernel)
        (finding,) = doctor.crops()
        assert finding.state == state
        assert said in finding.detail
        assert bool(finding.remedy) == (state != "ok")


def test_a_check_that_breaks_down_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_check():
        yield Finding("before", "ok", "")
        raise ImportError("libcuda.so.1: no such file")

    monkeypatch.setattr(doctor, "CHECKS", (broken_check, doctor.machine))
    findings = examine()
    assert findings[0].name == "before"
    assert (findings[1].name, findings[1].state) == ("broken check", "broken")
    assert "libcuda.so.1" in findings[1].detail
    assert findings[2].name == "python"
