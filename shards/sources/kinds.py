"""Where images come from. A source lists what it holds in a fixed order, cut into parts, one for each output shard.

    imagefolder:PATH    a folder per class; all files below it, whatever they are called
    folder:PATH         a folder of images without classes
    tars:PATH           WebDataset tars: a folder, one tar, or a pattern with * (also `webdataset:`)
    parquet:PATH        Parquet as Hugging Face datasets writes it: `image` (bytes, path) and `label`

PATH may be an fsspec address (`s3://bucket/images`). Files of folders are spread over the shards in the order of a hash
of their names, so that every shard holds all classes; tars and Parquet are read in their own order. What a source does
not know how to read becomes a record with a problem, never an exception.
"""

from collections.abc import Callable

from shards.errors import InputError
from shards.sources.base import Runner, Source
from shards.sources.folders import open_folder, open_imagefolder
from shards.sources.parquet import open_parquet
from shards.sources.tars import open_tars


def open_source(address: str, part_size: int, run: Runner, keep_order: bool = False) -> Source:
    """Lists a source.

    Args:
        address: KIND:PATH, see above.
        part_size: images of a part; the last has fewer.
        run: runs a function over tasks, for counting what large files hold.
        keep_order: the files of a folder in the order of their names rather than spread.

    Raises:
        InputError: unknown kind, nothing there, or nothing in it.
    """
    kind, _, path = address.partition(":")
    if kind not in SOURCES or not path:
        raise InputError(f"{address!r}: a source is KIND:PATH, and the kinds are {', '.join(SOURCES)}")
    return SOURCES[kind](path, part_size, run, keep_order)


SOURCES: dict[str, Callable[[str, int, Runner, bool], Source]] = {
    "imagefolder": open_imagefolder,
    "folder": open_folder,
    "tars": open_tars,
    "webdataset": open_tars,
    "parquet": open_parquet,
}
