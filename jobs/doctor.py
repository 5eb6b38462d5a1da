"""`hardviews doctor`: versions, devices, decoders, and what is missing with how to get it."""

import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from jobs.run.terminal import parse, tables
from shards.errors import install_extra

COLOURS = {"ok": "green", "absent": "yellow", "broken": "red"}  # of a finding's state
SIDE = 64  # pixels of the image that is decoded
CLOSE = 6  # largest difference of 255 that two JPEG decoders may have
INSTALL_PINNED = "install the pinned versions, in a checkout of hardviews: pip install -c constraints.txt -e ."
# Other builds of the same package.
STAND_INS = {
    "nvidia-dali-cuda130": ("nvidia-dali-cuda120",),
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
}
# What each extra is for; its packages are read from the project's own metadata.
EXTRAS = {
    "generate": "synthetic images from diffusion pipelines",
    "ray": "building and generating on a cluster",
    "s3": "shards at s3:// addresses",
    "loggers": "Weights & Biases and MLflow",
    "onnx": "exporting backbones to ONNX",
}


@dataclass(frozen=True)
class DoctorConfig:
    """Checks this machine; exit code 1 if something that every run needs is broken."""

    json: bool = False
    """Print a JSON list instead of a table."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """ok; absent: works without, but something cannot be done; broken: has to be mended first."""
    detail: str
    remedy: str = ""


def machine() -> Iterator[Finding]:
    """Interpreter, system, cores, memory, disk."""
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("python", "ok" if good else "broken", version, "" if good else "install Python 3.11 or 3.12")
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("resources", "ok", f"{cores} cores, {memory:.1f} GiB memory, {free:.1f} GiB free on this disk")


def requirements() -> dict[str, list[str]]:
    """Names of the packages that the project asks for: by extra, and under "" those that it always needs."""
    by_extra: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("hardviews") or []:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        system = re.search(r"sys_platform\s*==\s*['\"](\w+)['\"]", line)
        if name and not (system and system[1] != sys.platform):
            by_extra.setdefault(extra[1] if extra else "", []).append(name[0])
    return by_extra


def version_of(package: str) -> str | None:
    """The installed version of a package or of one that stands in for it, or None."""
    for name in (package, *STAND_INS.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def packages() -> Iterator[Finding]:
    """Versions of what is always needed, one by one, and of the extras, together."""
    by_extra = requirements()
    for package in by_extra.get("", []):
        version = version_of(package)
        without = "absent" if "dali" in package else "broken"  # Pillow decodes where DALI is not
        remedy = "" if version else f"pip install {package}"
        yield Finding(package, "ok" if version else without, version or "not installed", remedy)
    for extra, purpose in EXTRAS.items():
        versions = {package: version_of(package) for package in by_extra.get(extra, [])}
        listed = ", ".join(f"{package} {version or '–'}" for package, version in versions.items())
        missing = not all(versions.values())
        remedy = f"for {purpose}, {install_extra(extra)}" if missing else ""
        yield Finding(f"extra {extra}", "absent" if missing else "ok", listed, remedy)


def torch_pair() -> Iterator[Finding]:
    """Whether torch and torchvision fit each other: a mismatch shows on import alone."""
    import torch

    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        remedy = "install both from the same index, in one pip command"
        yield Finding("torch with torchvision", "broken", first_line(error), remedy)
    else:
        yield Finding("torch with torchvision", "ok", f"built for CUDA {torch.version.cuda or 'none'}")


def number_formats() -> Iterator[Finding]:
    """Number formats that the processor multiplies in, for `--precision` and `--selection.precision`."""
    import torch

    from models.precision import has_bf16_units

    formats = "fp32 and bf16" if has_bf16_units(torch.device("cpu")) else "fp32"
    yield Finding("number formats", "ok", f"the processor multiplies in {formats}")


def devices() -> Iterator[Finding]:
    """GPUs that torch can use, or why it cannot."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            needs = (
                f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
            )
            remedy = "update the NVIDIA driver, or install a torch built for the CUDA version that it supports"
            yield Finding("gpu", "broken", f"there is one that torch cannot use; {needs}", remedy)
        else:
            yield Finding(
                "gpu", "absent", "none: everything runs on the CPU", "a machine with an NVIDIA GPU trains faster"
            )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16 and tf32" if facts.major >= 8 else "neither bf16 nor tf32: pass --precision fp32"
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        detail = f"{facts.name}, {memory}, compute capability {facts.major}.{facts.minor}, {bf16}"
        yield Finding(f"gpu {index}", "ok", detail)


def processes() -> Iterator[Finding]:
    """Backends for training in several processes."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding(
            "several processes", "absent", "torch.distributed is not in this torch", "install another torch build"
        )
        return
    yield Finding("gloo", "ok" if dist.is_gloo_available() else "absent", "several processes on CPUs")
    if dist.is_nccl_available() and torch.cuda.is_available():
        from torch.cuda import nccl

        yield Finding("nccl", "ok", ".".join(map(str, nccl.version())))
    elif dist.is_nccl_available():
        yield Finding("nccl", "absent", "is there, but has no GPU to work on", "needed for several GPUs alone")
    else:
        yield Finding("nccl", "absent", "not in this torch", "for several GPUs install a torch built with CUDA")


def decoders() -> Iterator[Finding]:
    """Decodes one JPEG on every backend and compares the pixels with Pillow's."""
    import torch

    from pipelines.decode import HAS_DALI, open_decoder

    content = np.frombuffer(small_jpeg(), np.uint8)
    reference = decoded(open_decoder(1, backend="pillow").decode([content])[0])
    yield agreement("Pillow", lambda: reference, smooth_picture())
    yield agreement("OpenCV", lambda: by_opencv(content), reference)
    if not HAS_DALI:
        remedy = "pip install nvidia-dali-cuda130 (Linux); until then Pillow decodes, several times slower"
        yield Finding("decode: DALI", "absent", "not installed", remedy)
        return
    yield agreement("DALI", lambda: decoded(open_decoder(1, backend="dali").decode([content])[0]), reference)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield agreement(f"DALI's view graph on {device}", lambda device=device: by_graph(content, device), reference)


