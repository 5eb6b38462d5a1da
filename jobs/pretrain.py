"""`hardviews pretrain PRESET`: streams shards, chooses hard views, trains, logs every choice."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Annotated

import tyro

from jobs.run.config import PretrainConfig, load_config
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


@dataclass(frozen=True)
class PretrainArguments:
    """Pretrains a backbone on streamed shards with hard views. Under torchrun, every process is one rank."""

    run: Path
    """Run folder to write: configuration, checkpoints, metrics, augmentation log."""
    resume: bool = False
    """Resume from the run's newest intact checkpoint, with the run's own configuration; --epochs or --steps make it
    longer, also when it has ended, and no other flag can change it."""
    overwrite: bool = False
    """Replace the run in that folder."""
    profile: int = 0
    """Trace so many steps, from the sixth on, into profile/ in the run folder, for Chrome, Perfetto or TensorBoard."""
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)


def pretrain(
    config: PretrainConfig, run: Path, *, resume: bool = False, overwrite: bool = False, profile: int = 0
) -> str:
    """Trains into a run folder; returns `finished` or `interrupted`. A resumed run keeps its own configuration, but for
    where `config` says that its shards lie now, and for its length. Of `profile` steps, from the sixth on, the folder
    gets a trace.

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
            config = continued(load_config(folder.config), config)
        return train(config, folder, world, resume=resume, traced_steps=profile)


def absolute(config: PretrainConfig) -> PretrainConfig:
    """The configuration with paths that hold in any working directory."""

    def whole(address: str) -> str:
        path = local_path(address) if address else None
        return address if path is None else str(path.absolute())

    data, monitor = config.data, config.monitor
    real, synthetic = (tuple(map(whole, addresses)) for addresses in (data.real, data.synthetic))
    data = replace(data, real=real, synthetic=synthetic, cache=whole(data.cache))
    monitor = replace(monitor, knn_train=whole(monitor.knn_train), knn_test=whole(monitor.knn_test))
    init = str(Path(config.init).absolute()) if config.init and Path(config.init).exists() else config.init
    return replace(config, init=init, data=data, monitor=monitor)


def continued(own: PretrainConfig, given: PretrainConfig) -> PretrainConfig:
    """A run's own configuration with the shards at the addresses that are given, where any are, and as long as given:
    where only the epochs are new, they replace a length in steps."""
    data = replace(
        own.data, real=given.data.real or own.data.real, synthetic=given.data.synthetic or own.data.synthetic
    )
    steps = None if given.epochs != own.epochs and given.steps == own.steps else given.steps
    return replace(own, data=data, epochs=given.epochs, steps=steps)


def check_preset(name: str, own: PretrainConfig) -> None:
    """
    Raises:
        InputError: the resumed run was begun with another preset; a run that does not say with which, with another
            objective.
    """
    asked, begun = (type(config.objective).__name__.removesuffix("Config") for config in (preset(name), own))
    if own.preset == name or (not own.preset and asked == begun):
        return
    with_what = own.preset or begun
    raise InputError(
        f"preset: {name} is not what the run was begun with, which is {with_what}, and a resumed run keeps its "
        f"configuration; give its preset, or begin anew with --overwrite or another --run"
    )


def check_kept(given: PretrainConfig, own: PretrainConfig) -> None:
    """
    Raises:
        InputError: flags would change the resumed run's `own` configuration in more than its length.
    """
    # Shards may have moved, and a run may become longer.
    for name in sorted({*differences(given, own)} - {"data.real", "data.synthetic", "epochs", "steps"}):
        value = reduce(getattr, name.split("."), given)
        raise InputError(
            f"{name}: {value} is not what the run was begun with, and a resumed run keeps all but its length; leave it "
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
    default = PretrainArguments(tyro.MISSING, config=replace(preset(name), preset=name))
    arguments = parse(PretrainArguments, flags, f"hardviews pretrain {name}", default)
    if arguments.resume and (kept := RunFolder(arguments.run).config).is_file():
        own = load_config(kept)
        check_preset(name, own)
        # Once more, from the run's own values: what is still another now was given by a flag.
        default = replace(default, config=own)
        arguments = parse(PretrainArguments, flags, f"hardviews pretrain {name}", default)
        check_kept(absolute(arguments.config), own)
    how = {name: getattr(arguments, name) for name in ("resume", "overwrite", "profile")}
    state = pretrain(arguments.config, arguments.run, **how)
    if state == "interrupted":
        raise SystemExit(130)
    if speaks():
        print(f"finished: {arguments.run}")
