"""What a disk may hold after the power went, by the log of operations: what was synced is there, all else may be.

The model is POSIX's promise and no file system's kindness:

- the bytes of a file that was synced are those of then, or of any time after; of what was not, there may be nothing,
  all, half, or zeros;
- a name that a folder got or lost may be so or not until the folder itself is synced, each change by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.faults.operations import Operation

_MAX_CHANGES = 8


@dataclass(eq=False)
class File:
    """Bytes as processes see them, and as they are certainly on the disk; and whether it was emptied in between."""

    seen: bytes = b""
    certain: bytes = b""
    was_emptied: bool = False


@dataclass(eq=False)
class Folder:
    """What a folder holds on the disk for certain."""

    certain: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(eq=False)
class Change:
    """Names that came or went together: (folder, name, what it names now or None)."""

    parts: tuple[tuple[Folder, str, File | Folder | None], ...]


class Disk:
    """A disk on which a log's operations are done one after the other.

    Args:
        start: what is there before, for certain: content by path.
        root: of all paths.
    """

    def __init__(self, root: Path, start: dict[Path, bytes]) -> None:
        self._root = root
        self._top = Folder()
        self._seen: dict[Path, File | Folder] = {root: self._top}
        self._pending: list[Change] = []
        for path, content in start.items():
            folder = self._top
            for part in path.relative_to(root).parts[:-1]:
                inside = folder.certain.setdefault(part, Folder())
                assert isinstance(inside, Folder)
                folder = inside
            folder.certain[path.name] = File(content, content)
        self._look(self._top, root)

    def do(self, operation: Operation) -> None:
        """Do one operation."""
        path, other, name = operation.path, operation.other, operation.name
        if name in ("create", "mkdir"):
            self._change((path, File() if name == "create" else Folder()))
        elif name in ("unlink", "rmdir"):
            self._change((path, None))
        elif name == "rename":
            assert other is not None
            self._rename(path, other)
        elif name == "exchange":
            assert other is not None
            self._exchange(path, other)
        elif name == "link":
            assert other is not None
            self._change((other, self._seen[path]))
        elif name == "sync":
            self._sync(path)
        elif isinstance(file := self._seen.get(path), File):  # not one that is removed already, and only open
            file.seen = _written(file.seen, operation)
            file.was_emptied |= name == "truncate"

    def states(self) -> Iterator[dict[Path, bytes]]:
        """Each content that the disk may have if the power goes now; without the start of a process to it."""
        seen: set[int] = set()
        for kept in self._choices_of_names():
            files = dict(_files(self._root, self._names(kept)))
            dirty = [path for path, file in files.items() if file.seen != file.certain]
            for chosen in _choices_of_bytes(files, dirty):
                shape = shape_of(chosen)
                if shape not in seen:
                    seen.add(shape)
                    yield chosen

    def _look(self, folder: Folder, path: Path) -> None:
        for name, inside in folder.certain.items():
            self._seen[path / name] = inside
            if isinstance(inside, Folder):
                self._look(inside, path / name)

    def _folder(self, path: Path) -> Folder:
        folder = self._seen[path]
        assert isinstance(folder, Folder), path
        return folder

    def _change(self, *parts: tuple[Path, File | Folder | None]) -> None:
        for path, what in parts:
            if what is None:
                self._seen.pop(path, None)
            else:
                self._seen[path] = what
        self._pending.append(Change(tuple((self._folder(path.parent), path.name, what) for path, what in parts)))

    def _rename(self, old: Path, new: Path) -> None:
        moved = self._taken(old)
        self._change((old, None), (new, moved[old]))
        self._seen |= {new / path.relative_to(old): what for path, what in moved.items()}

    def _exchange(self, one: Path, other: Path) -> None:
        first, second = self._taken(one), self._taken(other)
        self._change((one, second[other]), (other, first[one]))
        self._seen |= {other / path.relative_to(one): what for path, what in first.items()}
        self._seen |= {one / path.relative_to(other): what for path, what in second.items()}

    def _taken(self, top: Path) -> dict[Path, File | Folder]:
        """A name and all below it, which processes see there no more."""
        taken = {path: what for path, what in self._seen.items() if path == top or top in path.parents}
        for path in taken:
            del self._seen[path]
        return taken

    def _sync(self, path: Path) -> None:
        what = self._seen.get(path)
        if isinstance(what, File):
            what.certain, what.was_emptied = what.seen, False
        elif isinstance(what, Folder):
            concerned = [change for change in self._pending if any(folder is what for folder, _, _ in change.parts)]
            self._pending = [change for change in self._pending if change not in concerned]
            for change in concerned:
                _apply(change, None)

    def _choices_of_names(self) -> Iterator[Sequence[Change]]:
        """All changes, none, all up to one, all but one, one alone."""
        pending = self._pending
        yield pending
        yield ()
        for place in range(len(pending))[-_MAX_CHANGES:]:
            yield pending[:place]
            yield pending[:place] + pending[place + 1 :]
            yield (pending[place],)

    def _names(self, kept: Iterable[Change]) -> dict[Folder, dict[str, File | Folder]]:
        """What the folders hold that were changed."""
        names: dict[Folder, dict[str, File | Folder]] = {}
        for change in kept:
            _apply(change, names)
        return {self._top: dict(self._top.certain)} | names


def _apply(change: Change, names: dict[Folder, dict[str, File | Folder]] | None) -> None:
    """Make a change certain or, where names are given, only in those."""
    for folder, name, what in change.parts:
        inside = folder.certain if names is None else names.setdefault(folder, dict(folder.certain))
        if what is None:
            inside.pop(name, None)
        else:
            inside[name] = what


def _files(
    path: Path, names: dict[Folder, dict[str, File | Folder]], folder: Folder | None = None
) -> Iterator[tuple[Path, File]]:
    if folder is None:
        folder = next(iter(names))
    for name, what in names.get(folder, folder.certain).items():
        if isinstance(what, File):
            yield path / name, what
        else:
            yield from _files(path / name, names, what)


def _choices_of_bytes(files: dict[Path, File], dirty: Sequence[Path]) -> Iterator[dict[Path, bytes]]:
    """Of files that were not synced: all bytes, what is certain, half, zeros; and each file alone without its bytes."""
    certain = {path: file.certain for path, file in files.items()}
    seen = {path: file.seen for path, file in files.items()}
    yield seen
    yield certain
    yield seen | {path: b"" for path in dirty if files[path].was_emptied}
    yield seen | {path: _half(seen[path], certain[path]) for path in dirty}
    yield seen | {path: _zeros(seen[path], certain[path]) for path in dirty}
    for path in dirty[-_MAX_CHANGES:]:
        yield seen | {path: certain[path]}


@cache
def _half(seen: bytes, certain: bytes) -> bytes:
    """As a file would be with half of what was written since it was synced."""
    same = next((i for i, (a, b) in enumerate(zip(seen, certain, strict=False)) if a != b), len(certain))
    return seen[: (same + len(seen)) // 2]


@cache
def _zeros(seen: bytes, certain: bytes) -> bytes:
    """As a file would be that has its length, and nothing of what was written since it was synced."""
    return certain.ljust(len(seen), b"\0")


def _written(content: bytes, operation: Operation) -> bytes:
    offset = operation.offset
    if operation.name == "truncate":
        return b""
    if operation.name in ("resize", "allocate"):
        longer = content.ljust(offset, b"\0")
        return longer[:offset] if operation.name == "resize" else longer
    return content[:offset].ljust(offset, b"\0") + operation.data + content[offset + len(operation.data) :]


def shape_of(content: dict[Path, bytes]) -> int:
    """The same for the same content, in one process; Python keeps the hash of bytes that are there already."""
    return hash(frozenset(content.items()))
