"""How much a file of rows may come to once it is unpacked, and how long one of its lines may be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import psutil

from alignlab.errors import DataError

MAX_ROW_BYTES = 2**26
"""Largest size of one line of JSON, and of one field of CSV."""
MAX_RATIO = 100
"""Largest unpacked size of a file, in multiples of its packed size. Rows of text have 5 to 20."""
ALWAYS_ALLOWED_BYTES = 2**26
_MEMORY_FRACTION = 0.5
_ROWS_AT_ONCE = 128


def free_memory() -> int:
    """Return the bytes of memory that reading a file may take: half of the free memory."""
    return int(psutil.virtual_memory().available * _MEMORY_FRACTION)


def unpacked_limit(size: int, *, is_packed: bool) -> int:
    """Return the largest number of bytes to read from a file, by its size and this machine's free memory.

    Args:
        size: size of the file, in bytes.
        is_packed: True if the file is compressed.
    """
    memory = free_memory()
    plausible = max(size * MAX_RATIO, ALWAYS_ALLOWED_BYTES) if is_packed else memory
    return max(min(memory, plausible), ALWAYS_ALLOWED_BYTES)


class LimitedReader(io.RawIOBase):
    """A binary file of which at most a number of bytes can be read.

    Args:
        limit: largest number of bytes.
        path: path of the file, for the message.
    """

    def __init__(self, file: BinaryIO, limit: int, path: str) -> None:
        super().__init__()
        self._file, self._limit, self._path = file, limit, path
        self._num_read = 0

    def readable(self) -> bool:
        """Return True, as `io` asks of a readable stream."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes.

        Raises:
            DataError: the file holds more bytes than the limit.
        """
        data = self._file.read(len(buffer))
        self._num_read += len(data)
        if self._num_read > self._limit:
            raise DataError(
                f"{self._path} must hold at most {self._limit} bytes of text, {MAX_RATIO} times the size of a packed "
                "file and half of the free memory, and holds more; divide it, or correct the path"
            )
        buffer[: len(data)] = data
        return len(data)


def limited_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; of a longer line the first `MAX_ROW_BYTES` + 1 bytes, by which it is recognised."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES + 1)


def check_table(path: str) -> None:
    """Refuse a Parquet file whose rows do not fit into memory once they are unpacked.

    Raises:
        DataError: they do not fit.
    """
    memory, size = free_memory(), 0
    for group_size in _group_sizes(path, memory):
        size += group_size
        if size > memory:
            break
    if size > memory:
        raise DataError(
            f"{path} must unpack to at most {memory} bytes, half of the free memory, and has more; divide it, or "
            "correct the path"
        )


def check_row_groups(path: str) -> None:
    """Refuse a Parquet file one of whose row groups does not fit into memory once it is unpacked.

    Raises:
        DataError: one does not fit.
    """
    memory = free_memory()
    if any(size > memory for size in _group_sizes(path, memory)):
        raise DataError(
            f"each row group of {path} must unpack to at most {memory} bytes, half of the free memory, and one has "
            "more; write it in smaller groups, or correct the path"
        )


def _group_sizes(path: str, limit: int) -> Iterator[int]:
    """Yield the bytes of each row group of a Parquet file, counted no further than a limit.

    A column may hold a text once, and how often it is meant: such columns are counted without being written out.
    """
    from pyarrow import parquet, types

    with parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
        columns = file.schema_arrow
    texts = [each.name for each in columns if types.is_string(each.type) or types.is_binary(each.type)]
    with parquet.ParquetFile(path, read_dictionary=texts) as file:
        for index, size in enumerate(sizes):
            if size <= limit:
                size = 0
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[index]):
                    size += sum(map(_num_bytes, batch.columns))
                    if size > limit:
                        break
            yield size


def _num_bytes(column: Any) -> int:
    """Return the size of an Arrow column in bytes, in which each text counts as often as it occurs."""
    from pyarrow import DictionaryArray, compute

    if isinstance(column, DictionaryArray):
        lengths = compute.binary_length(column.dictionary)
        return int(compute.sum(compute.cast(lengths.take(column.indices), "int64")).as_py() or 0)
    return int(column.nbytes)
