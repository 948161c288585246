"""HTTP requests that end: a deadline for the whole exchange, and answers of a bounded size.

An HTTP client's own time limits are for each read, so that a server that sends a byte now and then outlives them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import anyio
import httpx2

from alignlab.addresses import HIDDEN

_MAX_ERROR_BYTES = 64 * 2**10
_EXCERPT_CHARACTERS = 200
PLAIN = {"Accept-Encoding": "identity"}
"""Asks for answers that are not packed; one that is packed anyway is unpacked piece by piece, within the limit."""
OK = 200


class TooLargeError(Exception):
    """An answer is larger than anything that was asked for."""


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Attributes:
        status: of HTTP.
        headers: of the answer.
        content: the body, unpacked; of an answer with another status than 200 at most its first 64 KiB.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ValueError: it is none, or nested without an end.
        """
        try:
            return json.loads(self.content)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def excerpt(self, *secrets: str) -> str:
        """Return the beginning of the body on one line, without secrets that the server repeats."""
        return excerpt(self.content, *secrets)


async def exchange(
    http: httpx2.AsyncClient, method: str, url: str, *, deadline_s: float, max_bytes: int, **options: Any
) -> Reply:
    """Send a request and receive its whole answer.

    Args:
        deadline_s: for all of it: connecting, sending, and receiving the last byte.
        max_bytes: of the unpacked body.
        options: of `httpx2.AsyncClient.stream`.

    Raises:
        TimeoutError: the deadline has passed.
        TooLargeError: the body is larger.
        httpx2.HTTPError, httpx2.InvalidURL: the exchange fails otherwise.
    """
    with anyio.fail_after(deadline_s):
        async with http.stream(method, url, **options) as response:
            limit = max_bytes if response.status_code == OK else _MAX_ERROR_BYTES
            content = bytearray()
            async with contextlib.aclosing(response.aiter_bytes()) as parts:
                async for part in parts:
                    content += part
                    if len(content) > limit:
                        break
            if len(content) > limit and response.status_code == OK:
                raise TooLargeError(f"it answers with more than {max_bytes:,} bytes")
            return Reply(response.status_code, response.headers, bytes(content[:limit]))


def excerpt(content: bytes, *secrets: str) -> str:
    """Return the beginning of a text on one line, without secrets and without characters that a terminal obeys."""
    text = content[: 16 * _EXCERPT_CHARACTERS].decode("utf-8", errors="replace")
    for secret in secrets:
        text = text.replace(secret, HIDDEN) if secret else text
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    line = " ".join(line.split())
    return line if len(line) <= _EXCERPT_CHARACTERS else f"{line[:_EXCERPT_CHARACTERS]} ..."


def retry_after(headers: Mapping[str, str], *, longest_s: float) -> float:
    """Return the seconds that a server asks to be left alone, at most `longest_s`; 0 where it asks nothing."""
    text = headers.get("retry-after", "").strip()
    try:
        wait = float(text)
    except ValueError:
        try:
            wait = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(wait, 0.0), longest_s) if math.isfinite(wait) else 0.0
