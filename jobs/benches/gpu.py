"""The benchmarks on this machine's GPU, as JSON with machine and versions: the second half of `make gpu-check`.

python -m jobs.benches.gpu benchmarks/results            # all of them
python -m jobs.benches.gpu benchmarks/results views-4    # some of them
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from jobs.run.process import wait_briefly

_VIEWS = ["--batch", "256", "--made", "1024", "--dtype", "bfloat16", "--rounds", "3"]
_STEP = ["--backbone", "vit_small_patch16_224", "--size", "224", "--patch", "16", "--depth", "12", "--batch", "128"]
# Name → module of the benchmark and its flags, what is wanted most first. Four views is hard-view selection's case, two
# is plain training's. Steps of real training are those of ViT-S, which DeiT-S is too.
BENCHES: dict[str, tuple[str, list[str]]] = {
    "views-4": ("views", ["--views", "4", *_VIEWS]),
    "views-2": ("views", ["--views", "2", *_VIEWS]),
    "training": ("training", ["--sides", "plain", "hard"]),
    "training-more": ("training", ["--sides", "plain", "negatives", "target"]),
    "negatives": ("negatives", []),
    "multicrop": ("multicrop", []),
    "step": ("step", [*_STEP, "--steps", "0"]),
    "colour": ("colour", []),
    "choices": ("step", []),
    "views-accuracy": ("views", ["--accuracy"]),
    "run": ("run", []),
}
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "kornia", "opencv-python-headless", "numpy", "zarr")
_MAIN = "import sys; from jobs.benches.{module} import main; main(sys.argv[1:])"


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


def run_bench(module: str, flags: list[str], device: str = "cuda") -> object:
    """What a benchmark prints as JSON; its tables go to the terminal.

    Raises:
        RuntimeError: it failed; its error output is on the terminal.
    """
    command = [sys.executable, "-c", _MAIN.format(module=module), *flags, "--device", device, "--json"]
    environment = dict(os.environ)
    wait_briefly(environment)  # as the `hardviews` command does
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"jobs.benches.{module} {' '.join(flags)} ended with code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str]) -> int:
    """Writes one JSON file per benchmark into the folder given; returns 1 if any of them failed."""
    folder, *names = argv or [""]
    if not folder or set(names) - set(BENCHES):
        print(f"usage: python -m jobs.benches.gpu FOLDER [NAME …], names: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none here", file=sys.stderr)
        return 2
    results, where = Path(folder), machine()
    results.mkdir(parents=True, exist_ok=True)
    slug = "-".join(str(where["gpu"]).lower().split())
    failed = []
    for name in names or BENCHES:
        module, flags = BENCHES[name]
        start = time.perf_counter()
        print(f"{name}: bench {module} {' '.join(flags)}", flush=True)
        try:
            figures = run_bench(module, flags)
        except RuntimeError as error:
            failed.append(str(error))
            continue
        seconds = round(time.perf_counter() - start, 1)
        content = {"bench": module, "flags": flags, "machine": where, "seconds": seconds, "figures": figures}
        (results / f"{slug}-{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
