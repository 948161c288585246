"""The lock of a run's folder: one live process at a time may write there.

It is a POSIX record lock on `.lock`. The kernel frees it when the process ends, however it ends, and no child process
inherits it. Such a lock has two weaknesses: it is lost when the process closes any other handle of the file (as code
that copies the folder does), and a lock file that is removed and created again is not locked. So `RunLock.renew` takes
the lock again, and `is_alive` looks up whether the process of the last start still runs. The file holds the name of
the process that has locked it; the name is only for messages, and one that a dead process has left stops nobody.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from alignlab.errors import ConfigError

LOCK_FILE = ".lock"
_NAMING_S = 1.0
"""Longest wait for a process that has just taken a lock and is about to write its name."""
_FLOCK = "hhqqi"
"""The C structure `flock`: type, whence, start, length, process."""
_OPEN: set[tuple[int, int, int]] = set()
"""(process, device, inode) of the folders that runs of this process have locked: POSIX locks of the same process do not
exclude each other."""


class RunLock:
    """The lock of a folder, held until `close` or the end of the process.

    Raises:
        ConfigError: another run of this or another process holds it.
        OSError: the filesystem has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        status = folder.stat()
        self._key = (os.getpid(), status.st_dev, status.st_ino)
        if self._key in _OPEN:  # opening and closing the file again would free the first run's lock
            raise in_use(folder, holder())
        self._file = self._take()
        self._write_name()
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
        if not self._is_current(self._file):
            lost, self._file = self._file, self._take()
            lost.close()
        elif not _try_lock(self._file):
            raise in_use(self._folder, _holder_of(self._file))
        self._write_name()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()
        _OPEN.discard(self._key)

    def _take(self) -> IO[str]:
        """Open and lock the file; again if the file was replaced meanwhile."""
        while True:
            file = (self._folder / LOCK_FILE).open("a+", encoding="utf-8", errors="replace")
            is_locked = False
            try:
                is_locked = _try_lock(file)
                if not is_locked:
                    raise in_use(self._folder, _holder_of(file))
            finally:
                if not is_locked:
                    file.close()
            if self._is_current(file):
                return file
            file.close()

    def _write_name(self) -> None:
        """Write the name of this process into the file, unless it is there."""
        self._file.seek(0)
        name = f"{holder()}\n"
        if self._file.read(len(name) + 1) != name:
            self._file.truncate(0)
            self._file.write(name)
            self._file.flush()

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


def _try_lock(file: IO[str]) -> bool:
    """Lock a file; return False if another process has locked it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows EAGAIN and EACCES for a lock that is held
        return False
    return True


def _holder_of(file: IO[str]) -> str:
    """Return the name in a file that another process has locked.

    The name counts once the kernel says that this process holds the lock: an earlier one may have left its name. If the
    kernel does not know the process, as for one on another machine, the name is believed, after a short wait at most.
    """
    deadline = time.monotonic() + _NAMING_S
    while True:
        file.seek(0)
        name = file.read(200).strip()
        number = _locking_process(file)
        if number <= 0 or re.match(rf"process {number} on ", name) or time.monotonic() >= deadline:
            return name or "another process"
        time.sleep(0.01)


def _locking_process(file: IO[str]) -> int:
    """Return the number of the process that has locked a file; 0 if there is none in this PID namespace."""
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return int(struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))[-1])


def identity_of_process() -> dict[str, Any]:
    """Return fields that identify this process among all others, as JSON; see `is_alive`."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_started": _started(os.getpid()),
        "process_namespace": _namespace(),
    }


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Return True if `identity` is of another process than this one, which still runs on this host.

    False for a process on another host or in another PID namespace, which cannot be looked up: the lock alone counts.
    """
    this_place = (socket.gethostname(), _namespace())
    number = identity.get("process")
    if (identity.get("host"), identity.get("process_namespace")) != this_place or number == os.getpid():
        return False
    started = _started(number) if isinstance(number, int) else None
    # A process number may have been given to a new process: the start tells them apart.
    return started is not None and started == identity.get("process_started")


def _started(number: int) -> str | None:
    """Return the boot of the machine and the ticks from it to a process's start; None if the process has ended.

    The time of the day would not do: it moves when the clock is corrected.
    """
    try:
        fields = Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    state, ticks = fields[0], fields[19]  # the fields 3 and 22; the second, a name, may have spaces
    return None if state in "ZX" else f"{boot} {ticks}"


def _namespace() -> str | None:
    """Return the PID namespace; None if the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
