"""Digests: what is read back is what was written, or the damage is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20
SHA256 = "sha256"
"""The key under which a JSON object holds the digest of the rest of it."""
LONG_INTEGER_BITS = 1024
"""Of an integer that Python may refuse to write in decimal."""
WRITTEN_AS_TEXT = ("datetime", "decimal", "fractions", "pathlib", "uuid")
"""Modules of the standard library whose objects are what their text says."""


class DamagedError(ValueError):
    """Content is not what was written; the reader of a file says which file and what to do."""


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON value, whatever the order of its keys and its white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own digest under "sha256"."""
    assert SHA256 not in value, "the name is the digest's"
    plain = json.loads(json.dumps(dict(value)))  # keys that are numbers become texts, by which they are sorted
    return {SHA256: json_digest(plain), **plain}


def unsealed(value: Any) -> dict[str, Any]:
    """Return what `sealed` was given.

    Raises:
        DamagedError: it is no object, has no digest, or another one.
    """
    if not isinstance(value, dict) or SHA256 not in value:
        raise DamagedError("it holds no digest of itself")
    rest = {name: held for name, held in value.items() if name != SHA256}
    if json_digest(rest) != value[SHA256]:
        raise DamagedError("its SHA-256 is not the one it was written with")
    return rest


def parse_sealed(text: str | bytes) -> dict[str, Any]:
    """Return what `sealed` was given, from the JSON that it was written as.

    Raises:
        DamagedError: it is no JSON, or see `unsealed`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DamagedError(f"it is no JSON: {error}") from error
    return unsealed(value)


def digest_of_values(values: Iterable[Any]) -> str:
    """Return the hexadecimal SHA-256 of Python values, the same in every process.

    Mappings are compared without their order. Of a value that is not data, such as an open file, the type alone counts.
    """
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(as_json(value), sort_keys=True, separators=(",", ":"))
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def as_json(value: Any) -> Any:
    """Return a Python value as JSON, as far as it is data; of anything else the type alone."""
    if isinstance(value, int) and value.bit_length() > LONG_INTEGER_BITS:
        return hex(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(held) for held in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(held) for held in value), key=repr)
    if hasattr(value, "tolist"):  # arrays and numbers of numpy, tensors of torch
        return as_json(value.tolist())
    kind = type(value)
    is_text = kind.__module__.partition(".")[0] in WRITTEN_AS_TEXT
    return [f"{kind.__module__}.{kind.__qualname__}", str(value) if is_text or kind is bytes else None]
