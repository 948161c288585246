"""What is done to files: operations, the log of them, and a plan of what happens at which."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Mode = Literal["observe", "before", "inside", "fail_once", "fail_from"]
_GROWING = ("create", "truncate", "write", "mkdir", "resize", "allocate", "link")
ERRORS: dict[str, tuple[int, tuple[str, ...]]] = {
    "full": (errno.ENOSPC, _GROWING), "quota": (errno.EDQUOT, _GROWING), "broken": (errno.EIO, ("write", "sync")),
    "denied": (errno.EACCES, ("create", "mkdir", "rename", "exchange")),
}  # fmt: skip
"""What goes wrong: the error, and the operations that have it."""


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        number: counted from 1.
        name: create, truncate, write, resize, allocate, rename, exchange, link, unlink, mkdir, rmdir or sync.
        path, other: the second is where a renamed or linked file comes to.
        offset: of a write; the new length of a resizing.
        data: of a write.
    """

    number: int
    name: str
    path: Path
    other: Path | None = None
    offset: int = 0
    data: bytes = b""

    def to_bytes(self) -> bytes:
        """Its entry in a log."""
        line = f"{self.number}\t{self.name}\t{self.path}\t{self.other or ''}\t{self.offset}\t{len(self.data)}\n"
        return line.encode() + self.data


@dataclass(frozen=True)
class Plan:
    """What happens at which operation.

    Attributes:
        mode: only looked at; killed before it; killed in the middle of it, which is a write of which half is there;
            failing alone; failing with all that follow.
        at: its number, from 1.
        error: a key of `ERRORS`, for failing.
        file_bytes: beyond which no file can be written; None for any size.
    """

    mode: Mode = "observe"
    at: int = 0
    error: str = "full"
    file_bytes: int | None = None

    def fails(self, operation: Operation) -> int:
        """The error that an operation has, or 0."""
        failing = self.mode == "fail_once" and operation.number == self.at
        failing |= self.mode == "fail_from" and operation.number >= self.at
        error, names = ERRORS[self.error]
        return error if failing and operation.name in names else 0

    def kills(self, operation: Operation) -> bool:
        """Whether the process is killed at an operation."""
        return self.mode in ("before", "inside") and operation.number == self.at


def read_log(path: Path) -> list[Operation]:
    """The operations of a log, in order."""
    return list(_operations(path.read_bytes()))


def _operations(content: bytes) -> Iterator[Operation]:
    position = 0
    while position < len(content):
        end = content.index(b"\n", position)
        number, name, first, second, offset, length = content[position:end].decode().split("\t")
        position = end + 1 + int(length)
        other = Path(second) if second else None
        yield Operation(int(number), name, Path(first), other, int(offset), content[end + 1 : position])
