"""Several things done at once, of which one may fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup

T = TypeVar("T")
R = TypeVar("R")


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """Tasks that end together: the first error ends the others, and is raised as it is."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


async def each(function: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
    """What `function` gives for each item, in order, all at once; the first error ends the others, and is raised."""
    results: dict[int, R] = {}

    async def keep(index: int, item: T) -> None:
        results[index] = await function(item)

    async with task_group() as group:
        for index, item in enumerate(items):
            group.start_soon(keep, index, item)
    return [results[index] for index in range(len(items))]