def small_jpeg() -> bytes:
    """A small JPEG of slow gradients, in which decoders hardly differ."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(smooth_picture()).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def smooth_picture() -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    return np.stack([255 * x, 255 * y, 127 * (x + y)], -1).astype(np.uint8)


def decoded(result: Any) -> np.ndarray:
    """A decoder's image as an array.

    Raises:
        RuntimeError: it says that it cannot decode it.
    """
    if isinstance(result, str):
        raise RuntimeError(result)
    return result.numpy()


def by_opencv(content: np.ndarray) -> np.ndarray:
    import cv2

    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise RuntimeError("OpenCV gives no image")
    return image


def by_graph(content: np.ndarray, device: str) -> np.ndarray:
    """The image through the graph that streams run on GPUs: decoded, and one crop of the whole taken."""
    import torch

    from pipelines.decode import DaliViews
    from pipelines.params import ViewParams

    start, length = np.zeros((1, 1), np.int32), np.full((1, 1), SIDE, np.int32)
    graph = DaliViews(1, [(1, SIDE)], torch.device(device), threads=1)
    (crops,) = graph.crops([content], [ViewParams.identity(start, start, length, length)])
    return crops[0, 0].cpu().numpy()


def agreement(name: str, decode: Callable[[], np.ndarray], reference: np.ndarray) -> Finding:
    """Whether a backend decodes, and as the reference does."""
    title = f"decode: {name}"
    try:
        image = decode()
    except Exception as error:  # a broken installation raises anything
        return Finding(title, "broken", first_line(error), "install the package again; see its version above")
    if image.shape != reference.shape:
        return Finding(title, "broken", f"gives {image.shape}, not {reference.shape}", "install the package again")
    most = int(np.abs(image.astype(int) - reference).max())
    remedy = "" if most <= CLOSE else INSTALL_PINNED
    return Finding(title, "ok" if most <= CLOSE else "broken", f"within {most}/255 of the reference", remedy)


def crops() -> Iterator[Finding]:
    """How views are cropped on the host; the compiled kernel has to give the bits of torch's operator."""
    import torch

    from pipelines.crop import crop_by_torch, find_kernel
    from pipelines.params import ViewParams

    kernel = find_kernel()
    if isinstance(kernel, str):
        remedy = "with AVX2 and a C compiler install hardviews again; until then crops take three times as long"
        yield Finding("crops", "absent", f"by torch's operator; the kernel: {kernel}", remedy)
        return
    image = torch.from_numpy(smooth_picture())
    start, length = np.array([[0, 5]], np.int32), np.array([[SIDE, SIDE // 3]], np.int32)
    params = ViewParams.identity(start, start, length, length)[0]
    compiled, expected = (torch.empty(2, SIDE // 2, SIDE // 2, 3, dtype=torch.uint8) for _ in range(2))
    kernel(image, params, compiled)
    crop_by_torch(image, params, expected)
    if torch.equal(compiled, expected):
        yield Finding("crops", "ok", "by the compiled kernel, equal to torch's operator in every bit")
    else:
        differs = "the compiled kernel gives other pixels than torch's operator"
        yield Finding("crops", "broken", differs, INSTALL_PINNED)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


CHECKS = (machine, packages, torch_pair, number_formats, devices, processes, decoders, crops)


def examine() -> list[Finding]:
    """All findings; a check that breaks down is one too."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:  # a broken installation raises anything, and the rest is still worth seeing
            name = check.__name__.replace("_", " ")
            findings.append(
                Finding(name, "broken", f"{type(error).__name__}: {first_line(error)}", "see the lines above")
            )
    return findings


def table_of(findings: list[Finding]) -> Table:
    """The findings as a table."""
    table = Table("what", "state", "found", "remedy")
    for one in findings:
        table.add_row(one.name, Text(one.state, style=COLOURS[one.state]), one.detail, one.remedy)
    return table


def run(config: DoctorConfig) -> bool:
    """Prints the findings; whether nothing is broken."""
    findings = examine()
    broken = [one.name for one in findings if one.state == "broken"]
    if config.json:
        print(json.dumps([asdict(one) for one in findings]))
    else:
        tables.print(table_of(findings))
        absent = sum(one.state == "absent" for one in findings)
        verdict = f"broken: {', '.join(broken)}" if broken else "all that a run needs is there"
        print(f"{verdict}; {absent} optional things are absent" if absent else verdict)
    return not broken


def main(argv: list[str]) -> None:
    """Entry point of `hardviews doctor`."""
    if not run(parse(DoctorConfig, argv, prog="hardviews doctor")):
        sys.exit(1)
