"""Bodies of requests, received whole before anybody parses them: of a bounded size, in a bounded time."""

from __future__ import annotations

import json
from collections.abc import Iterable, MutableMapping
from typing import Any

import anyio

from alignlab.rollout.vllm.server.asgi import Receive, Refusal, Scope, declared_length

MAX_BODY_BYTES = 32 * 2**20
"""Of any request but new weights: a prompt of a million tokens is a fifth of it."""
MAX_NESTING = 64
BODY_S = 60.0


async def bounded_body(scope: Scope, receive: Receive, *, max_bytes: int = MAX_BODY_BYTES) -> Receive:
    """Receive a request's body, and return what gives it to the application.

    Raises:
        Refusal: the body is too large, too slow, broken off, or JSON that is nested too deeply.
    """
    length = declared_length(scope)
    if length is not None and length > max_bytes:
        raise _too_large(max_bytes)
    if length == 0:
        return receive
    try:
        with anyio.fail_after(BODY_S):
            body = await _whole(receive, max_bytes)
    except TimeoutError as error:
        raise Refusal(408, f"the request's body did not arrive whole within {BODY_S:g} s") from error
    if nested_too_deeply(body):
        raise Refusal(400, f"the request's JSON must be nested at most {MAX_NESTING} deep")
    return _replayed(body, receive)


async def _whole(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal(400, "the request's body broke off")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, f"the request's body must have at most {max_bytes:,} bytes")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, and then what comes after it, which is the end of the connection."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def nested_too_deeply(body: bytes) -> bool:
    """Return True for JSON nested deeper than `MAX_NESTING`, which makes parsers and validators recurse too far."""
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return False
    try:
        containers = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:
        return False  # no JSON at all, as its endpoint will say
    for _ in range(MAX_NESTING):
        inner = (value for outer in containers for value in _values(outer))
        containers = [value for value in inner if isinstance(value, list | dict)]
    return bool(containers)


def _values(container: Any) -> Iterable[Any]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list) else ()
