"""Middleware of a server that answers nobody without the token."""

from __future__ import annotations

import hmac
import math
import os
import time

from alignlab.network.credentials import checked_token
from alignlab.rollout.vllm.inside.asgi import App, Receive, Refusal, Scope, Send, answer_refusal, bounded_body
from alignlab.rollout.vllm.protocol import BROADCAST_PATH, HEALTH_PATH, TOKEN_VARIABLE, WEIGHTS_PATH

_PATHS_IN_USE = ("/inference", WEIGHTS_PATH, BROADCAST_PATH)


class TokenGuard:
    """Middleware that refuses every request without the token, and every body without an end.

    Attributes:
        last_used: when a request that uses the weights came last, by `time.monotonic`; shared by this process.

    Raises:
        ConfigError: `$ALIGNLAB_SERVER_TOKEN` holds no token.
    """

    last_used = -math.inf

    def __init__(self, app: App) -> None:
        self._app = app
        place, fix = f"the environment variable {TOKEN_VARIABLE}", "start the server by alignlab serve"
        token = checked_token(os.environ.get(TOKEN_VARIABLE, ""), place, fix)
        self._expected = f"Bearer {token.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; or answer 401, or 4xx for a body that is not accepted."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                receive = await self._checked_body(scope, receive)
            except Refusal as refusal:
                await answer_refusal(send, refusal)
                return
            await self._app(scope, receive, send)

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """Return the source of the request's body.

        Raises:
            Refusal: the request is not to be answered.
        """
        path = scope["path"]
        if path == HEALTH_PATH:
            return await bounded_body(scope, receive, max_bytes=0)
        if not self._has_token(scope):
            raise Refusal(401, f"the request does not carry the server's token, see ${TOKEN_VARIABLE}")
        if path.startswith(_PATHS_IN_USE):
            TokenGuard.last_used = time.monotonic()
        if path.startswith(f"{WEIGHTS_PATH}/"):
            return receive  # the endpoint bounds it by the model's size
        return await bounded_body(scope, receive)

    def _has_token(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)
