"""The lock of a run's folder: one live process at a time may write there.

It is a POSIX record lock on `.lock`. The kernel frees it when the process ends, however it ends, and no child process
inherits it, forked by whatever code. Such a lock has two weak sides: it goes when the process closes any other handle
of the file (as code that copies the folder does), and it knows nothing of a file that was removed and made again.
`RunLock.renew` takes it again; and whether the last start is still alive is looked up too, see `is_alive`.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from alignlab.errors import ConfigError

LOCK_FILE = ".lock"
_CLOCK_S = 2.0
"""A process's start is computed from the time of the boot, which a correction of the clock moves."""
_OPEN: set[tuple[int, int, int]] = set()
"""(process, device, inode) of the folders that runs of this process hold: its own locks are no hindrance to it."""


class RunLock:
    """The lock of a folder, held until `close` or the end of the process.

    Raises:
        ConfigError: another run of this or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        status = folder.stat()
        self._key = (os.getpid(), status.st_dev, status.st_ino)
        if self._key in _OPEN:  # closing the file that a second run opens would free the first one's lock
            raise in_use(folder, holder())
        self._file = self._take()
        _OPEN.add(self._key)

    def renew(self) -> None:
        """Make sure that the folder is still this run's, and take the lock again where it was lost.

        Raises:
            ConfigError: the folder was moved away, or another process has taken it.
        """
        try:
            status = self._folder.stat()
        except OSError as error:
            raise self._moved() from error
        if (status.st_dev, status.st_ino) != self._key[1:]:
            raise self._moved()
        if self._is_current(self._file):
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        lost, self._file = self._file, self._take()
        lost.close()

    def close(self) -> None:
        """Give the lock back."""
        self._file.close()
        _OPEN.discard(self._key)

    def _take(self) -> IO[str]:
        """The locked file; one that was replaced while it was being locked is opened again."""
        while True:
            file = (self._folder / LOCK_FILE).open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                found = file.read().strip() or "another process"
                file.close()
                raise in_use(self._folder, found) from error
            if self._is_current(file):
                break
            file.close()
        file.truncate(0)
        file.write(f"{holder()}\n")
        file.flush()
        return file

    def _is_current(self, file: IO[str]) -> bool:
        """Whether the open file is the one that has the lock's name now."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), (self._folder / LOCK_FILE).stat())
        except FileNotFoundError:
            return False

    def _moved(self) -> ConfigError:
        return ConfigError(
            f"the folder of a run must stay in its place while it runs, and {self._folder} was moved or removed; move "
            "it back, and go on by --resume"
        )


def holder() -> str:
    """Return how this process is named to one that finds the folder in use."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def in_use(folder: Path, process: str) -> ConfigError:
    """Return the error of a folder in which another run is live."""
    return ConfigError(
        f"output_dir must belong to one live run, and {folder} is in use by {process}; wait for it to end, stop it, or "
        "choose another trainer.output_dir"
    )


def identity_of_process() -> dict[str, Any]:
    """Return what tells this process from all others, as JSON; see `is_alive`."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_created": psutil.Process().create_time(),
        "process_namespace": _namespace(),
    }


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Return whether the process that `identity_of_process` described is another one than this, and still runs here.

    Of a process on another host, or in another namespace of processes, nothing can be known: the lock alone counts.
    """
    here = (socket.gethostname(), _namespace())
    process = identity.get("process")
    if (identity.get("host"), identity.get("process_namespace")) != here or process in (None, os.getpid()):
        return False
    try:
        found = psutil.Process(int(process))
        return found.status() != psutil.STATUS_ZOMBIE and (
            abs(found.create_time() - float(identity.get("process_created", 0.0))) < _CLOCK_S
        )
    except (psutil.Error, ValueError, TypeError):
        return False


def _namespace() -> str | None:
    """The namespace that process numbers are of; None where the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
