"""Files under a root, which is a local folder or any fsspec address; files that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec

from shards.errors import InputError, install_extra
from shards.retry import retry

Fetch = Callable[[str], bytes]  # file name under a root → its content

LOCAL = ("file://", "local://")
# Folders and files of macOS, Windows and storage systems; hidden ones (`._a.jpg`, `.ipynb_checkpoints`) besides.
SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"})


def local_path(address: str | Path) -> Path | None:
    """The local path that an address means, or None where it is on another file system (`s3://`, `memory://`, …)."""
    text = os.fspath(address)
    for scheme in LOCAL:
        text = text.removeprefix(scheme)
    return None if "://" in text else Path(text)


def filesystem(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of an address and the path on it.

    Raises:
        InputError: for a scheme that fsspec does not know or whose package is not installed.
    """
    path = local_path(address)
    if path is not None:  # fsspec would take :: in the name of a local folder for a chain of file systems
        system = fsspec.filesystem("file")
        return system, system._strip_protocol(os.fspath(path))
    try:
        return fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        remedy = "use a path, or a scheme that fsspec has a package for"
        if isinstance(error, ImportError) and address.startswith(("s3://", "s3a://")):
            remedy = install_extra("s3")
        raise InputError(f"address {address!r}: {error}; {remedy}") from error


def is_left_behind(name: str) -> bool:
    """Whether systems left a file behind, by its name or that of a folder above it: nobody means it as data."""
    parts = name.split("/")
    return any(part in SYSTEM_NAMES or (part.startswith(".") and part not in (".", "..")) for part in parts)


def join(root: str, name: str) -> str:
    """The address of the file `name` under `root`."""
    return f"{root.rstrip('/')}/{name}"


def fetcher(root: str) -> Fetch:
    """A function that reads files under `root` whole; it raises FileNotFoundError for a missing one."""
    path = local_path(root)
    if path is not None:
        return lambda name: (path / name).read_bytes()
    system, base = filesystem(root)
    return lambda name: retry(lambda: bytes(system.cat_file(join(base, name))))  # pyright: ignore[reportArgumentType]


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is either complete under its name or absent, also after a power cut."""
    partial = partial_name(path)
    with partial.open("wb") as file:
        file.write(content)
        settle(file.fileno())
    publish(partial, path)


def partial_name(path: Path) -> Path:
    """The temporary name of this process for `path`; `clear_partials` finds it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def settle(descriptor: int) -> None:
    """Waits until the content of an open file is on the disk."""
    os.fsync(descriptor)


def publish(partial: Path, path: Path) -> None:
    """Gives a settled file its final name, and settles the folder's entry too."""
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_partials(folder: Path) -> None:
    """Removes what killed processes left under temporary names."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes a folder with all its content, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)
