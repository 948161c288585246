"""ASGI, as far as our middleware needs it: refusals, and request bodies of a bounded size, time and depth."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import anyio

MAX_BODY_BYTES = 32 * 2**20
"""Of any request but new weights; a prompt of a million tokens needs a fifth of it."""
MAX_NESTING = 64
BODY_S = 60.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refusal(Exception):
    """A request is refused.

    Attributes:
        status: HTTP status, 400 to 599.
        message: reason, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


async def answer_refusal(send: Send, refusal: Refusal) -> None:
    """Answer with the refusal, and end the connection: the rest of the body is not read."""
    body = json.dumps({"error": refusal.message}).encode()
    head = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": refusal.status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def declared_length(scope: Scope) -> int | None:
    """Return the length that a request declares for its body, bytes: 0 without a body, None if sent in chunks.

    Raises:
        Refusal: the length is not a number, or is given twice with different values.
    """
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    if any(name == b"transfer-encoding" for name, _ in headers):
        return None
    lengths = {value.strip() for name, value in headers if name == b"content-length"}
    if not lengths:
        return 0
    if len(lengths) > 1 or not all(length.isdigit() and len(length) < 20 for length in lengths):
        raise Refusal(400, "Content-Length must be one whole number of bytes")
    return int(lengths.pop())


async def bounded_body(scope: Scope, receive: Receive, *, max_bytes: int = MAX_BODY_BYTES) -> Receive:
    """Receive a request's body whole, before anybody parses it; return a `Receive` that passes it on.

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
            body = await _whole_body(receive, max_bytes)
    except TimeoutError as error:
        raise Refusal(408, f"the request's body did not arrive whole within {BODY_S:g} s") from error
    if nested_too_deeply(body):
        raise Refusal(400, f"the request's JSON must be nested at most {MAX_NESTING} deep")
    return _replayed(body, receive)


async def _whole_body(receive: Receive, max_bytes: int) -> bytes:
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
    """Return a `Receive` that gives the body once, and then the end of the connection."""
    is_given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def nested_too_deeply(body: bytes) -> bool:
    """Return True for JSON nested deeper than `MAX_NESTING`: parsers and validators would recurse too far."""
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return False
    try:
        containers = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:
        return False  # not JSON at all; the endpoint will say so
    for _ in range(MAX_NESTING):
        inner = (value for outer in containers for value in _values(outer))
        containers = [value for value in inner if isinstance(value, list | dict)]
    return bool(containers)


def _values(container: Any) -> Iterable[Any]:
    """Return the values directly inside a JSON object or array."""
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list) else ()
