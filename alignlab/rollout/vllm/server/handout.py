"""How a server comes by the present weights: sent unless it has them, proved whole, never over another run's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.vllm.server.client import ServerLost, VLLMServer
from alignlab.rollout.vllm.server.identity import digest_of_all
from alignlab.rollout.weight_proof import check_arrived

logger = logging.getLogger(__name__)
LEASE_S = 30.0
"""Another run may take a server over that was not used for so long."""


@dataclass(frozen=True)
class SentWeights:
    """What servers were given last, to be given to one that comes back.

    Attributes:
        version: this run's name, the policy's version, and how many updates there were, dashes between.
        path: a safetensors file; None on a rank that does not send.
        digests: of its tensors, as they must arrive; empty on a rank that does not send.
        adapter: they are an adapter's.
    """

    version: str
    path: Path | None
    digests: Mapping[str, str]
    adapter: bool


class Handout:
    """Gives servers the present weights.

    Args:
        run: of whose weights these are.
        introduce: asks a server what it is.
        settings: how long to wait for a server that another run is using.

    Attributes:
        sent: the present weights; None before the first.
    """

    def __init__(
        self, run: str, introduce: Callable[[VLLMServer], Awaitable[dict[str, Any]]], settings: VLLMServerSettings
    ) -> None:
        self.sent: SentWeights | None = None
        self._run, self._introduce, self._settings = run, introduce, settings

    async def give(self, server: VLLMServer, about: Mapping[str, Any], *, first: bool) -> str | None:
        """See that a server has the weights, and return their version; None where another rank is to send them.

        Args:
            about: what the server says of itself.
            first: it may be taken over from another run.

        Raises:
            RolloutError: something did not arrive whole, or the server has become another run's.
            ConfigError: another run is using it.
            ServerLost: it died, or holds something else under the version.
        """
        sent = self.sent
        assert sent is not None
        if about["version"] == sent.version:
            if sent.digests and about["digest"] != digest_of_all(sent.digests):  # it took them, and could not say so
                raise ServerLost("what it has of the weights is not what was sent")
            return sent.version
        if sent.path is None:
            return None
        await self._require_ours(server, about, first=first)
        arrived = await server.put(sent.version, sent.path)
        try:
            check_arrived(sent.digests, arrived)
        except RolloutError as error:
            raise RolloutError(f"server {server.address}: {error}") from error
        return sent.version

    async def _require_ours(self, server: VLLMServer, about: Mapping[str, Any], *, first: bool) -> None:
        """See that nobody else is using a server."""
        until, has_said_so = time.monotonic() + self._settings.reconnect_s, False
        while (held := about["version"]) is not None and held.partition("-")[0] != self._run:
            if not first:
                raise RolloutError(
                    f"the server {server.address} holds the weights of another run ({held}); give each run its own "
                    "servers"
                )
            if about["idle_s"] > LEASE_S:
                return
            if time.monotonic() >= until:
                raise ConfigError(
                    f"the server {server.address} was used by another run {about['idle_s']:.0f} s ago; end that run, "
                    "or name other servers in trainer.rollout.servers"
                )
            if not has_said_so:
                has_said_so = True
                logger.warning(
                    "waiting up to %g s for the server %s, which another run uses", self._settings.reconnect_s,
                    server.address,
                )  # fmt: skip
            await asyncio.sleep(min(self._settings.health_every_s, 1.0))
            about = await self._introduce(server)
