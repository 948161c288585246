"""How much the compressed buffers of an Arrow file come to, by the sizes that stand in front of them.

An Arrow stream is a sequence of messages. The metadata of one is a flatbuffer: tables whose fields are found by their
number, see https://arrow.apache.org/docs/format/Columnar.html. A compressed buffer begins with its unpacked size.
"""

from __future__ import annotations

import struct
from pathlib import Path

from alignlab.data.file_limits import unpacked_limit
from alignlab.errors import DataError

_HEADER = 2  # number of a field of the table `Message`
_DATA = 1  # of `DictionaryBatch`
_BUFFERS, _COMPRESSION = 2, 3  # of `RecordBatch`
_BUFFER_BYTES = 16


def check_arrow_files(folder: Path) -> None:
    """Refuse a folder saved by `datasets` one of whose files unpacks to more than fits, or far more than its size.

    Files that are not compressed are mapped into memory, and need no limit.

    Raises:
        DataError: one does.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".json":
            _check_file(path)


def _check_file(path: Path) -> None:
    import pyarrow

    limit, size = unpacked_limit(path.stat().st_size, is_packed=True), 0
    with pyarrow.memory_map(str(path)) as file:
        for message in pyarrow.ipc.MessageReader.open_stream(file):
            size += _unpacked_bytes(message)
            if size > limit:
                raise DataError(
                    f"{path} must unpack to at most {limit} bytes, by its size and the free memory, and says that it "
                    "unpacks to more; save it without compression, or correct the path"
                )


def _unpacked_bytes(message: object) -> int:
    """Return the unpacked size of a message's compressed buffers, in bytes; 0 if it has none."""
    kind, metadata, body = (getattr(message, name) for name in ("type", "metadata", "body"))
    if kind not in ("record batch", "dictionary"):
        return 0
    data = memoryview(metadata)
    table = _child(data, _child(data, 0), _HEADER)
    if kind == "dictionary":
        table = _child(data, table, _DATA)
    if not _field(data, table, _COMPRESSION):
        return 0
    vector = _child(data, table, _BUFFERS)
    [count] = struct.unpack_from("<I", data, vector)
    size = 0
    for index in range(count):
        start, length = struct.unpack_from("<qq", data, vector + 4 + index * _BUFFER_BYTES)
        if length > 0:
            [unpacked] = struct.unpack_from("<q", memoryview(body), start)
            size += length if unpacked < 0 else unpacked  # -1: the buffer was left as it was
    return size


def _field(data: memoryview, table: int, number: int) -> int:
    """Return the position of a table's field; 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size: int = struct.unpack_from("<H", data, vtable)[0]
    place = 4 + 2 * number
    offset: int = struct.unpack_from("<H", data, vtable + place)[0] if place < size else 0
    return table + offset if offset else 0


def _child(data: memoryview, table: int, number: int | None = None) -> int:
    """Return the position of the table or vector that a field leads to; without a number, of the root."""
    place = table if number is None else _field(data, table, number)
    return int(place + struct.unpack_from("<I", data, place)[0])
