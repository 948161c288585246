"""HTTP requests with a deadline for the whole exchange, and answers of a bounded size.

The time limits of HTTP clients apply to each read, so a server that sends a byte now and then would never exceed them.
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

from alignlab.network.addresses import HIDDEN

_MAX_ERROR_BYTES = 64 * 2**10
_EXCERPT_CHARACTERS = 200
PLAIN = {"Accept-Encoding": "identity"}
"""Header that asks for uncompressed answers; a compressed one is unpacked piece by piece, within the limit."""
OK = 200


class TooLargeError(Exception):
    """An answer is larger than the limit."""


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Attributes:
        status: HTTP status.
        headers: HTTP headers.
        content: the body, unpacked; at most the first 64 KiB if the status is not 200.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ValueError: it is no JSON, or nested too deeply.
        """
        try:
            return json.loads(self.content)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def excerpt(self, *secrets: str) -> str:
        """Return the beginning of the body on one line, with secrets that the server repeats hidden."""
        return excerpt(self.content, *secrets)


async def exchange(
    http: httpx2.AsyncClient, method: str, url: str, *, deadline_s: float, max_bytes: int, **options: Any
) -> Reply:
    """Send a request and receive its whole answer.

    Args:
        deadline_s: seconds for connecting, sending and receiving the last byte, together.
        max_bytes: largest size of the unpacked body.
        options: further arguments of `httpx2.AsyncClient.stream`.

    Raises:
        TimeoutError: the deadline has passed.
        TooLargeError: the body is larger than `max_bytes`.
        httpx2.HTTPError, httpx2.InvalidURL: the exchange fails otherwise.
    """
    with anyio.fail_after(deadline_s):
        async with http.stream(method, url, **options) as response:
            limit = max_bytes if response.status_code == OK else _MAX_ERROR_BYTES
            content = bytearray()
            async with contextlib.aclosing(response.aiter_bytes()) as chunks:
                async for chunk in chunks:
                    content += chunk
                    if len(content) > limit:
                        break
            if len(content) > limit and response.status_code == OK:
                raise TooLargeError(f"it answers with more than {max_bytes:,} bytes")
            return Reply(response.status_code, response.headers, bytes(content[:limit]))


def excerpt(content: bytes, *secrets: str) -> str:
    """Return the beginning of a text on one line, with secrets hidden and without control characters."""
    text = content[: 16 * _EXCERPT_CHARACTERS].decode("utf-8", errors="replace")
    for secret in secrets:
        text = text.replace(secret, HIDDEN) if secret else text
    line = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(line.split())
    return line if len(line) <= _EXCERPT_CHARACTERS else f"{line[:_EXCERPT_CHARACTERS]} ..."


def retry_after(headers: Mapping[str, str], *, longest_s: float) -> float:
    """Return the seconds after which a server wants to be asked again, at most `longest_s`; 0 if it does not say."""
    text = headers.get("retry-after", "").strip()
    try:
        wait = float(text)
    except ValueError:
        try:
            wait = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(wait, 0.0), longest_s) if math.isfinite(wait) else 0.0
