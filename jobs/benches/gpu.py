"""`make gpu-check`: tests and benchmarks of a CUDA machine, in parts that end within five minutes each.

python -m jobs.benches.gpu benchmarks/results                    # all parts, what is wanted most first
python -m jobs.benches.gpu benchmarks/results machine models     # some of them

Every part writes into the folder while it runs: NAME.log what it says, NAME.xml (JUnit) tests, NAME.json a benchmark's
figures with machine and versions. A part that is stopped at its limit keeps what it has, and the next one starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.run.process import wait_briefly

LIMIT = 300  # seconds of a part
GRACE = 20  # seconds that a stopped part has to write what it knows


@dataclass(frozen=True)
class Part:
    """Tests, or a benchmark, and how long they should take on one H100: computed, not measured."""

    estimate: int
    """Seconds."""
    tests: tuple[str, ...] = ()
    """Files with tests for a GPU, which alone import no more than is there, and options of pytest."""
    bench: tuple[str, ...] = ()
    """Benchmark and its flags."""


VIEWS = ("--batch", "256", "--made", "1024", "--dtype", "bfloat16", "--rounds", "3")
STEP = ("--backbone", "vit_small_patch16_224", "--size", "224", "--patch", "16", "--depth", "12", "--batch", "128")
TRAINING = ("training", "--rounds", "2", "--decode-mb-s", "400")
# A start of Python with torch and DALI takes 15 s. A tiny ViT compiles in 10 s (once: the caches are shared), ViT-S in
# 30 s forward and 60 s with its backward; 1,024 photographs are made in 20 s. A step of ViT-S on 256 images is 19
# TFLOP, so 50 ms at 40 % of the peak, and a side of a benchmark 100 steps. Four views is hard views' case, two is
# plain training's.
PARTS: dict[str, Part] = {
    "machine": Part(60),
    "models": Part(90, tests=("tests/models/test_gpu.py",)),
    "pipelines": Part(180, tests=("tests/pipelines/test_gpu.py",)),
    "jobs": Part(
        120, tests=("tests/jobs/test_gpu.py", "tests/shards/generation/test_diffusion.py", "-k", "not compiled")
    ),
    "jobs-compiled": Part(240, tests=("tests/jobs/test_gpu.py", "-k", "compiled")),
    "views-4": Part(120, bench=("views", "--views", "4", *VIEWS)),
    "training-256": Part(280, bench=(*TRAINING, "--sides", "plain", "both")),
    "training-256-parts": Part(280, bench=(*TRAINING, "--sides", "hard", "negatives")),
    "training-512": Part(290, bench=(*TRAINING, "--batch", "512", "--steps", "10", "--sides", "plain", "both")),
    "training-1024": Part(290, bench=(*TRAINING, "--batch", "1024", "--steps", "5", "--sides", "plain", "both")),
    "training-target": Part(160, bench=(*TRAINING, "--sides", "target")),
    "views-2": Part(90, bench=("views", "--views", "2", *VIEWS)),
    "negatives": Part(60, bench=("negatives",)),
    "multicrop": Part(60, bench=("multicrop",)),
    "step": Part(180, bench=("step", *STEP, "--steps", "0")),
    "colour": Part(120, bench=("colour",)),
    "choices": Part(240, bench=("step",)),
    "views-accuracy": Part(120, bench=("views", "--accuracy")),
    "run": Part(240, bench=("run",)),
}
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "kornia", "opencv-python-headless", "numpy", "zarr")
# What the tests and benchmarks of a CUDA device import, besides Python and this project.
NEEDED = (
    *("torch", "torchvision", "timm", "numpy", "PIL", "cv2", "rich", "sklearn", "pytest", "hypothesis"),
    *("nvidia.dali", "kornia", "webdataset", "zarr", "cattrs", "tyro", "diffusers"),
)
_BENCH = "import sys; from jobs.benches.{module} import main; main(sys.argv[1:])"
# Whatever pytest's plugins: a machine without pytest-timeout knows neither its option nor its mark.
_PYTEST = ("-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning")
_PYTEST += ("-W", "ignore::pytest.PytestUnknownMarkWarning", "-p", "no:cacheprovider", "--durations=10", "-v")


def machine() -> dict[str, object]:
    """What the figures hold for."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gigabytes": round(properties.total_memory / 2**30, 1),
        "gpus": torch.cuda.device_count(),
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def missing() -> dict[str, str]:
    """Modules that cannot be imported, and why."""
    found = {}
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package may raise anything
            found[name] = f"{type(error).__name__}: {error}"
    return found


