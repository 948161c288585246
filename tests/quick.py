"""What a run does around its training, and takes longer than a tiny training: left out of most tests.

Curves are drawn in the tests of curves alone. Files reach the disk by the operating system: no machine fails here, and
the tests of what is synced, and when, look at that themselves. The versions of packages and the commit of the sources
are asked for once in a process.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def draw_nothing(*arguments: Any, **options: Any) -> bool:
    """Take the place of `plot_curves` in reports; there is nothing to draw."""
    return False


def sync_nothing(descriptor: int) -> None:
    """Take the place of `os.fsync`."""


def replacements() -> list[tuple[Any, str, Any]]:
    """Return what is replaced: the holder of each name, the name, and what takes its place."""
    from alignlab.evaluation import report
    from alignlab.runs import provenance

    return [
        (report, "plot_curves", draw_nothing), (os, "fsync", sync_nothing),
        (provenance, "_version", cache(provenance._version)),
        (provenance, "source_commit", cache(provenance.source_commit)),
    ]  # fmt: skip


def be_quick() -> None:
    """Leave all this out of this process."""
    for holder, name, replacement in replacements():
        setattr(holder, name, replacement)
