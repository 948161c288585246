"""The little of ASGI that middleware needs, and how a request is refused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP, 400 to 599.
        message: why, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


async def answer_refusal(send: Send, refusal: Refusal) -> None:
    """Answer with the refusal, and let the connection end: what is left of the body is not read."""
    body = json.dumps({"error": refusal.message}).encode()
    head = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": refusal.status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def declared_length(scope: Scope) -> int | None:
    """Return the length that a request's head declares for its body, 0 where it has none; None of one sent in chunks.

    Raises:
        Refusal: the length is no number, or given twice.
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
