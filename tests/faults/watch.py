"""The other side of the filter of `calls`: sees each change below a folder, counts it, lets it be or not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import struct
from pathlib import Path
from typing import IO

from tests.faults.calls import NAMES
from tests.faults.operations import Operation, Plan

_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_GO_ON = 1
_AT_HERE = -100
_AT_REMOVE_FOLDER = 0x200
_NO_REPLACING, _EXCHANGING = 1, 2
_PAGE = 4096
_MAX_PATH = 4096
_COPIES = {"copy_file_range": errno.EXDEV, "sendfile": errno.EINVAL}
"""Copies inside the kernel: those who are refused them read and write instead."""
Arguments = tuple[int, ...]


class Watcher:
    """Answers the kernel's questions about one process and what it started.

    Args:
        listener: see `calls.install`.
        process: the process, which has a session of its own.
        root: operations below this folder count, and syncs of the folder itself.
        plan: what happens at which.
        log: where operations are written.

    Attributes:
        count: operations so far.
    """

    def __init__(self, listener: int, process: int, root: Path, plan: Plan, log: IO[bytes] | None = None) -> None:
        self.count = 0
        self._listener, self._process, self._plan, self._log = listener, process, plan, log
        self._root = f"{root}/"

    def answer(self, _: int) -> bool:
        """Answer one question; there may be more."""
        question = bytearray(80)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, question)
        except FileNotFoundError:  # whoever asked was killed
            return True
        number, thread, _, call, _, _, *arguments = struct.unpack("=QIIiIQ6Q", question)
        error = self._decide(NAMES[call], thread, tuple(arguments))
        reply = struct.pack("=QqiI", number, 0, -error, 0 if error else _GO_ON)
        with contextlib.suppress(FileNotFoundError):
            fcntl.ioctl(self._listener, _ANSWER, reply)
        return True

    def _decide(self, call: str, thread: int, arguments: Arguments) -> int:
        """The error that a call has, or 0 where it is done."""
        try:
            if call in _COPIES:
                to = arguments[2 if call == "copy_file_range" else 0]
                return _COPIES[call] if self._is_below(_open_path(thread, to)) else 0
            operation = self._operation(call, thread, arguments)
        except (FileNotFoundError, ProcessLookupError):  # of a process that was killed, or no such descriptor
            return 0
        if operation is None:
            return 0
        self.count = operation.number
        error = self._plan.fails(operation)
        if self._plan.kills(operation):
            if self._plan.mode == "inside" and operation.data and call != "msync":
                self._write_half(operation, thread, arguments[0])
            os.killpg(self._process, signal.SIGKILL)
        elif self._log is not None and not error:
            self._log.write(operation.to_bytes())
            if call == "msync":  # the bytes were stored before, without a call
                self._log.write(Operation(operation.number, "sync", operation.path).to_bytes())
        return error

    def _write_half(self, operation: Operation, thread: int, descriptor: int) -> None:
        file = os.open(f"/proc/{thread}/fd/{descriptor}", os.O_WRONLY)
        os.pwrite(file, operation.data[: len(operation.data) // 2], operation.offset)
        os.close(file)

    def _is_below(self, path: str) -> bool:
        return path.startswith(self._root)

    def _operation(self, call: str, thread: int, arguments: Arguments) -> Operation | None:
        """What a call does below the folder; None where it changes nothing there."""
        if call in ("write", "pwrite64", "writev", "pwritev"):
            return self._writing(call, thread, arguments)
        if call in ("fsync", "fdatasync"):
            return self._of_open_file("sync", thread, arguments[0])
        if call in ("ftruncate", "fallocate"):
            length = arguments[1] if call == "ftruncate" else arguments[2] + arguments[3]
            return self._of_open_file("resize" if call == "ftruncate" else "allocate", thread, arguments[0], length)
        if call == "msync":
            return self._syncing_memory(thread, arguments[0])
        if call in ("rename", "renameat", "renameat2", "link", "linkat"):
            return self._naming_anew(call, thread, arguments)
        return self._of_name(call, thread, arguments)

    def _of_name(self, call: str, thread: int, arguments: Arguments) -> Operation | None:
        """Of calls with one path: opening, removing, making a folder, cutting."""
        at = call.endswith("at")
        path = _path(thread, arguments[0] if at else _AT_HERE, arguments[1 if at else 0])
        rest = arguments[2 if at else 1 :]
        exists = os.path.lexists(path)
        if not self._is_below(path) or not os.path.isdir(os.path.dirname(path)):
            return None
        name: str | None = None
        if call in ("open", "openat", "creat"):
            flags = os.O_CREAT | os.O_TRUNC if call == "creat" else rest[0]
            name = _name_of_opening(flags, exists)
        elif call in ("mkdir", "mkdirat"):
            name = None if exists else "mkdir"
        elif call == "truncate":
            return self._next("resize", path, offset=rest[0]) if exists else None
        elif exists:
            folder = call == "rmdir" or (call == "unlinkat" and bool(rest[0] & _AT_REMOVE_FOLDER))
            name = "rmdir" if folder else "unlink"
            if (folder and os.listdir(path)) or (not folder and os.path.isdir(path)):
                return None
        return None if name is None else self._next(name, path)

    def _naming_anew(self, call: str, thread: int, arguments: Arguments) -> Operation | None:
        at = "at" in call
        old = _path(thread, arguments[0] if at else _AT_HERE, arguments[1 if at else 0])
        new = _path(thread, arguments[2] if at else _AT_HERE, arguments[3 if at else 1])
        keeps = call.startswith("link") or (call == "renameat2" and bool(arguments[4] & _NO_REPLACING))
        if not self._is_below(new) or not os.path.lexists(old) or (keeps and os.path.lexists(new)):
            return None
        if call == "renameat2" and arguments[4] & _EXCHANGING:
            return self._next("exchange", old, other=Path(new)) if os.path.lexists(new) else None
        if os.path.isdir(new) and os.listdir(new):
            return None
        return self._next("link" if call.startswith("link") else "rename", old, other=Path(new))

    def _writing(self, call: str, thread: int, arguments: Arguments) -> Operation | None:
        descriptor = arguments[0]
        path = _open_path(thread, descriptor)
        if not self._is_below(path):
            return None
        parts = [(arguments[1], arguments[2])]
        if call in ("writev", "pwritev"):
            table = _memory(thread, arguments[1], 16 * arguments[2])
            parts = list(struct.iter_unpack("=QQ", table))  # type: ignore[arg-type]
        data = b"".join(_memory(thread, start, length) for start, length in parts)
        offset = arguments[3] if call in ("pwrite64", "pwritev") else _position(thread, descriptor)
        return self._next("write", path, offset=offset, data=data) if data else None

    def _of_open_file(self, name: str, thread: int, descriptor: int, offset: int = 0) -> Operation | None:
        path = _open_path(thread, descriptor)
        return self._next(name, path, offset=offset) if self._is_below(f"{path}/") else None

    def _syncing_memory(self, thread: int, start: int) -> Operation | None:
        """What was stored into a mapped file, all of it."""
        with open(f"/proc/{thread}/maps") as file:
            for line in file:
                first, last, path = re.match(r"(\w+)-(\w+)(?: +\S+){4} *(.*)", line).groups()  # type: ignore[union-attr]
                if int(first, 16) <= start < int(last, 16):
                    is_file = self._is_below(path) and os.path.isfile(path)
                    return self._next("write", path, data=Path(path).read_bytes()) if is_file else None
        return None

    def _next(
        self, name: str, path: str, *, other: Path | None = None, offset: int = 0, data: bytes = b""
    ) -> Operation:
        return Operation(self.count + 1, name, Path(path), other, offset, data)


def _name_of_opening(flags: int, exists: bool) -> str | None:
    if not exists:
        return "create" if flags & os.O_CREAT else None
    return "truncate" if flags & os.O_TRUNC and not flags & os.O_EXCL else None


def _open_path(thread: int, descriptor: int) -> str:
    return os.readlink(f"/proc/{thread}/fd/{descriptor & 0xFFFFFFFF}")


def _path(thread: int, folder: int, address: int) -> str:
    """A path that a call was given, made absolute."""
    name = os.fsdecode(_text(thread, address))
    if name.startswith("/"):
        return os.path.normpath(name)
    here = folder & 0xFFFFFFFF == _AT_HERE & 0xFFFFFFFF
    start = os.readlink(f"/proc/{thread}/cwd") if here else _open_path(thread, folder)
    return os.path.normpath(os.path.join(start, name))


def _text(thread: int, address: int) -> bytes:
    """Bytes up to the first zero, page by page: the next one may not be there."""
    found = b""
    while len(found) < _MAX_PATH:
        block = _memory(thread, address + len(found), _PAGE - (address + len(found)) % _PAGE)
        if b"\0" in block or not block:
            return found + block.partition(b"\0")[0]
        found += block
    return found


def _memory(thread: int, address: int, length: int) -> bytes:
    descriptor = os.open(f"/proc/{thread}/mem", os.O_RDONLY)
    try:
        return os.pread(descriptor, length, address)
    finally:
        os.close(descriptor)


def _position(thread: int, descriptor: int) -> int:
    """Where the next write goes."""
    with open(f"/proc/{thread}/fdinfo/{descriptor}") as file:
        told = dict(line.split(":", 1) for line in file if ":" in line)
    if int(told["flags"], 8) & os.O_APPEND:
        return os.stat(f"/proc/{thread}/fd/{descriptor}").st_size
    return int(told["pos"])
