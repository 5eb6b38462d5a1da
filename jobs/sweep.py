"""`hardviews sweep`: a study of several runs; finished ones are skipped, unfinished ones resumed."""

import fcntl
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.text import Text

from jobs.evaluation import linear, protocols
from jobs.evaluation.backbones import ModelConfig
from jobs.evaluation.images import align_labels, open_images
from jobs.pretrain import pretrain
from jobs.run import checkpoint
from jobs.run.config import PretrainConfig, load_config
from jobs.run.data import open_data
from jobs.run.failure import TrainingFailedError
from jobs.run.folder import RunFolder, write_json
from jobs.run.terminal import console, fail, parse, tables, warn
from jobs.studies.output import table_of, write_results
from jobs.studies.plan import Member, Study, changed, differences, members, shared_changes
from jobs.studies.ready import study
from jobs.studies.results import (
    RunResult,
    beside_file,
    read_result,
    scores_file,
    seconds_left,
    span,
)
from jobs.studies.time_limit import TimeLimit, process_began, time_limit
from jobs.training.ending import record_failure
from jobs.training.opening import make_objective
from models.objectives import Length
from shards.errors import InputError

VALIDATION = 0.2  # share of the training images that picks the probe's rate; held-out ones are for the score alone


@dataclass(frozen=True)
class SweepConfig:
    """Runs a study: arms × seeds, each into its own run folder, then kNN and a linear probe, a table and a plot.

    Run again, the same command skips what is finished and goes on with the rest. On several GPUs start it once per GPU
    (CUDA_VISIBLE_DEVICES) with the same --out: each takes runs that no other has.

    Exit code 0: all runs are done; 75: time is up, or other processes have the rest; 1: runs failed; 130: interrupted.
    """

    study: tyro.conf.Positional[str]
    """A ready-made study (cifar10-study; cifar10-study-small shows the machinery on a CPU), or a preset that --axis
    varies."""
    real: str
    """Shards to pretrain on; kNN and linear probe learn from them too."""
    test: str
    """Held-out shards or ImageFolder to score on."""
    out: Path
    """Folder for the run folders, summary.json, runs.csv and results.png."""
    synthetic: str = ""
    """Shards of synthetic images to mix in; empty = none."""
    axis: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An axis as field=value,value (repeat the flag for more): every combination is an arm."""
    change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field=value that all arms share, such as backbone.width=64 (repeat the flag for more)."""
    seeds: int | None = None
    """Runs per arm; None = the study's own (3; 2 of cifar10-study-small)."""
    epochs: float | None = None
    """Length of every run (epochs); None = the study's own."""
    steps: int | None = None
    """Length of every run (steps); overrides epochs."""
    batch: int | None = None
    """Images per step; None = the study's own."""
    arms: tuple[str, ...] = ()
    """Run only these arms; none = all. The table shows the results of the others so far."""
    minutes: float = 0.0
    """Time limit of the command in minutes; it ends with a checkpoint, from which the same command resumes.
    0 = run to the end."""
    probe_epochs: int | None = None
    """Epochs of the linear probe on frozen features; 0 = no probe; None = the study's own."""


def sweep(config: SweepConfig) -> list[RunResult]:
    """Runs what is missing and returns how all runs stand.

    Raises:
        InputError: no such study, preset, arm or field; values, shards or folders that do not fit.
        KeyboardInterrupt: Ctrl-C, after what is there has been written.
    """
    chosen = study(config.study, config.axis)
    planned = plan(config, chosen)
    settings = scoring(config, chosen)
    check(config, planned)
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        with time_limit(config.minutes, process_began()) as limit:
            try:
                work(config, planned, settings, limit)
            except KeyboardInterrupt:
                if not limit.over:
                    raise
    finally:
        results = [read_result(member, config.out, settings) for member in planned]
        write_results(config.out, config.study, chosen, results, settings)
        note_missing(planned, results)
    return results


