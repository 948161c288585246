"""Damage to one file: what a disk, a broken copy or a confused person does to it. Deterministic by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

_BLOCK = 512
Mutation = Callable[[bytes, random.Random], bytes | None]
"""Makes other content, or None where this content cannot be damaged so."""


def _flip(content: bytes, draw: random.Random) -> bytes | None:
    if not content:
        return None
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def _cut(content: bytes, draw: random.Random) -> bytes | None:
    return content[: draw.randrange(1, len(content))] if len(content) > 1 else None


def _zero_block(content: bytes, draw: random.Random) -> bytes | None:
    if not content:
        return None
    start = draw.randrange(len(content))
    size = min(_BLOCK, len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def _lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True) if b"\0" not in content else []


def _cut_after_a_line(content: bytes, draw: random.Random) -> bytes | None:
    lines = _lines(content)
    return b"".join(lines[: draw.randrange(1, len(lines))]) if len(lines) > 1 else None


def _without_a_line(content: bytes, draw: random.Random) -> bytes | None:
    lines = _lines(content)
    if len(lines) < 2:
        return None
    del lines[draw.randrange(len(lines) - 1)]
    return b"".join(lines)


def _double_line(content: bytes, draw: random.Random) -> bytes | None:
    lines = _lines(content)
    if not lines:
        return None
    place = draw.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def _swapped_lines(content: bytes, draw: random.Random) -> bytes | None:
    lines = _lines(content)
    if len(lines) < 2:
        return None
    first, second = draw.sample(range(len(lines)), 2)
    lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def _other_digit(content: bytes, draw: random.Random) -> bytes | None:
    """A number that is another, in a text that is as well-formed as before."""
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()] if b"\0" not in content else []
    if not places:
        return None
    place = draw.choice(places)
    digit = str((int(chr(content[place])) + draw.randrange(1, 9)) % 10).encode()
    return content[:place] + digit + content[place + 1 :]


MUTATIONS: dict[str, Mutation] = {
    "bit-1": _flip, "bit-2": _flip, "bit-3": _flip, "bit-4": _flip, "cut": _cut, "zeros": _zero_block,
    "longer": lambda content, draw: content + draw.randbytes(16),
    "longer-by-a-line": lambda content, _: content + b"\n",
    "emptied": lambda content, _: b"" if content else None, "cut-after-a-line": _cut_after_a_line,
    "without-a-line": _without_a_line, "double-line": _double_line, "swapped-lines": _swapped_lines,
    "digit-1": _other_digit, "digit-2": _other_digit,
}  # fmt: skip


def mutated(content: bytes, name: str, seed: str) -> bytes | None:
    """The content with one damage; None where it cannot have it, or is the same after it."""
    changed = MUTATIONS[name](content, random.Random(f"{seed}/{name}"))
    return None if changed == content else changed
