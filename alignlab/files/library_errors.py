"""Translation of libraries' errors about files into named errors with the file, the reason and the fix.

    with writing(path, "the checkpoint"):
        save_file(tensors, path)

    with reading(path, "the checkpoint", CheckpointError, fix="copy it again"):
        tensors = load_file(path)

Safetensors, tokenizers, pyarrow, SQLite and numpy all raise different errors for a full disk, and others for a damaged
file. `writing` translates the first kind, `reading` both. Errors that are named already pass unchanged.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.errors import AlignlabError, DataError, DiskError, MemoryLimitError

_MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, EOFError, AssertionError,
)  # fmt: skip
"""Errors that parsers raise for malformed content; `JSONDecodeError` and `UnicodeDecodeError` are ValueErrors."""
_LIBRARIES = ("safetensors", "pyarrow", "sqlite3", "zipfile", "zlib", "gzip", "lzma", "yaml", "struct", "csv", "pickle")
"""Libraries all of whose errors are about the content of a file, or about reading or writing it."""
_MAX_REASON = 300
_PERMISSION = "correct its owner and permissions (chown, chmod), or choose another place"
_NO_LOCKS = "the filesystem refuses locks: mount it with them (such as Lustre by -o flock), or choose another"
_FIXES = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space within the quota, or choose another place",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another filesystem",
    errno.EIO: "the disk itself fails: choose another, and copy what this one holds",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "it cannot be written to: choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max)",
    errno.ENOENT: "correct the path, or make what is to be there",
    errno.ENOTDIR: "a part of the path is a file: correct the path",
    errno.EEXIST: "what stands there is no folder, or a link that leads to none: remove it, or correct the path",
    errno.EISDIR: "the path is a folder, and must be a file: correct the path",
    errno.ELOOP: "the path's links lead in a circle: correct them",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EBUSY: "end what uses it, and try again",
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.ENOTSUP: _NO_LOCKS,
    errno.ESTALE: "mount the network's filesystem again",
}
_USUAL_FIX = "correct the path, its permissions, or the disk"
_NUMBER = re.compile(r"\[errno (\d+)\]|\(os error (\d+)\)", re.IGNORECASE)
_PHRASES = {  # of errors without a number
    re.compile(r"\d+ requested and \d+ written"): errno.ENOSPC,  # numpy
    re.compile(r"database or disk is full|no space left on device", re.IGNORECASE): errno.ENOSPC,
    re.compile(r"disk quota exceeded", re.IGNORECASE): errno.EDQUOT,
    re.compile(r"disk i/o error", re.IGNORECASE): errno.EIO,
    re.compile(r"attempt to write a readonly database"): errno.EROFS,
    re.compile(r"unable to open database file"): errno.EACCES,
    re.compile(r"database (table )?is locked"): errno.EBUSY,
}


@contextmanager
def writing(path: str | os.PathLike[str], what: str, *, fix: str | None = None) -> Iterator[None]:
    """Raise `DiskError` for an error of the disk, a limit or a permission within this context.

    Args:
        path: the file or folder that is written.
        what: name of its content in the message, such as "the checkpoint".
        fix: advice in the message; default: by the reason.

    Raises:
        DiskError: see above; other errors pass unchanged.
    """
    try:
        yield
    except AlignlabError:
        raise
    except Exception as error:
        if disk_number(error) is None:
            raise
        raise _disk_error(error, f"{what} cannot be written to {path}", Path(path), fix) from error


@contextmanager
def reading(
    path: str | os.PathLike[str], what: str, kind: type[AlignlabError] = DataError, *, fix: str | None = None
) -> Iterator[None]:
    """Raise a named error for a file that cannot be read within this context.

    Every error of a parser within the context counts as a damaged file, so the context has to be small.

    Args:
        path: the file or folder that is read.
        what: name of its content in the message, such as "the checkpoint".
        kind: class of the error for a file that is missing or malformed.
        fix: advice for such a file; default: copy or write it again.

    Raises:
        DiskError: an error of the disk, a limit or a permission.
        kind: there is no such file, or its content is malformed.
    """
    try:
        yield
    except AlignlabError:
        raise
    except Exception as error:
        head, number = f"{what} cannot be read from {path}", disk_number(error)
        if number not in (None, errno.ENOENT):
            raise _disk_error(error, head, Path(path), None) from error
        if number is None and not (type(error) is OSError or _is_of_library(error) or isinstance(error, _MALFORMED)):
            raise
        default_fix = _FIXES[errno.ENOENT] if number == errno.ENOENT else "copy it again, or write it again"
        raise kind(f"{head}: {reason(error)}; {fix or default_fix}") from error


def named(error: BaseException) -> AlignlabError | None:
    """Return a named error for an error that reached the top; None if only a fault of this program explains it.

    Errors of disks, of libraries about files, and of memory get names.
    """
    if isinstance(error, AlignlabError):
        return error
    if _is_out_of_memory(error):
        return MemoryLimitError(
            f"the memory is used up: {reason(error)}; use smaller batches, caches or models, another device, or end "
            "what else uses it"
        )
    if isinstance(error, OSError) or disk_number(error) is not None:
        name = getattr(error, "filename", None)
        place = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
        return _disk_error(error, str(place or ""), place, None)
    if _is_of_library(error):
        return DataError(f"a file is damaged, or not what it must be: {reason(error)}; --debug shows which")
    return None


def disk_number(error: BaseException) -> int | None:
    """Return the errno of an error about a file, also if a library only describes it in words; None for others."""
    if isinstance(error, ConnectionError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    numbered = _NUMBER.search(text)
    if numbered is not None:
        return int(numbered[1] or numbered[2])
    return next((number for phrase, number in _PHRASES.items() if phrase.search(text)), None)


def reason(error: BaseException) -> str:
    """Return the text of an error on one line of at most 300 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError) and error.args:
        return f"it has no {error.args[0]!r}"
    text = " ".join(str(error).split())
    text = text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} ..."
    return text or type(error).__name__


def _disk_error(error: BaseException, head: str, place: Path | None, fix: str | None) -> DiskError:
    number = disk_number(error)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    inner = getattr(error, "filename", None)
    # A file beside the place is a temporary one of it.
    is_other = isinstance(inner, str) and place is not None and Path(inner).parent != place.parent
    named_file = f" ({inner})" if is_other else ""
    why = reason(error) + named_file + (_free(place) if full and place is not None else "")
    text = ": ".join(part for part in (head, why) if part)
    disk_error = DiskError(f"{text}; {fix or _FIXES.get(number or 0, _USUAL_FIX)}")
    disk_error.errno = number
    return disk_error


def _free(place: Path) -> str:
    """Return the free space of a disk as text; empty if it cannot be determined."""
    try:
        folder = next(folder for folder in (place, *place.parents) if folder.is_dir())
        return f" ({shutil.disk_usage(folder).free / 2**30:.2f} GiB are free in {folder})"
    except (OSError, StopIteration):
        return ""


def _is_of_library(error: BaseException) -> bool:
    """Return True if a library for files has raised an error of its own class."""
    modules = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return any(module.removesuffix("_rust").lstrip("_") in _LIBRARIES for module in modules)


def _is_out_of_memory(error: BaseException) -> bool:
    of_torch = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or of_torch or on_cpu
