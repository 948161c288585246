"""Folders of models and adapters that alignlab wrote, which hold a manifest, are what was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.errors import AlignlabError, CheckpointError
from alignlab.manifest import MODEL_MANIFEST, find_damage, has_manifest

_intact: dict[Path, tuple[tuple[str, int, int], ...]] = {}
"""Folders that this process has read whole, with the sizes and times of their files then."""


def check_folder(path: str | Path) -> None:
    """Raise if a folder that alignlab wrote is not as it was written; one without a manifest is not looked at.

    Raises:
        CheckpointError: with the file, and what to do.
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
    """Return whether a folder has a manifest and is as it was written."""
    return damage_of(path) is None


def damage_of(path: str | Path) -> str | None:
    """Return what is wrong with a folder that alignlab wrote, a missing manifest too; None if it is as it was written.

    A folder is read whole once a process, and again when a file in it has changed.
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
def named_errors(what: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file, which is any kind of error, into one with a name.

    Args:
        what: cannot be done.
        fix: what to do, as a sentence.

    Raises:
        CheckpointError: in the place of any error that is not alignlab's.
    """
    try:
        yield
    except AlignlabError:
        raise
    except Exception as error:
        speaks = isinstance(error, OSError | ValueError | RuntimeError) and str(error)
        reason = str(error) if speaks else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{what}: {reason}\n{fix}") from error
