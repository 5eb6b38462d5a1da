"""Every flag of every job with boundary values: exit code 0, or 2 and one line; never a traceback or a crash.

A command that is still at work when its time is up counts as accepted: a value may ask for a year of training.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from jobs import cli
from jobs.bench import BENCHES
from jobs.run.folder import RunFolder

WALKER = str(Path(__file__).with_name("flag_walker.py"))
NUMBERS = ("0", "1", "-1", "1000000000000", "nan")
TEXTS = ("", "/dev/null/file", "nan", "ü[x]*?\n")
SECONDS = 4.0  # of the processor, that a command may take
PATIENCE = 180.0  # of the clock, after which it hangs
TINY = (
    "--backbone.image-size 16 --backbone.patch-size 8 --backbone.width 24 --backbone.depth 1 --backbone.heads 2 "
    "--backbone.drop-path 0 --steps 2 --batch 8 --monitor.loggers json --data.threads 1 --device cpu "
    "--checkpoint.every 1 --monitor.bank 64"
)
# Preset → the flags that keep its objective small. The first one's common flags are walked, of the others their own.
OBJECTIVES = {
    "synby-vit-tiny": "--objective.hidden 16 --objective.width 8 --objective.queue 1024",
    "moco-v3-vit-s": "--objective.hidden 16 --objective.width 8",
    "simclr-vit-s": "--objective.hidden 16 --objective.width 8",
    "byol-vit-s": "--objective.hidden 16 --objective.width 8",
    "simsiam-rn50": "--objective.hidden 16 --objective.width 8 --backbone.name vit_tiny_patch16_224",
    "swav-vit-s": "--objective.hidden 16 --objective.width 8 --objective.prototypes 10",
    "dino-vit-s": "--objective.hidden 16 --objective.bottleneck 8 --objective.outputs 24 --views.local-size 8",
    "ibot-vit-s": "--objective.hidden 16 --objective.bottleneck 8 --objective.outputs 24",
}


@dataclass(frozen=True)
class Inputs:
    """Where the commands find what they need."""

    train: Path
    test: Path
    images: Path
    run: Path
    out: Path


def commands(at: Inputs) -> dict[str, list[str]]:
    """Job → a command of it that ends well, or works on, without the flag that is tried."""
    sets = f"--run {at.run} --train {at.test} --test {at.test} --device cpu --no-cache --out {at.out}/scores.json"
    words = {
        "build": f"imagefolder:{at.images} --out {at.out} --workers 1",
        "index": f"{at.test} --overwrite --workers 1",
        "verify": f"{at.test} --workers 1",
        "info": f"{at.test}",
        "duplicates": f"{at.test} --out {at.out}/duplicates",
        "generate": f"--pipeline {at.out}/pipeline --like {at.test} --out {at.out}/clone --train-on {at.test} "
        "--steps 1 --train.side 8 --train.width 8 --train.steps 1 --count 2 --device cpu --size 8",
        "evaluate knn": sets,
        "evaluate linear": f"{sets} --epochs 1 --no-augment",
        "evaluate finetune": f"{sets} --epochs 1",
        "evaluate retrieval": sets,
        "evaluate maps": f"--run {at.run} --images {at.test} --count 1 --device cpu --out {at.out}",
        "embed": f"--run {at.run} --data {at.test} --out {at.out}/features --device cpu",
        "export": f"{at.run} --out {at.out}",
        "export-backbone": f"{at.run} --out {at.out}",
        "analyse": f"{at.run} --pairs 1000 --no-pictures",
        "report": f"{at.run} --images 1 --out {at.out}/report.html",
        "replay": f"{at.run} --step 0 --images 1 --device cpu --out {at.out}",
        "runs": f"{at.run.parent}",
        "compare": f"{at.run} {at.run} --out {at.out}/comparison.png",
        "sweep": f"synby-vit-tiny --real {at.test} --test {at.test} --out {at.out} --seeds 1 --steps 1 "
        "--probe-epochs 0",
        "doctor": "",
        "demo": f"--out {at.out} --images {at.images}",
        **{f"bench {name}": "" for name in BENCHES},
    }
    pretrain = f"--run {at.out}/run --data.real {at.test} {TINY}"
    words |= {f"pretrain {preset}": f"{pretrain} {own}" for preset, own in OBJECTIVES.items()}
    return {name: [*name.split(), *own.split()] for name, own in words.items()}


def flags_of(job: str) -> list[argparse.Action]:
    """The job's flags and positional arguments, as its own parser has them."""
    actions: list[argparse.Action] = []

    def note(kind: type, **options: Any) -> None:
        warnings.simplefilter("ignore")  # get_parser is the one way to a parser, and deprecated
        kept = {name: options[name] for name in ("prog", "default", "config") if name in options}
        parser = tyro.extras.get_parser(kind, **kept)
        actions.extend(action for action in parser._actions if "-h" not in action.option_strings)
        raise SystemExit(0)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tyro, "cli", note)
        cli.run([*job.split(), "--help"])
        raise SystemExit  # a job that returns behind its parser
    return actions


