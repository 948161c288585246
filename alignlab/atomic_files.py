"""Writing files and folders so that a crash at any instant leaves the old content or the new, never half of it."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from alignlab.library_errors import writing

TEMPORARY, REPLACED, REMOVED = "tmp", "replaced", "removed"
"""What follows a hidden name beside the one that is written: being written; the former content; about to be removed."""
_AT_CWD, _EXCHANGE = -100, 2  # of Linux's renameat2


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
    """Make a folder, and those around it, where there is none; their names are on the disk then.

    A file that is synced in a new folder is lost with the folder's name, which is synced with the folder around it.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_file(place.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, through a temporary file beside it.

    Raises:
        DiskError: the disk, a limit or a permission.
    """
    temporary = hidden_name(path, TEMPORARY)
    with writing(path, "the file"):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name, after its content is on the disk."""
    sync_file(temporary)
    os.replace(temporary, path)
    sync_file(path.parent)


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished temporary folder its name, after its content is on the disk; an earlier folder goes after that.

    Where the file system cannot exchange two names at once, a crash between two renames leaves the earlier folder under
    a hidden name, from which `recover_folder` brings it back.
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
    """Bring back the folder that an interrupted `publish_folder` had set aside, and clear its leftovers away.

    Only whoever may write the folder calls this: another process may be between the two renames.
    """
    replaced = hidden_name(path, REPLACED)
    if replaced.is_dir() and not path.exists():
        os.replace(replaced, path)
        sync_file(path.parent)
    clear_leftovers(path)


def clear_leftovers(path: Path) -> None:
    """Remove what an interrupted writing, replacing or removing of `path` left beside it under hidden names."""
    for kind in (TEMPORARY, REPLACED, REMOVED):
        leftover = hidden_name(path, kind)
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; a removal that is cut short, by a power cut too, leaves all of it under its name or nothing."""
    hidden = hidden_name(path, REMOVED)
    os.replace(path, hidden)
    sync_file(path.parent)
    shutil.rmtree(hidden)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; return False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0)
