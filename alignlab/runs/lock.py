"""The lock of a run's folder: one live process at a time may write there.

It is a POSIX record lock on `.lock`. The kernel frees it when the process ends, however it ends, and no child process
inherits it. Such a lock has two weaknesses: it is lost when the process closes any other handle of the file (as code
that copies the folder does), and a lock file that is removed and created again is not locked. So `RunLock.renew` takes
the lock again, and `is_alive` looks up whether the process of the last start still runs.
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
"""Tolerance of a process's start time, which is computed from the boot time and moves when the clock is corrected."""
_OPEN: set[tuple[int, int, int]] = set()
"""(process, device, inode) of the folders that runs of this process have locked: POSIX locks of the same process do not
exclude each other."""


class RunLock:
    """The lock of a folder, held until `close` or the end of the process.

    Raises:
        ConfigError: another run of this or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        status = folder.stat()
        self._key = (os.getpid(), status.st_dev, status.st_ino)
        if self._key in _OPEN:  # opening and closing the file again would free the first run's lock
            raise in_use(folder, holder())
        self._file = self._take()
        _OPEN.add(self._key)

    def renew(self) -> None:
        """Check that the folder still belongs to this run, and take the lock again if it was lost.

        Raises:
            ConfigError: the folder was moved, or another process has locked it.
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
        """Release the lock."""
        self._file.close()
        _OPEN.discard(self._key)

    def _take(self) -> IO[str]:
        """Open and lock the file; again if the file was replaced meanwhile."""
        while True:
            file = (self._folder / LOCK_FILE).open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                other_process = file.read().strip() or "another process"
                file.close()
                raise in_use(self._folder, other_process) from error
            if self._is_current(file):
                break
            file.close()
        file.truncate(0)
        file.write(f"{holder()}\n")
        file.flush()
        return file

    def _is_current(self, file: IO[str]) -> bool:
        """Return True if the open file is still the one at the lock's path."""
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
    """Return the name of this process in messages of processes that find the folder in use."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def in_use(folder: Path, process: str) -> ConfigError:
    """Return the error of a folder in which another run is live."""
    return ConfigError(
        f"output_dir must belong to one live run, and {folder} is in use by {process}; wait for it to end, stop it, or "
        "choose another trainer.output_dir"
    )


def identity_of_process() -> dict[str, Any]:
    """Return fields that identify this process among all others, as JSON; see `is_alive`."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_created": psutil.Process().create_time(),
        "process_namespace": _namespace(),
    }


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Return True if `identity` is of another process than this one, which still runs on this host.

    False for a process on another host or in another PID namespace, which cannot be looked up: the lock alone counts.
    """
    this_place = (socket.gethostname(), _namespace())
    number = identity.get("process")
    if (identity.get("host"), identity.get("process_namespace")) != this_place or number in (None, os.getpid()):
        return False
    try:
        process = psutil.Process(int(number))
        # A process number may have been given to a new process: the start time tells them apart.
        is_same = abs(process.create_time() - float(identity.get("process_created", 0.0))) < _CLOCK_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, TypeError):
        return False


def _namespace() -> str | None:
    """Return the PID namespace; None if the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
