"""Folders for weights in memory that no other user can read, change, or prevent."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from alignlab.errors import DiskError, RolloutError
from alignlab.files.library_errors import writing

_IN_MEMORY = Path("/dev/shm")
_PREFIX = "alignlab-weights-"
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # as tempfile makes them
_SPARE = 1.2
_MAX_TRIES = 100


class PrivateFolder:
    """A new folder with a random name that only this user can enter, removed by `cleanup` or at the process's end.

    Used like `tempfile.TemporaryDirectory`. The folder is locked while the process lives, so that other processes of
    this user can remove the unlocked folders that dead processes left behind. A lock, unlike a process number, means
    the same in every namespace.

    Attributes:
        name: the path.
    """

    def __init__(self, place: Path) -> None:
        for _ in range(_MAX_TRIES):
            self.name = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
            # Until the folder is locked, another process may take it for one that was left behind, and remove it.
            with suppress(FileNotFoundError):
                lock = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                if _locked(lock) and _is_at(lock, self.name):
                    self._finalizer = weakref.finalize(self, _remove, self.name, lock, os.getpid())
                    return
                os.close(lock)
        raise DiskError(f"no folder could be locked in {place}; end what removes {_PREFIX}* there")

    def cleanup(self) -> None:
        """Remove the folder and its content; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> str:
        return self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()


def _remove(name: str, lock: int, process: int) -> None:
    if os.getpid() == process:  # the end of a forked child must not remove its parent's folder
        shutil.rmtree(name, ignore_errors=True)
        os.close(lock)


def require_private(path: Path) -> None:
    """Raise unless a file is in a folder that only this user can enter.

    Raises:
        RolloutError: others may have written the file.
    """
    status = os.stat(path.parent, follow_symlinks=False)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise RolloutError(f"{path} must be in a folder of this user's alone, and others may have written it")


def temporary_folder(num_bytes: int = 0) -> PrivateFolder:
    """Return a new folder in memory or, without room there, in the usual folder for temporary files.

    Folders that dead processes of this user left behind are removed first.

    Args:
        num_bytes: size of the files that will be written.

    Raises:
        DiskError: neither place has room, or one cannot be written to.
    """
    places = [place for place in (_IN_MEMORY, Path(tempfile.gettempdir())) if place.is_dir()]
    for place in places:
        _remove_orphans(place)
    for place in places:
        if shutil.disk_usage(place).free >= num_bytes * _SPARE:
            with writing(place, "a folder for weights"):
                return PrivateFolder(place)
    raise DiskError(
        f"weights of {num_bytes / 2**30:.2f} GiB have no room in {' or '.join(map(str, places))}; free some space, or "
        "set TMPDIR to a folder on a larger disk"
    )


def _remove_orphans(place: Path) -> None:
    """Remove this user's folders that no living process has locked; other users' folders stay."""
    for path in filter(lambda path: _NAME.fullmatch(path.name), place.glob(f"{_PREFIX}*")):
        with suppress(OSError):  # another user's, or another process removes it meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                is_ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
                if is_ours and _locked(descriptor) and _is_at(descriptor, str(path)):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock a folder; return False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise
        return False
    return True


def _is_at(descriptor: int, path: str) -> bool:
    """Return True if a path still leads to the folder that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
