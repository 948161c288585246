"""Several servers as one: requests balanced, servers watched, lost servers survived and counted.

Every server offers as many slots as it decodes sequences together, and a request takes the first free slot, so that a
slow server gets fewer requests. A server is lost when a connection breaks, a request times out, or its health checks
fail; its requests are sent again to other servers, with the same seeds. The server is back once it answers and has the
weights of the last update, which it is sent again if it was restarted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import anyio

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.task_groups import run_all, task_group
from alignlab.rollout.vllm.abandonable_loop import AbandonableLoop
from alignlab.rollout.vllm.access import server_token, warn_of_unencrypted_ways
from alignlab.rollout.vllm.client import MAX_VOCAB_SIZE, ServerFaulty, ServerLost, VLLMServer, http_client
from alignlab.rollout.vllm.completions import Answer, Request
from alignlab.rollout.vllm.slots import Slots
from alignlab.rollout.vllm.weight_delivery import SentWeights, WeightDelivery, delivery_error

logger = logging.getLogger(__name__)
MAX_MISSED = 3
MAX_ATTEMPTS = 8
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0


class ServerPool:
    """The servers of a run. Public methods block, and may be called from any thread.

    Args:
        settings: addresses and deadlines.
        check: raises ConfigError for (address, description) of a server that cannot generate for this run.
        sparse_layers: layers whose experts are recorded.
        run: name of this run in its weights' versions.
        rank: of this process.
        vocab_size: token ids are below it.

    Attributes:
        counts: "lost" and "returned" servers, "reissued" requests, and "faulty" answers.
    """

    def __init__(
        self, settings: VLLMServerSettings, check: Callable[[str, Mapping[str, Any]], None], sparse_layers: list[int],
        *, run: str, rank: int, vocab_size: int | None = None,
    ) -> None:
        self.run = run
        self.counts: Counter[str] = Counter()
        self._settings, self._check, self._sparse_layers, self._rank = settings, check, sparse_layers, rank
        token = server_token()
        self._http = http_client(token)
        self._servers = [
            VLLMServer(
                address, self._http, timeout_s=settings.request_timeout_s, token=token,
                vocab_size=vocab_size or MAX_VOCAB_SIZE,
            )
            for address in settings.servers
        ]  # fmt: skip
        warn_of_unencrypted_ways(settings.servers)
        self._slots = Slots(self._servers, settings.max_running)
        self._delivery = WeightDelivery(run, self._describe, settings)
        self._num_requests = 0
        self._last_loss = ""
        self._warnings: set[str] = set()  # given since the last update
        self._loop = AbandonableLoop("alignlab-servers")
        self._readmissions: dict[VLLMServer, asyncio.Task[None]] = {}

    @property
    def alive(self) -> list[VLLMServer]:
        """Servers that requests go to."""
        return [server for server in self._servers if server.is_alive]

    def open(self) -> dict[str, dict[str, Any]]:
        """Wait until all servers answer, or some do and `reconnect_s` is over; return their descriptions by address.

        Raises:
            ConfigError: no server answers, or one cannot generate for this run.
        """
        return self._loop.run(self._open())

    def put(self, sent: SentWeights) -> None:
        """Give new weights to all servers, lost ones included. `sent.path` must last until the next call.

        Raises:
            RolloutError: a tensor did not arrive as it was sent, or no server took the weights within `reconnect_s`.
            ConfigError: another run is using a server.
        """
        self._loop.run(self._put(sent))

    def ready(self, sent: SentWeights) -> list[tuple[VLLMServer, dict[str, Any]]]:
        """Begin to broadcast new weights; return (server, its description) of all servers that can take part.

        Raises:
            RolloutError, ConfigError: see `put`.
        """
        return self._loop.run(self._ready(sent))

    def start_taking(
        self, servers: Sequence[VLLMServer], take: Callable[[VLLMServer], Awaitable[str]]
    ) -> Future[list[Exception | None]]:
        """Begin to let servers take weights, all at once, and admit each that has taken them.

        Args:
            take: makes a server take the weights, and returns their version.

        Returns:
            The error of each server, in order; None for one that has the weights.
        """
        return self._loop.start(run_all(partial(self._taking_error, take), servers))

    def expect(self, sent: SentWeights) -> None:
        """Note the weights that another rank has sent, and which servers have them."""
        self._loop.run(self._expect(sent))

    def release(self) -> None:
        """Let other runs take the servers over."""
        self._loop.run(self._release())

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Return one completion for each request, in order.

        Raises:
            RolloutError: a server refuses a request, a request was lost too often, no server is left, or `abandon` was
                called meanwhile.
        """
        return self._loop.run(self._answers(requests))

    def answers_of(self, server: VLLMServer, requests: Sequence[Request]) -> list[Answer]:
        """Return one completion for each request, in order, from one server.

        Raises:
            ServerLost: the server stopped answering.
        """
        return self._loop.run(self._answers_of(server, requests))

    def abandon(self) -> None:
        """Cancel all calls in flight; they raise a RolloutError."""
        self._loop.abandon()

    def close(self) -> None:
        """Cancel all calls in flight, and end all connections."""
        self._loop.close(self._end())

    async def _end(self) -> None:
        await asyncio.gather(*self._readmissions.values(), return_exceptions=True)
        await self._http.aclose()

    async def _open(self) -> dict[str, dict[str, Any]]:
        until = time.monotonic() + self._settings.reconnect_s
        descriptions: dict[str, dict[str, Any]] = {}
        while True:
            for server in self._servers:
                if server.address not in descriptions:
                    try:
                        descriptions[server.address] = await self._describe(server)
                    except ServerLost as error:
                        reason = str(error)
            missing = [server.address for server in self._servers if server.address not in descriptions]
            if not missing or time.monotonic() >= until:
                break
            self._warn_once(f"waiting up to {self._settings.reconnect_s:g} s for the vLLM servers {', '.join(missing)}")
            await self._pause()
        if not descriptions:
            raise ConfigError(
                f"no vLLM server answers at {', '.join(missing)} ({reason}); start them in another terminal: "
                "bash launch/serve_vllm.sh CONFIG, or correct trainer.rollout.servers"
            )
        for address in missing:
            logger.warning("the server %s does not answer; going on without it until the next weight update", address)
        return descriptions

    async def _describe(self, server: VLLMServer) -> dict[str, Any]:
        about = await server.about()
        self._check(server.address, about)
        return about

    async def _pause(self) -> None:
        await asyncio.sleep(min(self._settings.health_every_s, 1.0))

    async def _release(self) -> None:
        await run_all(VLLMServer.release, self.alive)

    async def _expect(self, sent: SentWeights) -> None:
        self._begin_update(sent)
        for server in self._servers:
            await self._readmit(server)
            if server.version != sent.version:
                self._lose(server, ServerLost("it has not been given the present weights"))

    async def _put(self, sent: SentWeights) -> None:
        await self._update(sent, self._deliver)

    async def _ready(self, sent: SentWeights) -> list[tuple[VLLMServer, dict[str, Any]]]:
        abouts: dict[VLLMServer, dict[str, Any]] = {}

        async def describe(server: VLLMServer, *, may_take_over: bool) -> None:
            async with server.delivery_lock:
                abouts[server] = await self._describe(server)
                await self._delivery.require_no_other_run(server, abouts[server], may_take_over=may_take_over)

        return [(server, abouts[server]) for server in await self._update(sent, describe)]

    async def _update(self, sent: SentWeights, work: Callable[..., Awaitable[None]]) -> list[VLLMServer]:
        """Begin an update, and do its work with every server; return those with which it succeeded, at least one."""
        is_first = self._delivery.sent is None
        self._begin_update(sent)
        until = time.monotonic() + self._settings.reconnect_s
        while True:
            errors = await run_all(partial(delivery_error, partial(work, may_take_over=is_first)), self._servers)
            for server, error in zip(self._servers, errors, strict=True):
                if isinstance(error, ServerLost):
                    self._lose(server, error)
                elif error is not None:
                    raise error
            succeeded = [server for server, error in zip(self._servers, errors, strict=True) if error is None]
            if succeeded:
                return succeeded
            if time.monotonic() >= until:
                raise RolloutError(
                    f"no server took the weights of version {sent.version} ({errors[0]}); see what they say, start "
                    "them again, and go on with --resume"
                )
            await self._pause()

    def _begin_update(self, sent: SentWeights) -> None:
        """Note new weights, with which faulty servers get another chance."""
        self._delivery.sent = sent
        self._warnings.clear()
        for server in self._servers:
            server.is_faulty = False

    async def _taking_error(self, take: Callable[[VLLMServer], Awaitable[str]], server: VLLMServer) -> Exception | None:
        async def take_and_admit(server: VLLMServer) -> None:
            async with server.delivery_lock:
                self._admit(server, await take(server))

        error = await delivery_error(take_and_admit, server)
        if isinstance(error, ServerLost) and error.is_gone:
            self._lose(server, error)
        return error

    async def _deliver(self, server: VLLMServer, *, may_take_over: bool) -> None:
        async with server.delivery_lock:
            about = await self._describe(server)
            version = await self._delivery.deliver(server, about, may_take_over=may_take_over)
            if version is not None:
                self._admit(server, version)

    async def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        async with task_group() as group:
            group.start_soon(self._watch)
            answers = await run_all(self._answer, requests)
            group.cancel_scope.cancel()
        return answers

    async def _answers_of(self, server: VLLMServer, requests: Sequence[Request]) -> list[Answer]:
        try:
            return await run_all(partial(self._ask, server), requests)
        except ServerLost as error:
            self._lose(server, error)
            raise

    async def _answer(self, request: Request) -> Answer:
        """Ask server after server for one completion."""
        for attempt in range(MAX_ATTEMPTS):
            slot, server = await self._slots.take()
            try:
                return await self._ask(server, request)
            except ServerLost as error:
                self._lose(server, error)
                self.counts["faulty"] += isinstance(error, ServerFaulty)
                self.counts["reissued"] += 1
                last_loss = f"{server.address}: {error}"
            finally:
                self._slots.give_back(slot)
            longest_s = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
            await asyncio.sleep(random.Random(attempt).uniform(0, longest_s))
        raise RolloutError(
            f"a request of {len(request.token_ids)} prompt tokens was lost {MAX_ATTEMPTS} times, last by {last_loss}; "
            "look at the server's messages, and go on with --resume"
        )

    async def _ask(self, server: VLLMServer, request: Request) -> Answer:
        """Ask one server for one completion, and stop waiting once the server is lost."""
        sent = self._delivery.sent
        assert sent is not None
        self._num_requests += 1
        with anyio.CancelScope() as scope:
            server.calls.add(scope)
            try:
                return await server.complete(
                    request, f"{self.run}-{self._rank}-{self._num_requests}", from_adapter=sent.is_adapter,
                    exact=self._settings.max_staleness == 0, sparse_layers=self._sparse_layers,
                )
            finally:
                server.calls.discard(scope)
        raise ServerLost("it was lost meanwhile")

    def _admit(self, server: VLLMServer, version: str) -> None:
        """Send requests to a server, which has the present weights."""
        server.version = version
        if server.is_alive:
            return
        server.is_alive, server.num_missed, server.is_verified = True, 0, False
        server.generation += 1
        if server.generation > 1:
            self.counts["returned"] += 1
            logger.warning("the server %s is back", server.address)
        self._slots.add(server)

    def _lose(self, server: VLLMServer, reason: Exception) -> None:
        """Send no more requests to a server, and cancel those in flight there."""
        server.is_faulty = server.is_faulty or isinstance(reason, ServerFaulty)
        self._last_loss = f"{server.address}: {reason}"
        if server.is_alive:
            server.is_alive = False
            self.counts["lost"] += 1
            logger.warning("lost the server %s (%s); its requests go to the others", server.address, reason)
            for call in list(server.calls):
                call.cancel()

    def _warn_once(self, text: str) -> None:
        """Log a warning, once until the next update."""
        if text not in self._warnings:
            self._warnings.add(text)
            logger.warning(text)

    async def _watch(self) -> None:
        """Check and readmit servers while requests run.

        Raises:
            RolloutError: no server is left, and none came back within `reconnect_s`.
        """
        none_alive_since: float | None = None
        patience_s = self._settings.reconnect_s
        while True:
            await run_all(self._check_on, self._servers)
            if self.alive:
                none_alive_since = None
            elif none_alive_since is None:
                none_alive_since = time.monotonic()
                self._warn_once(f"no vLLM server is left; waiting up to {patience_s:g} s for one to come back")
            elif time.monotonic() - none_alive_since > patience_s:
                raise RolloutError(
                    f"all {len(self._servers)} vLLM servers are lost, and none came back within reconnect_s "
                    f"({patience_s:g} s; the last that was lost is {self._last_loss}); start them again, and go on "
                    "with --resume"
                )
            await asyncio.sleep(self._settings.health_every_s)

    async def _check_on(self, server: VLLMServer) -> None:
        """Check the health of a server that is alive; start to readmit one that is lost.

        Raises:
            RolloutError: a tensor sent to a returning server did not arrive as it was sent, or another run has taken
                the server over.
            ConfigError: a returning server cannot generate for this run.
        """
        readmission = self._readmissions.get(server)
        if readmission is not None and readmission.done():
            del self._readmissions[server]
            readmission.result()
        elif server.is_alive:
            await self._check_health(server)
        elif readmission is None and not (server.is_faulty and self.alive):
            # A task of the pool's: it goes on when the requests of the moment are done.
            self._readmissions[server] = asyncio.create_task(self._readmit_in_background(server))

    async def _check_health(self, server: VLLMServer) -> None:
        is_busy = server.delivery_lock.locked()  # it answers nothing else while it loads weights
        if is_busy or await server.is_healthy():
            server.num_missed = 0
            return
        server.num_missed += 1
        if server.num_missed >= MAX_MISSED:
            self._lose(server, ServerLost(f"it did not say that it lives, {MAX_MISSED} times"))

    async def _readmit_in_background(self, server: VLLMServer) -> None:
        with self._loop.can_be_abandoned():
            await self._readmit(server)

    async def _readmit(self, server: VLLMServer) -> None:
        """Admit a server with the present weights, if it answers."""
        try:
            await self._deliver(server, may_take_over=False)
        except ServerLost as error:
            self._lose(server, error)
