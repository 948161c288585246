"""Atomic writing of files and folders: a crash at any moment leaves the old content or the new, never half of it."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignlab.files.library_errors import writing

TEMPORARY, REPLACED, REMOVED = "tmp", "replaced", "removed"
"""Endings of hidden names: content being written, former content, content about to be removed."""
_AT_CWD, _EXCHANGE = -100, 2  # constants of Linux's renameat2


def hidden_name(path: Path, kind: str) -> Path:
    """Return the hidden name beside a path under which its content is prepared, set aside or removed."""
    return path.with_name(f".{path.name}.{kind}")


def sync_file(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until all that a folder holds, and its folders hold, is on the disk."""
    for path in folder.rglob("*"):
        sync_file(path)
    sync_file(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if absent, and sync their names to the disk.

    The name of a new folder is stored in its parent: unless that is synced too, a power cut loses even synced files.

    Raises:
        DiskError: the folder cannot be created: the disk is full, a permission is missing, or a file has its name.
    """
    with writing(folder, "the folder"):
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for place in reversed(missing):
            sync_file(place.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary file beside it.

    Raises:
        DiskError: the file cannot be written.
    """
    with writing(path, "the file"), replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name under which the content of a file is to be written; then sync it and rename it to `path`.

    After an error what was written is removed, and `path` is as it was.
    """
    temporary = hidden_name(path, TEMPORARY)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_file(path.parent)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync a finished temporary folder and rename it to `path`; then remove the folder that was there before.

    If the file system cannot exchange two names atomically, a crash between two renames leaves the former folder under
    a hidden name; `recover_folder` restores it.
    """
    sync_folder(temporary)
    if not path.exists():
        os.replace(temporary, path)
        sync_file(path.parent)
        return
    if not _exchange(temporary, path):
        os.replace(path, hidden_name(path, REPLACED))
        os.replace(temporary, path)
    sync_file(path.parent)
    clear_leftovers(path)


def recover_folder(path: Path) -> None:
    """Restore the folder that an interrupted `publish_folder` had set aside, and remove leftovers.

    Only the process that may write the folder calls this: another one might be between its two renames.
    """
    replaced = hidden_name(path, REPLACED)
    if replaced.is_dir() and not path.exists():
        os.replace(replaced, path)
        sync_file(path.parent)
    clear_leftovers(path)


def clear_leftovers(path: Path) -> None:
    """Remove hidden files and folders that an interrupted write, replacement or removal of `path` left beside it."""
    for kind in (TEMPORARY, REPLACED, REMOVED):
        remove(hidden_name(path, kind))


def remove(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a link, but not where the link leads; nothing if absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; an interrupted removal, even by a power cut, leaves all of it or nothing under its name."""
    hidden = hidden_name(path, REMOVED)
    os.replace(path, hidden)
    sync_file(path.parent)
    remove(hidden)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; return False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_CWD, os.fsencode(first), _AT_CWD, os.fsencode(second), _EXCHANGE) == 0)
