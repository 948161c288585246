"""The token that every request to a server must bear: whoever has it can replace the weights."""

from __future__ import annotations

import hmac
import json
import math
import os
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from alignlab.models.packaged import cache_folder

VARIABLE = "ALIGNLAB_SERVER_TOKEN"
SERVED_NAME = "policy"
"""As what a server knows the weights that it was given whole."""
OPEN_PATHS = ("/health",)  # says that the server lives, and nothing else
_USES = ("/inference", "/alignlab/weights")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def server_token() -> str:
    """The token in `$ALIGNLAB_SERVER_TOKEN` or, where trainer and servers are one user's on one file system, of a file
    that only this user reads, made on first use."""
    given = os.environ.get(VARIABLE)
    if given:
        return given
    path = cache_folder() / "server-token"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    with os.fdopen(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
    try:
        os.link(unfinished, path)  # fails where there is one, and is never half written
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()
    return path.read_text().strip()


class TokenGuard:
    """Middleware of a server: refuses every request without the token.

    Attributes:
        last_used: when a request came that uses the weights, by `time.monotonic`, of this process.
    """

    last_used = -math.inf

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[VARIABLE]}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._bears_token(scope):
            if scope["type"] == "http" and scope["path"].startswith(_USES):
                TokenGuard.last_used = time.monotonic()
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            body = json.dumps({"error": f"the request does not bear the server's token, see ${VARIABLE}"}).encode()
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": head})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _bears_token(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
