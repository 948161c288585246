"""Writing files so that a crash at any instant leaves either the old content or the new, never half of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

READ_BYTES = 1 << 20


def sync_file(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, through a temporary file beside it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name, after its content is on the disk."""
    sync_file(temporary)
    os.replace(temporary, path)
    sync_file(path.parent)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
