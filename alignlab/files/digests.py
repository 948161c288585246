"""Digests of files, token ids, Python values and any bytes, by one of two algorithms.

- SHA-256 for what is kept and read again, perhaps by other programs: files, records, JSON with its own digest. It also
  protects against intent.
- XXH3 (128 bits) for what is large or hashed at every step: tensors, token ids, keys of caches. It finds damage and
  confusion, at the speed of memory.

All digests are hexadecimal text, and the same in every process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

SHA256 = "sha256"
"""The key under which a JSON object holds the digest of the rest of it."""
_READ_BYTES = 1 << 20
_LONG_INTEGER_BITS = 1024
"""Size of an integer from which on Python may refuse to write it in decimal."""
_MODULES_WRITTEN_AS_TEXT = ("datetime", "decimal", "fractions", "pathlib", "uuid")
"""Modules of the standard library whose objects are identified by their text."""


class DamagedError(ValueError):
    """Content is not what was written; the reader of a file adds which file it is and what to do."""


def sha256_of(content: str | bytes) -> str:
    """Return the SHA-256 of a text (as UTF-8) or of bytes."""
    return sha256_of_parts([content])


def sha256_of_parts(chunks: Iterable[str | bytes]) -> str:
    """Return the SHA-256 of the chunks, joined."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(_as_bytes(chunk))
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, as `sha256sum` prints it."""
    return sha256_of_parts(_blocks(path))


def fast_digest(chunks: Iterable[str | bytes | memoryview]) -> str:
    """Return the XXH3 of the chunks, joined."""
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(_as_bytes(chunk))
    return digest.hexdigest()


def fast_digest_of_file(path: Path) -> str:
    """Return the XXH3 of a file's content."""
    return fast_digest(_blocks(path))


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys and its white space."""
    return sha256_of(json.dumps(value, sort_keys=True))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own digest under "sha256"."""
    assert SHA256 not in value, "the key is reserved for the digest"
    plain = json.loads(json.dumps(dict(value)))  # turns keys that are numbers into texts before they are sorted
    return {SHA256: json_digest(plain), **plain}


def unsealed(value: Any) -> dict[str, Any]:
    """Return the object that `sealed` was called with.

    Raises:
        DamagedError: the value is no object, has no digest, or another one than was written.
    """
    if not isinstance(value, dict) or SHA256 not in value:
        raise DamagedError("it holds no digest of itself")
    content = {name: field for name, field in value.items() if name != SHA256}
    if json_digest(content) != value[SHA256]:
        raise DamagedError("its SHA-256 is not the one it was written with")
    return content


def parse_sealed(text: str | bytes) -> dict[str, Any]:
    """Return the object that `sealed` was called with, from its JSON text.

    Raises:
        DamagedError: the text is no JSON; or see `unsealed`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DamagedError(f"it is no JSON: {error}") from error
    return unsealed(value)


def digest_of_values(values: Iterable[Any]) -> str:
    """Return the SHA-256 of Python values.

    The order of a mapping's keys does not count. Of a value that is not data, such as an open file, the type alone
    counts.
    """
    texts = (json.dumps(as_json(value), sort_keys=True, separators=(",", ":")) for value in values)
    return sha256_of_parts(f"{len(text)}:{text}" for text in texts)


def as_json(value: Any) -> Any:
    """Return a Python value as JSON, as far as it is data; of anything else the type alone."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(item) for item in value), key=repr)
    if hasattr(value, "tolist"):  # arrays and numbers of numpy, tensors of torch
        return as_json(value.tolist())
    return _scalar_as_json(value)


def _scalar_as_json(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _LONG_INTEGER_BITS:
        return hex(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    kind = type(value)
    is_text = kind is bytes or kind.__module__.partition(".")[0] in _MODULES_WRITTEN_AS_TEXT
    return [f"{kind.__module__}.{kind.__qualname__}", str(value) if is_text else None]


def _as_bytes(content: str | bytes | memoryview) -> bytes | memoryview:
    return content.encode() if isinstance(content, str) else content


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's content in blocks, so that a large file does not fill the memory."""
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block