def cases(job: str, base: Sequence[str]) -> Iterator[list[str]]:
    """Commands of a job: its own with a boundary value for each flag."""
    own_flags = "pretrain" in job and not job.endswith(next(iter(OBJECTIVES)))
    for action in flags_of(job):
        name = next((text for text in action.option_strings if text.startswith("--")), None)
        if own_flags and not (name or "").startswith("--objective."):
            continue
        if name is None:  # positional: instead of the first word behind the job
            place = len(job.split())
            for value in TEXTS:
                yield [*base[:place], value, *base[place + 1 :]]
            continue
        for values in values_of(action):
            yield [*base, name, *values]
        for text in action.option_strings[1:]:  # --no-…
            yield [*base, text]


def values_of(action: argparse.Action) -> Iterator[tuple[str, ...]]:
    """What to give to a flag."""
    kind = str(action.metavar)
    if action.nargs == 0 or kind == "None":
        yield ()
        return
    options = NUMBERS if "INT" in kind or "FLOAT" in kind else TEXTS
    if "{" in kind and "INT" not in kind and "FLOAT" not in kind and "STR" not in kind and "PATH" not in kind:
        choices = kind.strip("{}[] .").replace("{", "").split("}")[0].split(",")
        options = (*(choice for choice in choices if choice != "ray"), "")  # a cluster takes too long to start
    several = action.nargs if isinstance(action.nargs, int) else 1
    for value in options:
        yield (value,) * several
    if action.nargs in ("*", "+"):
        yield ()


class Walker:
    """A process that runs commands, and another one where it crashes or hangs."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._process = self._begin()

    def _begin(self) -> "subprocess.Popen[str]":
        command = [sys.executable, WALKER, str(self._seconds)]
        home = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipe = subprocess.PIPE
        whole = {**os.environ, **home}
        with (self._folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=self._folder, env=whole
            )

    def run(self, words: Sequence[str]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        late = threading.Timer(PATIENCE, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if line:
            return json.loads(line)
        self.close()
        code = self._process.returncode
        self._process = self._begin()
        return {"code": code, "printed": "", "trace": f"the process ended with {code}"}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def faults(answer: dict[str, Any]) -> str | None:
    """What is wrong with how a command ended."""
    if answer["trace"]:
        return answer["trace"]
    if answer["code"] not in (None, 0, 2) or "Traceback" in answer["printed"]:
        return f"exit code {answer['code']}: {answer['printed']}"
    refusals = [line for line in answer["printed"].splitlines() if line.startswith("hardviews: ")]
    if answer["code"] == 2 and len(refusals) != 1:
        return f"refused by {len(refusals)} lines: {answer['printed']}"
    return None


@pytest.fixture(scope="module")
def inputs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("flags")
    at = Inputs(digits / "train", digits / "test", digits / "images" / "test", root / "runs" / "run", root / "out")
    words = dict(commands(at))["pretrain synby-vit-tiny"]
    words[words.index("--run") + 1] = str(at.run)
    assert cli.run(words) == 0
    return at


JOBS = [*commands(Inputs(*[Path()] * 5))]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_every_flag_with_boundary_values(job: str, inputs: Inputs, tmp_path: Path) -> None:
    at = replace(inputs, out=tmp_path / "out")
    walked, wrong, late = list(cases(job, commands(at)[job])), [], 0
    walker = Walker(tmp_path, SECONDS)
    try:
        for words in walked:
            shutil.rmtree(at.out, ignore_errors=True)
            answer = walker.run(words)
            late += answer["code"] is None
            if fault := faults(answer):
                wrong.append(f"{' '.join(words[-3:])!r}: {fault}")
            state = RunFolder(at.out / "run").read_state().get("state") if answer["code"] is not None else None
            if state == "running":
                wrong.append(f"{' '.join(words[-3:])!r}: it has ended, and its state says that it runs")
    finally:
        walker.close()
    print(f"{job}: {len(flags_of(job))} flags, {len(walked)} commands, {late} still at work after {SECONDS:g} s")
    assert not wrong, f"{len(wrong)} of {len(walked)}:\n" + "\n\n".join(wrong)


@pytest.mark.parametrize("job", ["evaluate linear", "evaluate finetune", "analyse", "replay", "generate", "sweep"])
def test_numbers_that_are_none_are_refused_by_every_flag(job: str, tmp_path: Path) -> None:
    """The part of the walk that takes no time: a command line is read before anything is opened."""
    base, tried = commands(Inputs(*[tmp_path] * 5))[job], 0
    for words in cases(job, base):
        if words[-1] == "nan" and words[-2].startswith("--"):
            try:
                code = cli.run(words)
            except SystemExit as ended:
                code = ended.code
            assert code == 2, words[-2:]
            tried += 1
    assert tried > 2
