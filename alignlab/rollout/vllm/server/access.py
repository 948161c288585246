"""The token that every request to a server must bear: whoever has it can replace the weights."""

from __future__ import annotations

import hmac
import logging
import math
import os
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from alignlab.addresses import leads_to_loopback
from alignlab.credentials import checked_token, environment_token, token_file
from alignlab.models.packaged import cache_folder
from alignlab.rollout.vllm.server.asgi import App, Receive, Refusal, Scope, Send, answer_refusal
from alignlab.rollout.vllm.server.bodies import bounded_body

logger = logging.getLogger(__name__)
VARIABLE = "ALIGNLAB_SERVER_TOKEN"
SERVED_NAME = "policy"
"""As what a server knows the weights that it was given whole."""
OPEN_PATHS = ("/health",)  # says that the server lives, and nothing else
UPLOAD_PATH = "/alignlab/weights/"
_USES = ("/inference", "/alignlab/weights")


def server_token() -> str:
    """Return the token in `$ALIGNLAB_SERVER_TOKEN` or, without it, of a file that this user alone reads.

    The file is made on first use, and serves where trainer and servers are one user's on one file system.

    Raises:
        ConfigError: it is blank or short, or others may have read or written it.
        DiskError: the file can be neither read nor made.
    """
    given = environment_token(VARIABLE)
    return (given or token_file(cache_folder() / "server-token")).get_secret_value()


def warn_of_open_ways(addresses: Sequence[str]) -> None:
    """Warn of servers beyond this machine: token, prompts and weights travel there as anybody on the way can read."""
    away = [address for address in addresses if not leads_to_loopback(urlsplit(address).hostname or "")]
    if away:
        logger.warning(
            "token, prompts and weights travel unencrypted to %s; use a network that you trust, or tunnels to this "
            "machine (ssh -L)",
            ", ".join(away),
        )


class TokenGuard:
    """Middleware of a server: refuses every request without the token, and bodies without an end.

    Attributes:
        last_used: when a request came that uses the weights, by `time.monotonic`, of this process.

    Raises:
        ConfigError: `$ALIGNLAB_SERVER_TOKEN` holds no token.
    """

    last_used = -math.inf

    def __init__(self, app: App) -> None:
        self._app = app
        place, fix = f"the environment variable {VARIABLE}", "start the server by alignlab serve"
        token = checked_token(os.environ.get(VARIABLE, ""), place, fix)
        self._expected = f"Bearer {token.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401, or 4xx for a body that cannot be taken."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                receive = await self._admitted(scope, receive)
            except Refusal as refusal:
                await answer_refusal(send, refusal)
                return
            await self._app(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive) -> Receive:
        """Return where the request's body comes from.

        Raises:
            Refusal: the request is not to be answered.
        """
        if scope["path"] in OPEN_PATHS:
            return await bounded_body(scope, receive, max_bytes=0)
        if not self._bears_token(scope):
            raise Refusal(401, f"the request does not bear the server's token, see ${VARIABLE}")
        if scope["path"].startswith(_USES):
            TokenGuard.last_used = time.monotonic()
        if scope["path"].startswith(UPLOAD_PATH):
            return receive  # its endpoint bounds it by the model's size
        return await bounded_body(scope, receive)

    def _bears_token(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
