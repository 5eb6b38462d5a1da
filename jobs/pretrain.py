"""`hardviews pretrain PRESET`: streams shards, chooses hard views, trains, logs every choice."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from jobs.run.config import DataConfig, MonitorConfig, PretrainConfig, load_config
from jobs.run.failure import RankLostError
from jobs.run.folder import RunFolder
from jobs.run.presets import PRESETS, preset
from jobs.run.process import keep_freed_memory
from jobs.run.terminal import parse, speaks
from jobs.run.world import open_world
from jobs.studies.plan import differences
from jobs.training.ending import record_failure
from jobs.training.loop import train
from shards.errors import InputError
from shards.files import local_path

Part = TypeVar("Part", DataConfig, MonitorConfig)


@dataclass(frozen=True)
class PretrainArguments:
    """Pretrains a backbone on streamed shards with hard views. Under torchrun, every process is one rank."""

    run: Path
    """Run folder to write: configuration, checkpoints, metrics, augmentation log."""
    resume: bool = False
    """Resume from the run's newest intact checkpoint, with the run's own configuration; flags cannot change it."""
    overwrite: bool = False
    """Replace the run in that folder."""
    profile: int = 0
    """Trace so many steps, from the sixth on, into profile/ in the run folder, for Chrome, Perfetto or TensorBoard."""
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)


def pretrain(
    config: PretrainConfig, run: Path, *, resume: bool = False, overwrite: bool = False, profile: int = 0
) -> str:
    """Trains into a run folder; returns `finished` or `interrupted`. A resumed run keeps its own configuration, but for
    where `config` says that its shards lie now. Of `profile` steps, from the sixth on, the folder gets a trace.

    Raises:
        InputError: a folder, value or file that does not fit.
    """
    config = absolute(config)
    folder = RunFolder(run)
    ranks = open_world(config.device, last_words=lambda why: record_failure(folder, RankLostError(why)))
    with ranks as world, ExitStack() as stack:
        if world.device.type == "cpu":
            keep_freed_memory()
        if world.leads:
            folder.check(resume=resume, overwrite=overwrite)
            stack.enter_context(folder.locked())
        world.barrier()
        if resume:
            config = moved(load_config(folder.config), config)
        return train(config, folder, world, resume=resume, traced_steps=profile)


def absolute(config: PretrainConfig) -> PretrainConfig:
    """The configuration with paths that hold in any working directory."""

    def fixed(part: Part, *names: str) -> Part:
        paths = {name: local_path(text) for name in names if (text := getattr(part, name))}
        return replace(part, **{name: str(path.absolute()) for name, path in paths.items() if path is not None})

    data = fixed(config.data, "real", "synthetic", "cache")
    return replace(config, data=data, monitor=fixed(config.monitor, "knn_train", "knn_test"))


def moved(own: PretrainConfig, given: PretrainConfig) -> PretrainConfig:
    """A run's own configuration with the shards at the addresses that are given, where any are."""
    data = replace(
        own.data, real=given.data.real or own.data.real, synthetic=given.data.synthetic or own.data.synthetic
    )
    return replace(own, data=data)


def check_kept(given: PretrainConfig, default: PretrainConfig, own: PretrainConfig) -> None:
    """Refuses a preset or flags that differ from the resumed run's `own` configuration, which stays in force.

    Raises:
        InputError: a preset of another objective, or a flag that would be ignored.
    """
    asked, begun = (type(config.objective).__name__.removesuffix("Config") for config in (default, own))
    if asked != begun:
        raise InputError(
            f"preset: this one trains {asked}, but the run was begun with {begun}, and a resumed run keeps its "
            f"configuration; give its preset, or begin anew with --overwrite or another --run"
        )
    changed = {*differences(given, default)} & {*differences(given, own)}
    for name in sorted(changed - {"data.real", "data.synthetic"}):  # shards may have moved
        value = reduce(getattr, name.split("."), given)
        raise InputError(
            f"{name}: {value} is not what the run was begun with, and a resumed run keeps its configuration; leave it "
            f"out, or begin anew with --overwrite or another --run"
        )


def main(argv: Sequence[str]) -> None:
    usage = f"presets: {', '.join(PRESETS)}"
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: hardviews pretrain PRESET --run DIR --data.real SHARDS [flags]\n\n{usage}\n\n"
            "`hardviews pretrain PRESET --help` explains every flag with the preset's default."
        )
        raise SystemExit(0 if argv else 2)
    name, *flags = argv
    if name.startswith("-"):
        raise InputError(f"preset: the first argument is a preset, not {name}; {usage}")
    default = PretrainArguments(tyro.MISSING, config=preset(name))
    arguments = parse(PretrainArguments, flags, f"hardviews pretrain {name}", default)
    if arguments.resume and (kept := RunFolder(arguments.run).config).is_file():
        check_kept(absolute(arguments.config), default.config, load_config(kept))
    how = {name: getattr(arguments, name) for name in ("resume", "overwrite", "profile")}
    state = pretrain(arguments.config, arguments.run, **how)
    if state == "interrupted":
        raise SystemExit(130)
    if speaks():
        print(f"finished: {arguments.run}")
