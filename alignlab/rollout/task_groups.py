"""Concurrent tasks that fail together, with the first error."""

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
    """Run tasks together; the first error cancels the other tasks, and is raised outside of any group."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


async def run_all(function: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
    """Return the results of `function` for all items, in order, computed concurrently.

    The first error cancels the other calls, and is raised.
    """
    results: dict[int, R] = {}

    async def call(index: int, item: T) -> None:
        results[index] = await function(item)

    async with task_group() as group:
        for index, item in enumerate(items):
            group.start_soon(call, index, item)
    return [results[index] for index in range(len(items))]