def plan(config: SweepConfig, chosen: Study) -> list[Member]:
    """The runs of the study.

    Raises:
        InputError: an arm or field that there is not, a value that it cannot have.
    """
    if unknown := set(config.arms) - set(chosen.arms):
        raise InputError(f"arms: {', '.join(sorted(unknown))} unknown; this study has {', '.join(chosen.arms)}")
    base = chosen.base()
    lengths = {name: getattr(config, name) for name in ("epochs", "steps", "batch")}
    lengths = {name: value for name, value in lengths.items() if value is not None}
    if "epochs" in lengths:
        lengths.setdefault("steps", None)  # the study's own would override them
    if lengths.keys() & {"epochs", "steps"} and any("steps" in changes for changes in chosen.arms.values()):
        raise InputError(f"steps, epochs: each arm of {config.study} has a length of its own; leave them out")
    base = replace(base, **lengths)
    base = changed(base, shared_changes(config.change))
    # Scores are taken at the end; held-out images are watched while training only where a change asks for it.
    watched = (config.real, config.test) if base.monitor.knn_every else ("", "")
    base = replace(
        base,
        data=replace(base.data, real=(config.real,), synthetic=(config.synthetic,) if config.synthetic else ()),
        monitor=replace(base.monitor, knn_train=watched[0], knn_test=watched[1]),
    )
    return members(base, chosen.arms, chosen.seeds if config.seeds is None else config.seeds)


def scoring(config: SweepConfig, chosen: Study) -> dict[str, Any]:
    """The settings that a finished run's scores depend on.

    Raises:
        InputError: a negative number of epochs.
    """
    epochs = chosen.probe_epochs if config.probe_epochs is None else config.probe_epochs
    if epochs < 0:
        raise InputError(f"probe_epochs: {epochs} must be 0 or above; 0 leaves the linear probe out")
    return {"train": config.real, "test": config.test, "probe_epochs": epochs, "validation": VALIDATION}


