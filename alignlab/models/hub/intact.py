"""Checks that folders of models and adapters, if alignlab wrote them, are as they were written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.errors import AlignlabError, CheckpointError
from alignlab.files.manifest import MODEL_MANIFEST, find_damage, has_manifest

_intact: dict[Path, tuple[tuple[str, int, int], ...]] = {}
"""Folders that this process has verified, with the sizes and times of their files at that time."""


def check_folder(path: str | Path) -> None:
    """Raise if a folder that alignlab wrote has changed since; a folder without a manifest is not checked.

    Raises:
        CheckpointError: with the damaged file and the fix.
    """
    if not has_manifest(Path(path)):
        return
    damage = damage_of(path)
    if damage is not None:
        raise CheckpointError(
            f"{damage}; copy the folder again, or make it again. If you have changed it yourself, remove its "
            f"{MODEL_MANIFEST}"
        )


def is_intact(path: str | Path) -> bool:
    """Return True if a folder has a manifest and is as it was written."""
    return damage_of(path) is None


def damage_of(path: str | Path) -> str | None:
    """Return the damage of a folder that alignlab wrote, such as a missing manifest; None if it is as it was written.

    Each process reads a folder whole once, and again when a file in it has changed.
    """
    folder = Path(path).resolve()
    state = _state(folder)
    if _intact.get(folder) == state:
        return None
    damage = find_damage(folder)
    if damage is None:
        _intact[folder] = state
    return damage


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stats = [(str(file), file.stat()) for file in files]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@contextmanager
def named_errors(problem: str, fix: str) -> Iterator[None]:
    """Turn any error that a library raises for a damaged file into a `CheckpointError`.

    Args:
        problem: first part of the message, such as "x cannot be loaded".
        fix: last part of the message, a sentence.

    Raises:
        CheckpointError: in place of any error that is not alignlab's own.
    """
    try:
        yield
    except AlignlabError:
        raise
    except Exception as error:
        is_readable = isinstance(error, OSError | ValueError | RuntimeError) and str(error)
        reason = str(error) if is_readable else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{problem}: {reason}\n{fix}") from error
