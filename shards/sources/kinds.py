"""Where images come from. A source lists what it holds in a fixed order, cut into parts, one for each output shard.

    imagefolder:PATH    a folder per class; all files below it, whatever they are called
    folder:PATH         a folder of images without classes
    tars:PATH           WebDataset tars: a folder, one tar, or a pattern with * (also `webdataset:`)
    parquet:PATH        Parquet as Hugging Face datasets writes it: `image` (bytes, path) and `label`; labels may be
                        numbers, class names, or text, and each file may have its own columns and order of classes

PATH may be an fsspec address (`s3://bucket/images`). Files of folders are spread over the shards in the order of a hash
of their names, so that every shard holds all classes; tars and Parquet are read in their own order. What a source does
not know how to read becomes a record with a problem, never an exception.
"""

from collections.abc import Callable

from shards.errors import InputError
from shards.sources.base import Options, Runner, Source
from shards.sources.folders import open_folder, open_imagefolder
from shards.sources.labels import with_labels
from shards.sources.parquet import open_parquet
from shards.sources.tars import open_tars


def open_source(address: str, options: Options, run: Runner) -> Source:
    """Lists a source.

    Args:
        address: KIND:PATH, see above.
        run: runs a function over tasks, for counting what large files hold.

    Raises:
        InputError: unknown kind, an option that it does not have, nothing there, or nothing in it.
    """
    kind, _, path = address.partition(":")
    if kind not in SOURCES or not path:
        raise InputError(f"{address!r}: a source is KIND:PATH, and the kinds are {', '.join(SOURCES)}")
    choices = (*CHOICES[kind], *(("label",) if options.labels is not None else ()))
    for option in ("image", "label", "label_from", "labels", "split"):
        if getattr(options, option) is not None and option not in choices:
            hint = "; take folder: for labels in a file" if (kind, option) == ("imagefolder", "labels") else ""
            raise InputError(f"--{option.replace('_', '-')}: {kind}: has no choice of it; leave it out{hint}")
    if options.labels is not None and options.label_from is not None:
        raise InputError(f"--labels {options.labels}: --label-from {options.label_from} is given too; leave one out")
    try:
        source = SOURCES[kind](path, options, run)
    except Exception as error:
        # The errors of a store's library have no base class in common, but are none of Python's own.
        if isinstance(error, InputError) or (not isinstance(error, OSError) and type(error).__module__ == "builtins"):
            raise
        raise InputError(f"{address}: {error or type(error).__name__}; check the address and the rights") from error
    return source if options.labels is None else with_labels(source, options.labels, options.label)


OF_TARS = ("image", "label_from", "labels", "split")
CHOICES: dict[str, tuple[str, ...]] = {
    "imagefolder": ("split",),
    "folder": ("labels", "split"),
    "tars": OF_TARS,
    "webdataset": OF_TARS,
    "parquet": ("image", "label", "split"),
}
SOURCES: dict[str, Callable[[str, Options, Runner], Source]] = {
    "imagefolder": open_imagefolder,
    "folder": open_folder,
    "tars": open_tars,
    "webdataset": open_tars,
    "parquet": open_parquet,
}
