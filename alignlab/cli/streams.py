"""The standard streams of the command's process: closed, full or broken ones do not stop a run.

A descriptor below 3 that is closed is the next to be given to a file that the process opens, and what libraries print
would go into that file. A terminal that is closed, a reader that ends and a full disk under a log are no failure of
what the command does; but a result that standard output did not take is said, see `stdout_error`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_READERLESS = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Nothing that is written later will be taken either."""


class LastingFile(io.FileIO):
    """A file that goes on where it cannot be written to: what it did not take is lost.

    Args:
        descriptor: of an open file, which stays open when this object is closed.

    Attributes:
        first_error: what stopped the first write that failed; None where none did.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.first_error: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write and return the number of bytes that were taken, all of them where they are lost."""
        try:
            return super().write(data)
        except OSError as error:
            self.first_error = self.first_error or error
            if error.errno in _READERLESS:  # a child process that writes there would be ended by SIGPIPE
                _connect_to_nothing(self.fileno())
            return memoryview(data).nbytes


def make_streams_last() -> None:
    """Open the standard streams that are closed on the null device, and let standard output and error last."""
    for descriptor in (0, 1, 2):
        if not _is_open(descriptor):
            _connect_to_nothing(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _lasting(sys.stdout, 1, "strict")
    sys.stderr = _lasting(sys.stderr, 2, "backslashreplace")


def stdout_error() -> OSError | None:
    """Return what stopped standard output from being written for the first time; None where nothing did."""
    sys.stdout.flush()
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return file.first_error if isinstance(file, LastingFile) else None


def _lasting(
    stream: TextIO | None, descriptor: Literal[1, 2], errors: Literal["strict", "backslashreplace"]
) -> io.TextIOWrapper:
    encoding = "utf-8" if stream is None else stream.encoding
    if stream is not None:
        errors = stream.errors or errors  # type: ignore[assignment]
        stream.flush()
    by_line = descriptor == 2 or os.isatty(descriptor)  # as Python itself opens them
    return io.TextIOWrapper(
        io.BufferedWriter(LastingFile(descriptor)), encoding=encoding, errors=errors, line_buffering=by_line
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _connect_to_nothing(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(descriptor, True)
        return
    os.dup2(null, descriptor)
    os.close(null)
