"""Rows written after the mechanism, in one go, to find what it did not know."""

HELD_OUT: dict[str, list[tuple[str, str, float]]] = {}
