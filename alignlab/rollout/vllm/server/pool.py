"""Several servers as one: requests balanced, servers watched, their losses survived and counted.

Every server offers as many places as sequences that it decodes together, and a request takes the first free place, so
that a slow server gets fewer. A server is lost where a connection breaks, a request times out, or it does not say that
it lives: what it was asked is asked again elsewhere, under the same seed. It is back once it answers with the weights
of the last update, which it is sent again where it was started anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import anyio

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.loop_thread import LoopThread
from alignlab.rollout.task_groups import each, task_group
from alignlab.rollout.vllm.completions import Answer, Request
from alignlab.rollout.vllm.server.access import server_token, warn_of_open_ways
from alignlab.rollout.vllm.server.client import MAX_VOCAB_SIZE, ServerFaulty, ServerLost, VLLMServer, http_client
from alignlab.rollout.vllm.server.handout import Handout, SentWeights
from alignlab.rollout.vllm.server.identity import check_identity

logger = logging.getLogger(__name__)
MAX_MISSED = 3
MAX_ATTEMPTS = 8
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
T = TypeVar("T")


class ServerPool:
    """The servers of a run. Its methods may be called from any thread.

    What is given up is cancelled by anyio's scopes: from those httpx2 shields the closing of its connections, and from
    asyncio's own cancelling it does not.

    Args:
        settings: addresses and patience.
        identity: what each server must have alike, see `identity`.
        sparse_layers: whose experts are to be told.
        run: tells this run's weights from others'.
        rank: of this process.
        check: raises ConfigError where a server, as it tells of itself, does not fit.

    Attributes:
        counts: "lost" and "returned" servers, "reissued" requests, and "faulty" answers, which cannot be so.
    """

    def __init__(
        self, settings: VLLMServerSettings, identity: Mapping[str, Any], sparse_layers: list[int],
        *, run: str, rank: int, check: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.run = run
        self._rank, self._check = rank, check
        self.counts: Counter[str] = Counter()
        self._settings, self._identity, self._sparse_layers = settings, identity, sparse_layers
        token = server_token()
        self._http = http_client(token)
        self._servers = [
            VLLMServer(
                address, self._http, timeout_s=settings.request_timeout_s, token=token,
                vocab_size=identity.get("vocab_size") or MAX_VOCAB_SIZE,
            )
            for address in settings.servers
        ]  # fmt: skip
        warn_of_open_ways(settings.servers)
        self._places: asyncio.PriorityQueue[tuple[int, int, int]] = asyncio.PriorityQueue()
        self._handout = Handout(run, self._introduce, settings)
        self._number, self._reason, self._said = 0, "", set[str]()
        self._loop = LoopThread("alignlab-servers")
        self._running: dict[asyncio.Task[Any], anyio.CancelScope] = {}
        self._returning: dict[VLLMServer, asyncio.Task[None]] = {}

    @property
    def alive(self) -> list[VLLMServer]:
        """Servers that requests go to."""
        return [server for server in self._servers if server.alive]

    def open(self) -> list[dict[str, Any]]:
        """Wait until all servers answer, or some and the patience is over; returns what each says of itself.

        Raises:
            ConfigError: none answers, or one is not what it must be.
        """
        return self._wait_for(self._open())

    def put(self, sent: SentWeights) -> None:
        """Give all servers new weights; those that were lost get another chance. `sent.path` must last until the next.

        Raises:
            RolloutError: something did not arrive whole, or no server is left and none comes back in time.
            ConfigError: a server is in use by another run.
        """
        self._wait_for(self._put(sent))

    def expect(self, sent: SentWeights) -> None:
        """Take note of weights that another rank has sent, and of the servers that have them."""
        self._wait_for(self._expect(sent))

    def release(self) -> None:
        """Let other runs have the servers."""
        self._wait_for(self._release())

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """One completion for each request, in order.

        Raises:
            RolloutError: a server refuses a request, a request finds no server that does it, or there is none left.
        """
        return self._wait_for(self._answers(requests))

    def answers_of(self, server: VLLMServer, requests: Sequence[Request]) -> list[Answer]:
        """The same from one server.

        Raises:
            ServerLost: it is.
        """
        return self._wait_for(self._answers_of(server, requests))

    def abandon(self) -> None:
        """Give up what is running; its callers get a RolloutError."""
        self._loop.submit(self._abandon()).result()

    def close(self) -> None:
        """Give up what is running and end all connections."""
        self._loop.submit(self._close()).result()
        self._loop.close()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._loop.submit(self._unless_abandoned(work))
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _unless_abandoned(self, work: Coroutine[Any, Any, T]) -> T:
        with self._abandonable():
            return await work
        raise RolloutError("generation was abandoned, because the run ends")

    @contextmanager
    def _abandonable(self) -> Iterator[None]:
        """This task goes on behind what it is doing once all is abandoned."""
        task = asyncio.current_task()
        assert task is not None
        with anyio.CancelScope() as scope:
            self._running[task] = scope
            try:
                yield
            finally:
                del self._running[task]

    async def _abandon(self) -> None:
        for scope in self._running.values():
            scope.cancel()

    async def _close(self) -> None:
        running = list(self._running)
        await self._abandon()
        await asyncio.gather(*running, *self._returning.values(), return_exceptions=True)
        await self._http.aclose()

    async def _open(self) -> list[dict[str, Any]]:
        until = time.monotonic() + self._settings.reconnect_s
        found: dict[str, dict[str, Any]] = {}
        while True:
            for server in self._servers:
                if server.address not in found:
                    try:
                        found[server.address] = await self._introduce(server)
                    except ServerLost as error:
                        reason = str(error)
            missing = [server.address for server in self._servers if server.address not in found]
            if not missing or time.monotonic() >= until:
                break
            self._say_once(f"waiting up to {self._settings.reconnect_s:g} s for the vLLM servers {', '.join(missing)}")
            await asyncio.sleep(min(self._settings.health_every_s, 1.0))
        if not found:
            raise ConfigError(
                f"no vLLM server answers at {', '.join(missing)} ({reason}); start them in another terminal: "
                "bash launch/serve_vllm.sh CONFIG, or correct trainer.rollout.servers"
            )
        for address in missing:
            logger.warning("the server %s does not answer; going on without it until the next weight update", address)
        return list(found.values())

    async def _introduce(self, server: VLLMServer) -> dict[str, Any]:
        about = await server.about()
        check_identity(self._identity, about["identity"], server.address)
        self._check(about)
        return about

    async def _release(self) -> None:
        await each(VLLMServer.release, self.alive)

    async def _expect(self, sent: SentWeights) -> None:
        self._handout.sent = sent
        self._forgive()
        for server in self._servers:
            await self._try_again(server)
            if server.version != sent.version:
                self._lose(server, ServerLost("it has not been given the present weights"))

    async def _put(self, sent: SentWeights) -> None:
        first, self._handout.sent = self._handout.sent is None, sent
        self._forgive()
        until = time.monotonic() + self._settings.reconnect_s
        while True:
            reasons = await each(partial(self._reason_against, first=first), self._servers)
            for server, reason in zip(self._servers, reasons, strict=True):
                if isinstance(reason, ServerLost):
                    self._lose(server, reason)
                elif reason is not None:
                    raise reason
            if self.alive:
                return
            if time.monotonic() >= until:
                raise RolloutError(
                    f"no server took the weights of version {sent.version} ({reasons[0]}); see what they say, start "
                    "them again, and go on with --resume"
                )
            await asyncio.sleep(min(self._settings.health_every_s, 1.0))

    async def _reason_against(self, server: VLLMServer, *, first: bool) -> Exception | None:
        """Give a server the weights; returns why it has not taken them."""
        try:
            await self._give_in_turn(server, first=first)
        except (ServerLost, RolloutError, ConfigError, OSError) as error:
            return error
        return None

    async def _give_in_turn(self, server: VLLMServer, *, first: bool) -> None:
        async with server.turn:
            version = await self._handout.give(server, await self._introduce(server), first=first)
            if version is not None:
                self._admit(server, version)

    async def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        async with task_group() as group:
            group.start_soon(self._watch)
            answers = await each(self._answer, requests)
            group.cancel_scope.cancel()
        return answers

    async def _answers_of(self, server: VLLMServer, requests: Sequence[Request]) -> list[Answer]:
        try:
            return await each(partial(self._call, server), requests)
        except ServerLost as error:
            self._lose(server, error)
            raise

    async def _answer(self, request: Request) -> Answer:
        for attempt in range(MAX_ATTEMPTS):
            place = await self._take_place()
            server = self._servers[place[1]]
            try:
                return await self._call(server, request)
            except ServerLost as error:
                self._lose(server, error)
                self.counts["faulty"] += isinstance(error, ServerFaulty)
                last = f"{server.address}: {error}"
                self.counts["reissued"] += 1
            finally:
                self._places.put_nowait(place)
            longest = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
            await asyncio.sleep(random.Random(attempt).uniform(0, longest))
        raise RolloutError(
            f"a request of {len(request.token_ids)} prompt tokens was lost {MAX_ATTEMPTS} times, last by {last}; look "
            "at the server's messages, and go on with --resume"
        )

    async def _call(self, server: VLLMServer, request: Request) -> Answer:
        """Ask a server, and stop waiting once it is lost."""
        sent = self._handout.sent
        assert sent is not None
        self._number += 1
        with anyio.CancelScope() as scope:
            server.calls.add(scope)
            try:
                return await server.complete(
                    request, f"{self.run}-{self._rank}-{self._number}", adapter=sent.adapter,
                    exact=self._settings.max_staleness == 0, sparse_layers=self._sparse_layers,
                )
            finally:
                server.calls.discard(scope)
        raise ServerLost("it was lost meanwhile")

    async def _take_place(self) -> tuple[int, int, int]:
        """A free place of a living server: number of the place, of the server, and its generation."""
        while True:
            place = await self._places.get()
            server = self._servers[place[1]]
            if server.alive and server.generation == place[2]:
                return place

    def _admit(self, server: VLLMServer, version: str) -> None:
        server.version = version
        if not server.alive:
            server.alive, server.missed, server.is_proved = True, 0, False
            server.generation += 1
            if server.generation > 1:
                self.counts["returned"] += 1
                logger.warning("the server %s is back", server.address)
            index = self._servers.index(server)
            for number in range(self._settings.max_running):
                self._places.put_nowait((number, index, server.generation))

    def _forgive(self) -> None:
        """With new weights each server gets another chance."""
        self._said.clear()
        for server in self._servers:
            server.is_faulty = False

    def _say_once(self, text: str) -> None:
        """Say who is waited for; the same once until the next weights."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)

    def _lose(self, server: VLLMServer, reason: Exception) -> None:
        server.is_faulty = server.is_faulty or isinstance(reason, ServerFaulty)
        self._reason = f"{server.address}: {reason}"
        if server.alive:
            server.alive = False
            self.counts["lost"] += 1
            logger.warning("lost the server %s (%s); its requests go to the others", server.address, reason)
            for call in list(server.calls):
                call.cancel()

    async def _watch(self) -> None:
        """Look after the servers while requests run.

        Raises:
            RolloutError: none is left, and none came back in time.
        """
        since: float | None = None
        patience_s = self._settings.reconnect_s
        while True:
            await each(self._look, self._servers)
            if self.alive:
                since = None
            elif since is None:
                since = time.monotonic()
                self._say_once(f"no vLLM server is left; waiting up to {patience_s:g} s for one to come back")
            elif time.monotonic() - since > patience_s:
                raise RolloutError(
                    f"all {len(self._servers)} vLLM servers are lost, and none came back within reconnect_s "
                    f"({patience_s:g} s; the last that was lost is {self._reason}); start them again, and go on with "
                    "--resume"
                )
            await asyncio.sleep(self._settings.health_every_s)

    async def _look(self, server: VLLMServer) -> None:
        """See whether a server lives; one that was lost is given the weights in a task that outlasts the requests.

        Raises:
            RolloutError: what a server that came back was given did not arrive whole, or it is another run's.
            ConfigError: it does not fit.
        """
        returning = self._returning.get(server)
        if returning is not None and returning.done():
            del self._returning[server]
            returning.result()
        elif returning is None and not server.alive and not (server.is_faulty and self.alive):
            self._returning[server] = asyncio.create_task(self._take_back(server))
        elif server.alive and (server.turn.locked() or await server.lives()):
            server.missed = 0
        elif server.alive:
            server.missed += 1
            if server.missed >= MAX_MISSED:
                self._lose(server, ServerLost(f"it did not say that it lives, {MAX_MISSED} times"))

    async def _take_back(self, server: VLLMServer) -> None:
        with self._abandonable():
            await self._try_again(server)

    async def _try_again(self, server: VLLMServer) -> None:
        """Admit a server that is there, with the present weights."""
        try:
            await self._give_in_turn(server, first=False)
        except ServerLost as error:
            self._lose(server, error)
