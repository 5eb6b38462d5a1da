"""Column files, DALI indexes and a manifest for WebDataset tars of others, beside them; the tars stay as they are."""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import InputError
from shards.images import BadImageError, Rules, prepare
from shards.manifest import MANIFEST_NAME, Manifest, open_manifest
from shards.sources.base import Runner
from shards.sources.tars import WHOLE_NUMBER, Group, Tar, groups, image_member, tar_record
from shards.writer import (
    Rejected,
    Row,
    ShardResult,
    finish,
    format_index,
    output_folder,
    shards_in,
    split_done,
    write_columns,
)

CONVERT = "`hardviews build tars:… --out …` does that"


@dataclass(frozen=True)
class IndexTask:
    """One tar to be indexed."""

    folder: str
    name: str
    rules: Rules
    image: str | None = None
    """Extension of the images, where several files of a sample could be."""
    classes: tuple[str, ...] = ()
    """Names of classes that `.cls` files may hold instead of numbers."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the column file's content, but for the tar."""
        chosen = {"image": self.image} if self.image else {}
        chosen |= {"classes": list(self.classes)} if self.classes else {}
        return {"in place": True, **asdict(self.rules), **chosen}


def index_tar(task: IndexTask) -> ShardResult:
    """Reads a tar whole and writes its column file and index."""
    folder = Path(task.folder)
    path = folder / task.name
    tar = Tar(task.folder, task.name, path.stat().st_size, task.image)
    # What is a number is never a name here: `.cls` files of most tars hold numbers.
    numbers = {name: number for number, name in enumerate(task.classes) if not WHOLE_NUMBER.fullmatch(name)}
    rows: list[Row] = []
    rejected: list[Rejected] = []
    members: list[tuple[str, Sequence[tuple[str, int, int]]]] = []
    with path.open("rb") as headers, path.open("rb") as file:
        for group in groups(headers):
            if isinstance(group, Group):
                stored = [one[:3] for one in group.members if not (one.problem or one.pieces)]
                members += [(group.key, stored)] if stored else []
            row = index_sample(tar, group, file, numbers, task.rules)
            if isinstance(row, Rejected):
                rejected.append(row)
            else:
                rows.append(row)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return write_columns(folder, task.name, rows, rejected, task.settings, tar.size, sha256, format_index(members))


def index_sample(
    tar: Tar, group: Group | str, file: BinaryIO, numbers: Mapping[str, int], rules: Rules
) -> Row | Rejected:
    """The row of a sample whose image can be used as it stands, or the reason why it cannot."""
    record = tar_record(tar, group, file, numbers)
    if isinstance(group, str):
        return Rejected("", record.name, record.problem)
    place = image_member(tar.name, group, tar.image)
    if place is None or record.problem:
        return Rejected(group.key, record.name, record.problem)
    if place.pieces:
        return Rejected(group.key, record.name, f"a sparse file, which has to be stored whole; {CONVERT}")
    try:
        picture = prepare(record.content, rules)
    except BadImageError as error:
        return Rejected(group.key, record.name, str(error))
    if not record.content.startswith(picture.content):
        return Rejected(group.key, record.name, f"has to be converted (rotation, colours or depth); {CONVERT}")
    # Bytes after the image's end are left out of its size.
    member = (place.extension, place.offset, len(picture.content))
    crc32 = zlib.crc32(picture.content)
    size = (picture.height, picture.width)
    return Row(group.key, (member,), *size, record.label, crc32, unlabelled=record.unlabelled)


def index(
    folder: Path,
    source: str,
    run: Runner,
    *,
    rules: Rules | None = None,
    classes: Sequence[str] = (),
    image: str | None = None,
    overwrite: bool = False,
    on_shard: Callable[[ShardResult], None] = lambda result: None,
) -> Manifest:
    """Indexes the tars of a folder that are not indexed yet, then writes the manifest.

    Args:
        folder: of tars; column files, indexes, quarantine file and manifest go into it too.
        source: tag for the manifest.
        run: `run_tasks` of an engine.
        rules: how images are checked; nothing is encoded anew here.
        classes: names by label.
        image: extension of the images, where several files of a sample could be.
        overwrite: index all tars anew.

    Raises:
        InputError: no such folder, no tars, a folder that `build` or `generate` wrote, or a sample
            of which several files may be the image.
    """
    rules = rules or Rules()
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; name one that holds WebDataset tars")
    names = shards_in(folder)
    if not names:
        raise InputError(f"{folder}: there are no .tar files in it; name a folder that holds WebDataset tars")
    if (folder / MANIFEST_NAME).exists() and not overwrite and not indexed(folder):
        raise InputError(f"{folder}: its shards have a manifest from their making; pass --overwrite to replace it")
    with output_folder(folder, flag=""):
        tasks = [IndexTask(str(folder.resolve()), name, rules, image, tuple(classes)) for name in names]
        results, missing = ([], tasks) if overwrite else split_done(folder, tasks, overwrite)
        for result in results:
            on_shard(result)
        for result in run(index_tar, missing):
            results.append(result)
            on_shard(result)
        provenance = {"indexed": True, "check": rules.check, "max_pixels": rules.max_pixels}
        return finish(folder, results, source=source, classes=classes, provenance=provenance)


def indexed(folder: Path) -> bool:
    """Whether the folder's manifest is one of `index`, or too damaged to tell."""
    try:
        return bool(open_manifest(folder).provenance.get("indexed"))
    except InputError:
        return True
