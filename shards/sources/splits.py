"""Splits of a source (train, test, …), told by the names of its files or folders."""

import os
import re
from typing import Any

from shards.errors import InputError
from shards.files import filesystem, join, local_path
from shards.retry import retry
from shards.sources.containers import Container

NUMBERED = re.compile(r"(?:^|/)([\w.]+)-\d+-of-\d+[^/]*$")  # train-00000-of-00012.parquet, as `datasets` names splits
NAMES = "train|training|test|testing|validation|valid|val|dev|eval"
IN_NAME = re.compile(rf"(?:^|[-_./])({NAMES})(?=[-_./\d])", re.IGNORECASE)
OF_FOLDER = re.compile(rf"({NAMES})[-_.\d]*", re.IGNORECASE)


def of_split(address: str, containers: list[Container], split: str | None) -> list[Container]:
    """The files of one split.

    Raises:
        InputError: there are several and none is chosen, or not the one that is.
    """
    splits = {container: split_of(container.name) for container in containers}
    known = sorted(set(splits.values()))
    there = ", ".join(name or "files of none" for name in known)
    if split is not None and split not in known:
        raise InputError(f"--split {split}: {address} has {there}")
    if split is None and len(known) > 1:
        raise InputError(f"{address}: has several splits ({there}); choose one with --split, or name its files")
    return [container for container in containers if split is None or splits[container] == split]


def split_of(name: str) -> str:
    """The split that a file's name or folder tells of, empty where it tells of none."""
    found = NUMBERED.search(name) or IN_NAME.search(name)
    return found.group(1) if found else ""


def split_folder(address: str, path: str, split: str | None) -> str:
    """The folder of one split, or the path itself where it has no splits: of its folders, two are called like splits,
    or its only one is, and has folders of its own.

    Raises:
        InputError: there are several splits and none is chosen, or not the one that is.
    """
    folders = subfolders(path)
    splits = [name for name in folders if OF_FOLDER.fullmatch(name)]
    if split is not None:
        if split not in folders:
            raise InputError(f"--split {split}: {address} has {', '.join(splits) or 'no folders of splits'}")
        return join(path, split)
    if len(splits) > 1:
        raise InputError(
            f"{address}: has several splits ({', '.join(splits)}); choose one with --split, or name its folder"
        )
    return join(path, splits[0]) if splits == folders and splits and subfolders(join(path, splits[0])) else path


def subfolders(path: str) -> list[str]:
    """Names of the folders in a folder, hidden ones left out; none where it cannot be listed."""
    folder = local_path(path)
    try:
        if folder is not None:
            return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        system, base = filesystem(path)
        found: Any = retry(lambda: system.ls(base, detail=True))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # listing the images says why
    names = (info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory")
    return sorted(name for name in names if name and not name.startswith("."))