def check(config: SweepConfig, planned: Sequence[Member]) -> None:
    """Checks before the first run that no run of the study will be refused.

    Raises:
        InputError: shards or labels that do not fit, values that do not, a run of another configuration in `out`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("sweep: not under torchrun; start it once per GPU (CUDA_VISIBLE_DEVICES) with the same --out")
    if config.minutes < 0:
        raise InputError(f"minutes: {config.minutes:g} must be 0 or above")
    if config.out.exists() and not config.out.is_dir():
        raise InputError(f"out: {config.out} is a file; name a folder")
    with closing(open_images(config.real)) as train, closing(open_images(config.test)) as test:
        align_labels(train, test)
    for arm, trained in {member.arm: member.config for member in planned}.items():
        try:
            check_arm(trained)
        except ValueError as error:
            raise InputError(f"{error} (arm {arm})") from error
    for member in planned:
        kept = config.out / member.name / "config.json"
        if kept.is_file() and (fields := differences(load_config(kept), member.config)):
            raise InputError(
                f"out: {kept.parent} was trained with other values of {', '.join(fields)}; choose another --out, or "
                f"remove that folder"
            )


def check_arm(config: PretrainConfig) -> None:
    """Opens the shards and builds the model without memory, on torch's meta device.

    Raises:
        ValueError: values, sizes or shards that do not fit, or a number format that this machine lacks.
    """
    open_data(config).reader.close()
    with torch.device("meta") as meta:
        make_objective(config, Length(1, 1), meta)


def work(config: SweepConfig, planned: Sequence[Member], settings: Mapping[str, Any], limit: TimeLimit) -> None:
    """Trains and scores what is missing, run by run, until time is up; a run that fails does not keep the others."""
    for number, member in enumerate(planned, 1):
        if config.arms and member.arm not in config.arms:
            continue
        with taken(config.out, member.name) as free:
            results = [read_result(one, config.out, settings) for one in planned]
            if limit.over:
                return
            result = results[number - 1]
            if free and result.state == "done" and member.arm == planned[0].arm and not result.untrained:
                score_beside(config.out / member.name, settings)
            if not free or result.state == "done":
                continue
            left = seconds_left(planned, results)
            after = f" (about {span(left)} for all that is left)" if left else ""
            console.print(Text.assemble((f"{number}/{len(planned)} {member.name}", "bold"), after), highlight=False)
            try:
                if complete(member, config.out / member.name):
                    score(config.out / member.name, settings)
                    if member.arm == planned[0].arm:
                        score_beside(config.out / member.name, settings)
                elif not limit.over:
                    raise KeyboardInterrupt  # training has answered it with a checkpoint
            except Exception as error:
                note_failure(config.out / member.name, error)


def complete(member: Member, folder: Path) -> bool:
    """Whether the run is finished, after running it or going on with it where it is not."""
    run = RunFolder(folder)
    if run.read_state().get("state") == "finished":
        return True
    begun = bool(checkpoint.entries(run.checkpoints))
    if not begun and folder.exists():  # it ended before its first checkpoint
        shutil.rmtree(folder)
    return pretrain(member.config, folder, resume=begun) == "finished"


def score(folder: Path, settings: Mapping[str, Any]) -> None:
    """kNN and linear top-1 of a finished run, into its folder."""
    began = time.monotonic()
    scores = scores_of(ModelConfig(run=folder), settings)
    content = {"settings": dict(settings), "scores": scores, "seconds": round(time.monotonic() - began, 2)}
    write_json(scores_file(folder), content)


def score_beside(folder: Path, settings: Mapping[str, Any]) -> None:
    """What all arms' scores of a seed have to be read beside, into the folder of the first arm's run: those of the
    backbone before training and of raw pixels."""
    size = load_config(RunFolder(folder).config).backbone.image_size
    untrained = scores_of(ModelConfig(run=folder, untrained=True), settings)
    pixels = scores_of(ModelConfig(run=folder, pixels=True, size=size), settings)
    content = {"settings": dict(settings), "scores": {"untrained": untrained, "pixels": pixels}}
    write_json(beside_file(folder), content)


def scores_of(model: ModelConfig, settings: Mapping[str, Any]) -> dict[str, float]:
    """kNN top-1, and linear top-1 where the settings ask for it."""
    common: dict[str, Any] = {"model": model, "train": settings["train"], "test": settings["test"]}
    scores = {"knn": protocols.evaluate_knn(protocols.KnnConfig(**common))["scores"]["top1"]}
    if settings["probe_epochs"]:
        sgd = linear.LinearConfig(epochs=settings["probe_epochs"])
        probe = protocols.LinearProbeConfig(**common, sgd=sgd, augment=False, validation=settings["validation"])
        scores["linear"] = protocols.evaluate_linear(probe)["scores"]["top1"]
    return scores


def note_failure(folder: Path, error: Exception) -> None:
    """Says which run failed and keeps the reason; what nobody foresaw keeps its traceback too."""
    foreseen = isinstance(error, InputError | TrainingFailedError)
    if not foreseen:
        traceback.print_exception(error)
    reason = str(error) if foreseen else f"{type(error).__name__}: {error}".splitlines()[0]
    warn(f"{folder.name} failed: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    record_failure(RunFolder(folder), TrainingFailedError(reason))


def note_missing(planned: Sequence[Member], results: Sequence[RunResult]) -> None:
    """Says how many runs are done and what the others will take."""
    done, left = sum(result.state == "done" for result in results), seconds_left(planned, results)
    if done < len(planned):
        after = f", about {span(left)} are left" if left else ""
        console.print(f"{done} of {len(planned)} runs are done{after}; the same command goes on", highlight=False)


@contextmanager
def taken(out: Path, name: str) -> Iterator[bool]:
    """Whether no other process works on a run; inside, none can begin to. The lock goes with the process."""
    (out / ".locks").mkdir(exist_ok=True)
    with (out / ".locks" / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def main(argv: Sequence[str]) -> None:
    """Entry point of `hardviews sweep`."""
    config = parse(SweepConfig, argv, prog="hardviews sweep")
    results = sweep(config)
    tables.print(table_of(results, study(config.study, config.axis)))
    for name in ("summary.json", "runs.csv", "results.png"):
        if (config.out / name).is_file():
            print(config.out / name)
    failed = [result for result in results if result.state == "failed"]
    for result in failed:
        fail(f"{config.out / result.run} failed: {result.reason}")
    if failed:
        raise SystemExit(1)
    if any(result.state != "done" for result in results if not config.arms or result.arm in config.arms):
        raise SystemExit(os.EX_TEMPFAIL)
