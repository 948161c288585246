"""The client of one server: requests, checked answers, and what each failure means."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx2
from torch import Tensor

from alignlab.errors import ConfigError, RolloutError
from alignlab.files.library_errors import reading
from alignlab.network.bounded_http import OK, PLAIN, Reply, TooLargeError, excerpt, exchange
from alignlab.rollout.vllm import answers, protocol
from alignlab.rollout.vllm.answers import FaultyAnswer
from alignlab.rollout.vllm.backend import MemberLost
from alignlab.rollout.vllm.completions import Answer, Request

CONNECT_S, REQUEST_S = 5.0, 600.0
MAX_VOCAB_SIZE = 2**24
_IDLE_S = 2.0  # servers close connections that are idle for 5 s
_CHUNK_BYTES = 2**20
_ROUTED = "routed_experts"
_MAX_SHORT_ANSWER_BYTES = 2**20
_MAX_DIGESTS_BYTES = 64 * 2**20
_BYTES_PER_TOKEN, _BYTES_PER_EXPERT_LAYER = 2048, 512  # of JSON, generously
_REFUSALS = (400, 411, 413, 422, 507)  # the request or a full disk is at fault: other servers would refuse it too


def http_client(token: str) -> httpx2.AsyncClient:
    """Return a client of servers with this token. It uses no proxy; each request has a deadline of its own."""
    return httpx2.AsyncClient(
        headers=PLAIN | {"Authorization": f"Bearer {token}"}, timeout=httpx2.Timeout(None, connect=CONNECT_S),
        trust_env=False,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=_IDLE_S),
    )  # fmt: skip


async def is_healthy(address: str) -> bool:
    """Return True if a server at an address answers its health check within `CONNECT_S`; this needs no token."""
    async with httpx2.AsyncClient(headers=PLAIN, timeout=None, trust_env=False) as http:
        try:
            url = f"{address}{protocol.HEALTH_PATH}"
            reply = await exchange(http, "GET", url, deadline_s=CONNECT_S, max_bytes=_MAX_SHORT_ANSWER_BYTES)
        except (TimeoutError, TooLargeError, httpx2.HTTPError, httpx2.InvalidURL):
            return False
    return reply.status == OK


class ServerLost(MemberLost):
    """A server does not answer as it should; its requests go to other servers.

    Attributes:
        is_gone: False if the server answers, and only lacks the weights.
    """

    is_gone = True


class ServerFaulty(ServerLost):
    """A server's answer cannot be true; while other servers live, it gets no requests until the next weights."""


class BroadcastBrokeOff(ServerLost):
    """A server has no weights because the broadcast broke off; it lives, and can take part in the next one."""

    is_gone = False


