"""Delivery of the present weights to one server: sent if it lacks them, verified, never over another run's."""

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
from alignlab.rollout.verification import check_arrived
from alignlab.rollout.vllm.client import ServerLost, VLLMServer
from alignlab.rollout.vllm.protocol import digest_of_all, run_of

logger = logging.getLogger(__name__)
LEASE_S = 30.0
"""Seconds without use after which another run may take a server over."""


@dataclass(frozen=True)
class SentWeights:
    """The weights of the last update, sent again to a server that returns.

    Attributes:
        version: `weights_version`.
        path: a safetensors file; None if they are broadcast, and on a rank that does not send.
        digests: of the tensors, as a server has to report them; empty on a rank that does not send.
        is_adapter: the tensors are an adapter's.
    """

    version: str
    path: Path | None
    digests: Mapping[str, str]
    is_adapter: bool


class WeightDelivery:
    """Delivers the present weights of a run to its servers.

    Args:
        run: name of the run in its weights' versions.
        describe: asks a server to describe itself, and checks the description.
        settings: how long to wait for a server that another run is using.

    Attributes:
        sent: the present weights; None before the first update.
    """

    def __init__(
        self, run: str, describe: Callable[[VLLMServer], Awaitable[dict[str, Any]]], settings: VLLMServerSettings
    ) -> None:
        self.sent: SentWeights | None = None
        self._run, self._describe, self._settings = run, describe, settings

    async def deliver(self, server: VLLMServer, about: Mapping[str, Any], *, may_take_over: bool) -> str | None:
        """Give a server the present weights if it lacks them.

        Args:
            about: the server's description of itself.
            may_take_over: the server may be taken over from a run that uses it no more.

        Returns:
            The weights' version; None if the server lacks them, and gets the next ones, or these from another rank.

        Raises:
            RolloutError: a tensor did not arrive as it was sent, or another run has taken the server over.
            ConfigError: another run is using the server.
            ServerLost: the server died, or holds other tensors under the present version.
        """
        sent = self.sent
        assert sent is not None
        if about["version"] == sent.version:
            # An earlier upload may have succeeded, and its answer have been lost.
            if sent.digests and about["digest"] != digest_of_all(sent.digests):
                raise ServerLost("the tensors that it holds are not those that were sent")
            return sent.version
        if sent.path is None:
            return None
        await self.require_no_other_run(server, about, may_take_over=may_take_over)
        arrived = await server.put(sent.version, sent.path)
        try:
            check_arrived(sent.digests, arrived)
        except RolloutError as error:
            raise RolloutError(f"server {server.address}: {error}") from error
        return sent.version

    async def require_no_other_run(
        self, server: VLLMServer, about: Mapping[str, Any], *, may_take_over: bool
    ) -> None:
        """Wait until no other run uses a server; see `deliver`."""
        until, has_warned = time.monotonic() + self._settings.reconnect_s, False
        while (version := about["version"]) is not None and run_of(version) != self._run:
            if not may_take_over:
                raise RolloutError(
                    f"the server {server.address} holds the weights of another run ({version}); give each run its own "
                    "servers"
                )
            if about["idle_s"] > LEASE_S:
                return
            if time.monotonic() >= until:
                raise ConfigError(
                    f"the server {server.address} was used by another run {about['idle_s']:.0f} s ago; end that run, "
                    "or name other servers in trainer.rollout.servers"
                )
            if not has_warned:
                has_warned = True
                logger.warning(
                    "waiting up to %g s for the server %s, which another run uses", self._settings.reconnect_s,
                    server.address,
                )  # fmt: skip
            await asyncio.sleep(min(self._settings.health_every_s, 1.0))
            about = await self._describe(server)


async def delivery_error(work: Callable[[VLLMServer], Awaitable[None]], server: VLLMServer) -> Exception | None:
    """Do a server's part of an update; return the error that prevented it."""
    try:
        await work(server)
    except (ServerLost, RolloutError, ConfigError, OSError) as error:
        return error
    return None
