"""How much a file of rows may come to once it is unpacked, and how long one of its lines may be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import psutil

from alignlab.errors import DataError

MAX_ROW_BYTES = 2**26
"""Of one line of JSON, and of one field of CSV."""
MAX_RATIO = 100
"""By which a packed file may grow. Rows of text grow five to twenty times."""
ALWAYS_ALLOWED_BYTES = 2**26
_MEMORY_FRACTION = 0.5
_ROWS_AT_ONCE = 128


def unpacked_limit(size: int, *, is_packed: bool) -> int:
    """Return the bytes that may be read of a file: what its size explains, and this machine's free memory holds.

    Args:
        size: of the file, in bytes.
        is_packed: its content is longer than the file.
    """
    memory = int(psutil.virtual_memory().available * _MEMORY_FRACTION)
    explained = max(size * MAX_RATIO, ALWAYS_ALLOWED_BYTES) if is_packed else memory
    return max(min(memory, explained), ALWAYS_ALLOWED_BYTES)


class LimitedReader(io.RawIOBase):
    """A binary file that is read up to a number of bytes.

    Args:
        limit: bytes that may be read.
        path: for the message.
    """

    def __init__(self, file: BinaryIO, limit: int, path: str) -> None:
        super().__init__()
        self._file, self._limit, self._path = file, limit, path
        self._num_read = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes.

        Raises:
            DataError: there are more than the limit.
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
    """Yield the lines of a file; of one longer than `MAX_ROW_BYTES`, its beginning, one byte longer than that."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES + 1)


def check_table(path: str) -> None:
    """Refuse a Parquet file whose rows do not fit into memory once they are unpacked.

    A column may hold a text once, and how often it is meant: such columns are counted without being written out.

    Raises:
        DataError: they do not fit.
    """
    from pyarrow import parquet, types

    memory = int(psutil.virtual_memory().available * _MEMORY_FRACTION)
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        columns = file.schema_arrow
    texts = [each.name for each in columns if types.is_string(each.type) or types.is_binary(each.type)]
    if size <= memory:
        size = 0
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                size += sum(map(_num_bytes, batch.columns))
                if size > memory:
                    break
    if size > memory:
        raise DataError(
            f"{path} must unpack to at most {memory} bytes, half of the free memory, and has more; divide it, or "
            "correct the path"
        )


def _num_bytes(column: Any) -> int:
    """Bytes of a column of Arrow's, with each text as often as it is meant."""
    from pyarrow import DictionaryArray, compute

    if isinstance(column, DictionaryArray):
        lengths = compute.binary_length(column.dictionary)
        return int(compute.sum(compute.cast(lengths.take(column.indices), "int64")).as_py() or 0)
    return int(column.nbytes)
