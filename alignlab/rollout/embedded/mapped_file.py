"""A file without a name that holds a cache: it lies on a disk, and in memory as far as it is used.

The file is unlinked as it is made, so that nothing is left of it when the process ends, however it ends. Its room is
reserved at once: a full disk is found before anything is computed.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignlab.config.kv_cache import MmapCache
from alignlab.errors import ConfigError, RolloutError

_GIB = 2**30
_FAULT_BYTES = 65_536
"""The kernel maps so much at once where a page is missing that the system still has."""


def check_mapped_cache(settings: MmapCache, device: torch.device) -> None:
    """Raise if a cache cannot lie in a file of the folder that the settings name.

    Raises:
        ConfigError: the engine runs on a GPU, the system has no such files, or the folder is missing, cannot be written
            or has less room than `max_gib`.
    """
    name, folder = "rollout.kv_cache.folder", settings.folder
    if device.type != "cpu":
        raise ConfigError(
            f"rollout.kv_cache is mmap, and the engine must then run on a CPU, and runs on {device.type}: a GPU reads "
            "no files; use rollout.preemption: swap, or kv_cache: {type: exact}"
        )
    if not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_DONTNEED"):
        raise ConfigError(
            "rollout.kv_cache is mmap, and the system must be a Linux, which reserves a file's room and takes memory "
            "back; use kv_cache: {type: exact}"
        )
    if not folder.is_dir():
        raise ConfigError(f"{name} is {folder}, and must be a folder that exists; make it, or name another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} is {folder}, and must be a folder that can be written ({error.strerror}); change its rights, or "
            "name another"
        ) from error
    free = shutil.disk_usage(folder).free
    if settings.max_gib is not None and settings.max_gib * _GIB > free:
        raise ConfigError(
            f"rollout.kv_cache.max_gib is {settings.max_gib:g}, and must be at most what {folder} has free, "
            f"{free / _GIB:.1f} GiB; lower it, or name another folder"
        )


class MappedFile:
    """A file of a fixed size, mapped into memory, out of which tensors are taken one after the other.

    Args:
        folder: on whose disk it lies.
        num_bytes: its size.
        resident_bytes: of it in memory at one time, but for what is touched at once.

    Raises:
        RolloutError: the disk has no room for it.
    """

    def __init__(self, folder: Path, num_bytes: int, resident_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._resident_bytes = resident_bytes
        self._touched = self._taken = 0
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                self._memory = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            raise RolloutError(
                f"{folder} must have room for a cache of {num_bytes / _GIB:.2f} GiB (rollout.kv_cache), and has "
                f"{shutil.disk_usage(folder).free / _GIB:.2f} GiB ({error.strerror}); free some, name another folder, "
                "or lower rollout.cache_tokens or max_running"
            ) from error

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros in the file."""
        start, count = self._taken, math.prod(shape)
        self._taken = start + -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        assert self._taken <= self.num_bytes, "the file has the size that was predicted"
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(*shape)

    def touch(self, num_bytes: int) -> None:
        """Take note that so many bytes are read or written next; what was touched before goes where it is too much."""
        self._touched += num_bytes
        if self._touched > self._resident_bytes:
            self._memory.madvise(mmap.MADV_DONTNEED)  # of a file, this takes memory back and loses nothing
            self._touched = num_bytes

    def touch_all(self) -> None:
        """Take note that any part may be read or written next."""
        self._touched = self._resident_bytes


def touched_bytes(rows: Tensor, row_bytes: int) -> int:
    """Return the bytes that come into memory when rows [n] int64 of a table are read, each of `row_bytes`."""
    first, last = rows * row_bytes // _FAULT_BYTES, ((rows + 1) * row_bytes - 1) // _FAULT_BYTES
    ends, inside = torch.cat((first, last)).unique(), (last - first - 1).clamp_min(0)
    return _FAULT_BYTES * (len(ends) + int(inside.sum()))


def page_bytes(num_bytes: int) -> int:
    """Return a size rounded up to whole pages."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
