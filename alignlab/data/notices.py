"""Warnings about rows of a dataset: each kind is logged once, with the number of the first such row."""

from __future__ import annotations

import copy
import logging
from typing import Self

logger = logging.getLogger("alignlab.data")


class Notices:
    """Logs each kind of notice once, for all rows of a dataset.

    Args:
        source: name of the dataset.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._said: set[str] = set()  # shared by the rows
        self._row: int | None = None

    def of_row(self, index: int) -> Self:
        """Return notices that name a row, and share with these which kinds are logged."""
        notices = copy.copy(self)
        notices._row = index
        return notices

    def was_said(self, kind: str) -> bool:
        """Return True if a notice of this kind is logged already."""
        return kind in self._said

    def say(self, kind: str, message: str, *values: object) -> None:
        """Log a notice, unless one of its kind is logged already."""
        if kind in self._said:
            return
        self._said.add(kind)
        where = "" if self._row is None else f", row {self._row} (the first such; the first of all is 0)"
        logger.warning("%s%s: " + message, self._source, where, *values)