def look_at_machine() -> dict[str, object]:
    """Whether the machine has all that the other parts need; prints it as one JSON object on the last line.

    Raises:
        RuntimeError: something is missing or does not work.
    """
    lacking = missing()
    print(json.dumps({"missing": lacking}), flush=True)
    subprocess.run(["nvidia-smi"], check=False)
    device = torch.device("cuda")
    ones = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
    works = {"bf16 products": bool(((ones @ ones) == 1024).all())}
    print(json.dumps(works), flush=True)
    doubled = torch.compile(lambda x: x * 2 + 1)(torch.ones(64, device=device))
    works["torch.compile"] = bool((doubled == 3).all())
    print(json.dumps(works), flush=True)
    if "nvidia.dali" not in lacking:
        works["JPEGs on the device"] = decodes()
    figures = {"missing": lacking, "works": works}
    print(json.dumps(figures), flush=True)
    if lacking or not all(works.values()):
        raise RuntimeError("the machine lacks something; see above")
    return figures


def decodes() -> bool:
    """Whether DALI makes views of a JPEG on the device that are near the CPU's."""
    import numpy as np

    from jobs.benches.photographs import jpeg, photograph
    from pipelines.decode import DaliViews
    from pipelines.params import ViewParams

    height, width = (np.full((1, 1), side, np.int32) for side in photograph(0).shape[:2])
    params = [ViewParams.identity(np.zeros_like(height), np.zeros_like(width), height, width)]
    data = [np.frombuffer(jpeg(0), np.uint8)]
    here, there = (DaliViews(1, [(1, 224)], torch.device(d), 1).crops(data, params)[0].cpu() for d in ("cpu", "cuda"))
    return bool((here.int() - there.int()).abs().float().mean() < 2)


def command_of(name: str, folder: Path) -> list[str]:
    """What runs a part, as a process of its own."""
    part = PARTS[name]
    if part.tests:
        return [sys.executable, *_PYTEST, "-m", "gpu", *part.tests, f"--junit-xml={folder / name}.xml"]
    if part.bench:
        module, *flags = part.bench
        return [sys.executable, "-c", _BENCH.format(module=module), *flags, "--device", "cuda", "--json"]
    return [sys.executable, "-c", "from jobs.benches.gpu import look_at_machine; look_at_machine()"]


def run_part(name: str, command: list[str], folder: Path, limit: float) -> str:
    """Runs a command for at most `limit` seconds and returns how it ended: ok, failed or stopped. What it says goes to
    NAME.log at once; an object on its last line, to NAME.json."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    wait_briefly(environment)  # as the `hardviews` command does
    log, start = folder / f"{name}.log", time.perf_counter()
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(limit)
            state = "failed" if code else "ok"
        except subprocess.TimeoutExpired:
            state = "stopped"
            process.send_signal(signal.SIGINT)  # pytest writes its report then
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    facts = {"part": name, "state": state, "seconds": round(time.perf_counter() - start, 1)}
    if lines and lines[-1].startswith("{"):
        facts |= {"command": command[1:], "machine": machine(), "figures": json.loads(lines[-1])}
        (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    with (folder / "parts.jsonl").open("a") as sink:
        sink.write(json.dumps({key: facts[key] for key in ("part", "state", "seconds")}) + "\n")
    return state


def main(argv: list[str]) -> int:
    """Runs parts into the folder given; returns 1 if any of them failed or was stopped."""
    folder, *names = argv or [""]
    if not folder or set(names) - set(PARTS):
        print(f"usage: python -m jobs.benches.gpu FOLDER [PART …], parts: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none here", file=sys.stderr)
        return 2
    results = Path(folder) / "-".join(torch.cuda.get_device_name(0).lower().split())
    results.mkdir(parents=True, exist_ok=True)
    bad = []
    for name in names or PARTS:
        print(f"{name}: about {PARTS[name].estimate} s (computed), at most {LIMIT}", flush=True)
        state = run_part(name, command_of(name, results), results, LIMIT)
        print(f"{name}: {state}, see {results / name}.log", flush=True)
        if state != "ok":
            bad.append(name)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
