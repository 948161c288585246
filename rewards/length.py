"""Reward for a completion whose length is within limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignlab_rewards.answers.options import check_whole


def length(
    *,
    completion_ids: Sequence[Sequence[int]],
    min_tokens: int = 0,
    max_tokens: int | None = None,
    falloff_tokens: int = 32,
    **columns: Any,
) -> list[float | None]:
    """Return 1.0 from `min_tokens` to `max_tokens`, falling in a straight line to 0.0 at `falloff_tokens` outside.

    Args:
        completion_ids: sampled tokens of each completion, the end token included.
        min_tokens, max_tokens: the limits, both allowed lengths; equal, they are a target. None is no upper limit.
        falloff_tokens: distance from the limits at which the value reaches 0, >= 1.
        columns: unused.
    """
    for name, value in (("min_tokens", min_tokens), ("max_tokens", max_tokens), ("falloff_tokens", falloff_tokens)):
        if name != "max_tokens" or value is not None:
            check_whole("length", name, value)
    if min_tokens < 0 or falloff_tokens < 1 or (max_tokens is not None and max_tokens < min_tokens):
        raise ValueError(
            "length needs 0 <= min_tokens <= max_tokens and falloff_tokens >= 1, and got "
            f"min_tokens={min_tokens}, max_tokens={max_tokens}, falloff_tokens={falloff_tokens}"
        )
    values: list[float | None] = []
    for ids in completion_ids:
        below = min_tokens - len(ids)
        above = 0 if max_tokens is None else len(ids) - max_tokens
        values.append(max(0.0, 1.0 - max(below, above, 0) / falloff_tokens))
    return values
