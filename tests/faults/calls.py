"""System calls that change files, and a filter by which the kernel asks another process before it does one (seccomp).

Linux 5.0 or later, on x86-64 or 64-bit ARM. Whatever makes a call is seen: Python, C, Rust, threads, programs started.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_NUMBERS = {
    "x86_64": {
        "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "msync": 26, "sendfile": 40, "fsync": 74, "fdatasync": 75,
        "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
        "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "fallocate": 285,
        "pwritev": 296, "renameat2": 316, "copy_file_range": 326, "seccomp": 317,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46, "fallocate": 47,
        "openat": 56, "write": 64, "writev": 66, "pwrite64": 68, "pwritev": 70, "sendfile": 71, "fsync": 82,
        "fdatasync": 83, "msync": 227, "renameat2": 276, "seccomp": 277, "copy_file_range": 285,
    },
}  # fmt: skip
NUMBERS = _NUMBERS.get(platform.machine(), {})
NAMES = {number: name for name, number in NUMBERS.items()}
FLAGS_OF_OPENING = {"open": 1, "openat": 2}
"""Which argument holds them: only openings that may make or empty a file are asked about."""

_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NO_NEW_PRIVILEGES, _SET_FILTER, _NEW_LISTENER, _KILLABLE = 38, 1, 1 << 3, 1 << 5


def is_supported() -> bool:
    """Whether the kernel can ask another process before a system call."""
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail", encoding="ascii") as file:
            return bool(NUMBERS) and "user_notif" in file.read().split()
    except OSError:
        return False


def install() -> int:
    """Have this process and all that it starts ask before their calls; returns the descriptor that tells of them.

    It cannot be undone.

    Raises:
        OSError: the kernel refuses.
    """
    library = ctypes.CDLL(None, use_errno=True)
    program = _program()
    code = ctypes.create_string_buffer(program, len(program))
    about = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for flags in (_NEW_LISTENER | _KILLABLE, _NEW_LISTENER):  # the second before Linux 5.19
        listener: int = library.syscall(NUMBERS["seccomp"], _SET_FILTER, flags, about)
        if listener >= 0:
            return listener
    raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def _program() -> bytes:
    """The filter, for the kernel's virtual machine of filters (BPF)."""
    steps = [(_LOAD, 0, 0, 0)]
    for name, number in NUMBERS.items():
        if name == "seccomp":
            continue
        if name in FLAGS_OF_OPENING:
            argument = 16 + 8 * FLAGS_OF_OPENING[name]
            steps += [
                (_JUMP_IF_EQUAL, 0, 4, number), (_LOAD, 0, 0, argument),
                (_JUMP_IF_SET, 0, 1, os.O_CREAT | os.O_TRUNC), (_RETURN, 0, 0, _ASK), (_RETURN, 0, 0, _ALLOW),
            ]  # fmt: skip
        else:
            steps += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ASK)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)