class VLLMServer:
    """One server.

    Args:
        address: http://HOST:PORT.
        http: sends the requests, each with the token.
        timeout_s: deadline of a request, from its start to the end of its answer.
        token: hidden in messages that repeat a server's words.
        vocab_size: token ids are below it.

    Attributes:
        address: http://HOST:PORT.
        is_alive: requests go to this server.
        version: of the weights that the server was given last.
        is_verified: a canary has passed since the server was admitted.
        is_faulty: an answer since the last weights could not be true.
        generation: number of times that the server was admitted.
        delivery_lock: held by the task that gives the server weights.
        calls: requests in flight, to be cancelled when the server is lost.
        num_missed: health checks in a row that failed.
        records_routing: the server keeps the experts chosen, to be fetched after each request.
    """

    def __init__(
        self, address: str, http: httpx2.AsyncClient, *, timeout_s: float = REQUEST_S, token: str = "",
        vocab_size: int = MAX_VOCAB_SIZE,
    ) -> None:
        self.address = address.rstrip("/")
        self.is_alive = self.is_verified = self.is_faulty = False
        self.version = ""
        self.generation = self.num_missed = 0
        self.delivery_lock = asyncio.Lock()
        self.calls: set[anyio.CancelScope] = set()
        self.records_routing = False
        self._http, self._timeout_s, self._token, self._vocab_size = http, timeout_s, token, vocab_size

    async def about(self) -> dict[str, Any]:
        """Return the server's description of itself: weights, model, sizes.

        Raises:
            ServerLost: the server cannot be reached, or its description cannot be true.
            ConfigError: another kind of server answers, or the server has another token.
        """
        answer = await self._ask("GET", protocol.ABOUT_PATH, deadline_s=CONNECT_S, max_bytes=_MAX_SHORT_ANSWER_BYTES)
        with _fault_of_the_server():
            about = answers.checked_description(answer)
        self.records_routing = about["records_routing"]
        return about

    async def is_healthy(self) -> bool:
        """Return True if the server and its engine answer in time."""
        try:
            await self.about()
        except ServerLost:
            return False
        return True

    async def release(self) -> None:
        """Let another run take the server over."""
        with contextlib.suppress(ServerLost, RolloutError, ConfigError):  # nothing depends on it
            await self._ask("POST", protocol.RELEASE_PATH, deadline_s=CONNECT_S, max_bytes=_MAX_SHORT_ANSWER_BYTES)

    async def put(self, version: str, path: Path) -> dict[str, str]:
        """Upload new weights, which the server uses from now on; return the digests of the tensors that arrived.

        Raises:
            ServerLost: the server was not reached, or died meanwhile.
            RolloutError: the server cannot load the weights, or the file of weights cannot be read.
        """
        with reading(path, "the weights for vLLM's servers", RolloutError):
            num_bytes = path.stat().st_size
        answer = await self._ask(
            "PUT", f"{protocol.WEIGHTS_PATH}/{version}", content=_chunks(path),
            headers={"Content-Length": str(num_bytes)}, max_bytes=_MAX_DIGESTS_BYTES,
            deadline_s=self._timeout_s + protocol.upload_deadline_s(num_bytes),
        )  # fmt: skip
        with _fault_of_the_server():
            return answers.checked_digests(answer)

    async def take_broadcast(self, version: str, announcement: Mapping[str, Any], num_bytes: int) -> dict[str, str]:
        """Let the server receive weights by a process group; return the digests of the tensors that arrived.

        Args:
            announcement: fields of a `transfer.Broadcast`.
            num_bytes: size of all tensors.

        Raises:
            ServerLost: the server was not reached, or died; as `BroadcastBrokeOff`, another process failed.
            RolloutError: the server cannot load the weights.
        """
        content = json.dumps(announcement).encode()
        answer = await self._ask(
            "POST", f"{protocol.BROADCAST_PATH}/{version}", content=content,
            headers={"Content-Type": "application/json"}, max_bytes=_MAX_DIGESTS_BYTES,
            deadline_s=self._timeout_s + protocol.upload_deadline_s(num_bytes),
        )  # fmt: skip
        with _fault_of_the_server():
            return answers.checked_digests(answer)

    async def complete(
        self, request: Request, name: str, *, from_adapter: bool, exact: bool, sparse_layers: list[int]
    ) -> Answer:
        """Return one completion, from the weights that the server was given last.

        Args:
            name: unique name of the request.
            from_adapter: the weights are an adapter's, which vLLM serves under their version.
            exact: no token may come from older or newer weights of this run.
            sparse_layers: layers whose experts are recorded.

        Raises:
            ServerLost: the server died, aborted the request, has other weights, or its answer cannot be true.
            RolloutError: the server refuses the request.
        """
        weights = self.version
        body = {
            "request_id": name, "model": weights if from_adapter else protocol.SERVED_NAME,
            "token_ids": list(request.token_ids), "sampling_params": request.params,
        }
        limits: dict[str, Any] = {
            "deadline_s": self._timeout_s, "max_bytes": _max_answer_bytes(request, sparse_layers),
        }  # fmt: skip
        answer = await self._ask("POST", protocol.GENERATE_PATH, json=body, **limits)
        with _fault_of_the_server():
            choice = answers.only_choice(answer, name)
            finish_reason = choice.get("finish_reason")
            if finish_reason not in ("stop", "length"):
                raise ServerLost(f"it aborted a request ({finish_reason!r:.40})")
            ids = answers.token_ids(choice, request, self._vocab_size)
            versions = [weights] * len(ids) if from_adapter else answers.token_versions(choice, len(ids))
            _check_versions(versions, weights, exact=exact)
            num_tokens, routing = len(request.token_ids) + len(ids), None
            if sparse_layers:
                routing = await self._routing(answer, choice, num_tokens, sparse_layers, limits)
            return Answer(
                token_ids=ids,
                logprobs=answers.logprobs(choice, len(ids)),
                finish_reason=finish_reason,
                stop_text=answers.stop_text(choice, request),
                policy_versions=tuple(protocol.policy_version_of(version) for version in versions),
                routing=routing,
            )

    async def _routing(
        self, answer: Mapping[str, Any], choice: Mapping[str, Any], num_tokens: int, layers: list[int],
        limits: Mapping[str, Any],
    ) -> Tensor:
        if not self.records_routing:
            return answers.routed_experts(choice.get(_ROUTED), num_tokens, layers)
        question = {"name": answer.get("request_id"), "layers": layers}
        reply = await self._reply("POST", protocol.ROUTING_PATH, json=question, **limits)
        return answers.recorded_experts(reply.content, num_tokens, layers)

    async def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Send a request, and return the JSON object of the answer; see `_reply`."""
        reply = await self._reply(method, path, **options)
        try:
            answer = reply.json()
        except ValueError as error:
            raise ServerFaulty(f"its answer is not JSON: {reply.excerpt(self._token)!r}") from error
        if not isinstance(answer, dict):
            raise ServerFaulty(f"its answer is not an object: {reply.excerpt(self._token)!r}")
        return answer

    async def _reply(self, method: str, path: str, *, deadline_s: float, max_bytes: int, **options: Any) -> Reply:
        """Send a request, and return the answer, of status 200.

        Args:
            deadline_s: from now to the end of the answer, a second try included.
        """
        try:
            reply = await self._send(method, path, time.monotonic() + deadline_s, max_bytes=max_bytes, **options)
        except TimeoutError as error:
            raise ServerLost(f"waited for its answer to {path}, which was not whole within {deadline_s:g} s") from error
        except TooLargeError as error:
            raise ServerFaulty(str(error)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            message = excerpt(str(error).encode(errors="replace"), self._token)
            raise ServerLost(f"{type(error).__name__}: {message}".rstrip(": ")) from error
        if reply.status != OK:
            raise self._failure(path, reply)
        return reply

    async def _send(self, method: str, path: str, until: float, **options: Any) -> Reply:
        """Exchange a request; one that breaks off is sent again once.

        The server may have closed an idle connection at that very moment.
        """
        url = f"{self.address}{path}"
        try:
            return await exchange(self._http, method, url, deadline_s=until - time.monotonic(), **options)
        except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
            if "content" in options:  # weights, which are not sent twice
                raise
            return await exchange(self._http, method, url, deadline_s=until - time.monotonic(), **options)

    def _failure(self, path: str, reply: Reply) -> Exception:
        text = reply.excerpt(self._token)
        match reply.status:
            case 401:
                return ConfigError(
                    f"the server {self.address} does not take this run's token; set {protocol.TOKEN_VARIABLE} to one "
                    "value for the servers and the training"
                )
            case 404 if path == protocol.ABOUT_PATH:
                return ConfigError(
                    f"{self.address} is not a server of alignlab's; start one with bash launch/serve_vllm.sh CONFIG, "
                    "or correct trainer.rollout.servers"
                )
            case protocol.BROKE_OFF_STATUS:
                return BroadcastBrokeOff(text)
            case status if status in _REFUSALS:
                return RolloutError(f"the server {self.address} refuses {path}: {text}")
            case status:
                return ServerLost(f"it answered {status}: {text}")


@contextlib.contextmanager
def _fault_of_the_server() -> Iterator[None]:
    """Raise a `FaultyAnswer` of the body as a `ServerFaulty`."""
    try:
        yield
    except FaultyAnswer as error:
        raise ServerFaulty(str(error)) from error


def _max_answer_bytes(request: Request, sparse_layers: Sequence[int]) -> int:
    """Return the largest size of an answer, bytes: some for each token, and for each layer with experts."""
    num_tokens = len(request.token_ids) + int(request.params.get("max_tokens") or 0)
    num_layers = 1 + max(sparse_layers, default=-1)
    return _MAX_SHORT_ANSWER_BYTES + num_tokens * (_BYTES_PER_TOKEN + _BYTES_PER_EXPERT_LAYER * num_layers)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with reading(path, "the weights for vLLM's servers", RolloutError):
        async with await anyio.open_file(path, "rb") as file:
            while chunk := await file.read(_CHUNK_BYTES):
                yield chunk


def _check_versions(versions: Sequence[str], expected: str, *, exact: bool) -> None:
    """Raise ServerLost unless all tokens come from the expected weights or, if not `exact`, from the same run's."""
    for version in versions:
        if version != expected and (exact or protocol.run_of(version) != protocol.run_of(expected)):
            raise ServerLost(f"it has the weights {version} and was given {expected}")
