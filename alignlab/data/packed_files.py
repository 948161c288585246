"""Packed files that `datasets` is to read: unpacked once without being kept, so that none comes to far more than its
size says.

Unlike the files that alignlab reads itself, these need not fit into memory: `datasets` reads them in parts.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from datasets import DownloadManager
from datasets.utils.extract import Extractor
from datasets.utils.py_utils import NestedDataStructure

from alignlab.data.file_limits import ALWAYS_ALLOWED_BYTES, MAX_RATIO, check_row_groups, free_memory
from alignlab.errors import DataError

_READ_BYTES = 2**20
_PARQUET_MARK = b"PAR1"


class BoundedDownloads(DownloadManager):
    """Downloads of a dataset's files, from the Hub or a folder, each checked before it is read."""

    def download(self, url_or_urls: Any) -> Any:
        """Return the local paths of files, of the same structure as `url_or_urls`.

        Raises:
            DataError: one unpacks to too much, or is packed in a way whose size cannot be told.
        """
        paths = super().download(url_or_urls)
        for path in NestedDataStructure(paths).flatten():
            check_file(str(path))
        return paths


def check_file(path: str) -> None:
    """Refuse a file that unpacks to far more than its size, or a part of which does not fit into memory.

    Raises:
        DataError: it does, or its kind of packing tells no size.
    """
    kind = Extractor.infer_extractor_format(path)
    if kind is not None:
        _check_packed(path, kind)
        return
    with open(path, "rb") as file:
        is_table = file.read(len(_PARQUET_MARK)) == _PARQUET_MARK
    if is_table:
        check_row_groups(path)


def _check_packed(path: str, kind: str) -> None:
    if kind not in _STREAMS:
        raise DataError(
            f"{path} must be packed as {', '.join(_STREAMS)}, whose unpacked size can be bounded, and is {kind}; "
            "unpack it, and pack it again with gzip"
        )
    with open(path, "rb") as file:
        limit = max(file.seek(0, 2) * MAX_RATIO, ALWAYS_ALLOWED_BYTES)
    memory, size = free_memory(), 0
    for stream in _STREAMS[kind](path):
        line = 0
        while block := stream.read(_READ_BYTES):
            size += len(block)
            end, last = block.find(b"\n"), block.rfind(b"\n")
            line += len(block) if end < 0 else end
            if size > limit:
                raise DataError(
                    f"{path} must unpack to at most {limit} bytes, {MAX_RATIO} times its size, and unpacks to more; "
                    "correct the path, or unpack it yourself"
                )
            if line > memory:
                raise DataError(
                    f"{path} must have lines of at most {memory} bytes, half of the free memory, and has a longer one; "
                    "write one row a line, or correct the path"
                )
            line = line if end < 0 else len(block) - last - 1


def _only(opened: Callable[[str], Any]) -> Callable[[str], Iterator[BinaryIO]]:
    """Return the streams of a file of one member, from the function that opens it."""

    def streams(path: str) -> Iterator[BinaryIO]:
        with opened(path) as stream:
            yield cast("BinaryIO", stream)

    return streams


def _arrow_stream(compression: str) -> Callable[[str], Any]:
    def opened(path: str) -> Any:
        import pyarrow

        return pyarrow.input_stream(path, compression=compression)

    return opened


def _zip_members(path: str) -> Iterator[BinaryIO]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                yield cast("BinaryIO", stream)


def _tar_members(path: str) -> Iterator[BinaryIO]:
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield cast("BinaryIO", stream)


_STREAMS: dict[str, Callable[[str], Iterator[BinaryIO]]] = {
    "gzip": _only(gzip.open),
    "bz2": _only(bz2.open),
    "xz": _only(lzma.open),
    "zstd": _only(_arrow_stream("zstd")),
    "lz4": _only(_arrow_stream("lz4")),
    "zip": _zip_members,
    "tar": _tar_members,
}
"""Unpacked streams of a file, member by member, by the name that `datasets` has for the kind of packing."""
