"""One server, from the trainer's side: what it is asked, and what an answer that is none means."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx2
from torch import Tensor

from alignlab.bounded_http import OK, PLAIN, Reply, TooLargeError, excerpt, exchange
from alignlab.errors import ConfigError, RolloutError
from alignlab.library_errors import reading
from alignlab.rollout.vllm.completions import Answer, Request
from alignlab.rollout.vllm.server import answers
from alignlab.rollout.vllm.server.access import SERVED_NAME, UPLOAD_PATH, VARIABLE
from alignlab.rollout.vllm.server.answers import FaultyAnswer
from alignlab.rollout.vllm.server.uploads import upload_deadline_s

CONNECT_S, REQUEST_S = 5.0, 600.0
MAX_VOCAB_SIZE = 2**24
_IDLE_S = 2.0  # servers close connections that are idle for 5 s
_CHUNK = 2**20
_ROUTED = "routed_experts"
_MAX_ABOUT_BYTES = 2**20
_MAX_DIGESTS_BYTES = 64 * 2**20
_BYTES_PER_TOKEN, _BYTES_PER_EXPERT_LAYER = 2048, 512  # of JSON, generously
_REFUSALS = (400, 411, 413, 422, 507)  # what is sent is at fault, or the server's disk: no other server takes it


def http_client(token: str) -> httpx2.AsyncClient:
    """Return a client of servers that take this token; deadlines are each request's, and no proxy is asked."""
    return httpx2.AsyncClient(
        headers=PLAIN | {"Authorization": f"Bearer {token}"}, timeout=httpx2.Timeout(None, connect=CONNECT_S),
        trust_env=False,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=_IDLE_S),
    )  # fmt: skip


async def is_healthy(address: str) -> bool:
    """Return True if a server at an address says within `CONNECT_S` that it lives; no token is needed for it."""
    async with httpx2.AsyncClient(headers=PLAIN, timeout=None, trust_env=False) as http:
        try:
            url = f"{address}/health"
            reply = await exchange(http, "GET", url, deadline_s=CONNECT_S, max_bytes=_MAX_ABOUT_BYTES)
        except (TimeoutError, TooLargeError, httpx2.HTTPError, httpx2.InvalidURL):
            return False
    return reply.status == OK


class ServerLost(Exception):
    """A server does not answer as it should: what it was asked goes elsewhere."""


class ServerFaulty(ServerLost):
    """A server answers what cannot be so: it gets no more requests until the next weights, while others live."""


class VLLMServer:
    """One server.

    Args:
        address: http://HOST:PORT.
        http: sends the requests, each with the token.
        timeout_s: for a request in all.
        token: not to be shown where a server repeats it.
        vocab_size: token ids are below it.

    Attributes:
        address: http://HOST:PORT.
        alive: whether requests go to it.
        version: of the weights that it was given last.
        is_proved: a canary has seen them computed rightly since it was admitted.
        is_faulty: it has answered what cannot be so since it was given weights.
        generation: counts its admissions; places in its queue are told apart by it.
        turn: held by whoever gives it weights.
        calls: requests that are running, to be given up when it is lost.
        missed: times in a row that it did not say that it lives.
        records_routing: it keeps the experts chosen, to be fetched after each request.
    """

    def __init__(
        self, address: str, http: httpx2.AsyncClient, *, timeout_s: float = REQUEST_S, token: str = "",
        vocab_size: int = MAX_VOCAB_SIZE,
    ) -> None:
        self.address = address.rstrip("/")
        self.alive = False
        self.version = ""
        self.is_proved = False
        self.is_faulty = False
        self.generation = 0
        self.turn = asyncio.Lock()
        self.calls: set[anyio.CancelScope] = set()
        self.missed = 0
        self.records_routing = False
        self._http, self._timeout_s, self._token, self._vocab_size = http, timeout_s, token, vocab_size

    async def about(self) -> dict[str, Any]:
        """Who it is.

        Raises:
            ServerLost: it cannot be reached, or tells what cannot be so.
            ConfigError: what answers is no server of ours, or it knows another token.
        """
        answer = await self._ask("GET", "/alignlab/about", deadline_s=CONNECT_S, max_bytes=_MAX_ABOUT_BYTES)
        with _believed():
            about = answers.checked_about(answer)
        self.records_routing = about["records_routing"]
        return about

    async def lives(self) -> bool:
        """Whether it says so in time, and its engine too."""
        try:
            await self.about()
        except ServerLost:
            return False
        return True

    async def release(self) -> None:
        """Let another run have it."""
        with contextlib.suppress(ServerLost, RolloutError, ConfigError):  # nothing depends on it
            await self._ask("POST", "/alignlab/release", deadline_s=CONNECT_S, max_bytes=_MAX_ABOUT_BYTES)

    async def put(self, version: str, path: Path) -> dict[str, str]:
        """Give it new weights; returns the digests of what arrived.

        Raises:
            ServerLost: it was not reached, or died meanwhile.
            RolloutError: it cannot load them, or the file of weights cannot be read.
        """
        with reading(path, "the weights for vLLM's servers", RolloutError):
            num_bytes = path.stat().st_size
        answer = await self._ask(
            "PUT", f"{UPLOAD_PATH}{version}", content=_chunks(path), headers={"Content-Length": str(num_bytes)},
            deadline_s=self._timeout_s + upload_deadline_s(num_bytes), max_bytes=_MAX_DIGESTS_BYTES,
        )  # fmt: skip
        with _believed():
            return answers.checked_digests(answer)

    async def complete(
        self, request: Request, name: str, *, adapter: bool, exact: bool, sparse_layers: list[int]
    ) -> Answer:
        """One completion, from the weights that the server was given last.

        Args:
            name: of the request, unique.
            adapter: whether the weights are an adapter, which vLLM knows by the version.
            exact: whether no token may come from other weights of this run.
            sparse_layers: whose experts are told.

        Raises:
            ServerLost: it died, gave the request up, has other weights, or answers what cannot be so.
            RolloutError: it refuses the request.
        """
        weights = self.version
        body = {
            "request_id": name, "model": weights if adapter else SERVED_NAME, "token_ids": list(request.token_ids),
            "sampling_params": request.params,
        }
        limits: dict[str, Any] = {
            "deadline_s": self._timeout_s, "max_bytes": _max_answer_bytes(request, sparse_layers),
        }  # fmt: skip
        answer = await self._ask("POST", "/inference/v1/generate", json=body, **limits)
        with _believed():
            choice = answers.only_choice(answer, name)
            finish_reason = choice.get("finish_reason")
            if finish_reason not in ("stop", "length"):
                raise ServerLost(f"it gave a request up ({finish_reason!r:.40})")
            ids = answers.token_ids(choice, request, self._vocab_size)
            versions = [weights] * len(ids) if adapter else answers.token_versions(choice, len(ids))
            _check_versions(versions, weights, exact=exact)
            num_tokens, routing = len(request.token_ids) + len(ids), None
            if sparse_layers:
                routing = await self._routing(answer, choice, num_tokens, sparse_layers, limits)
            return Answer(
                token_ids=ids,
                logprobs=answers.logprobs(choice, len(ids)),
                finish_reason=finish_reason,
                stop_text=answers.stop_text(choice, request),
                policy_versions=tuple(int(version.split("-")[1]) for version in versions),
                routing=routing,
            )

    async def _routing(
        self, answer: Mapping[str, Any], choice: Mapping[str, Any], num_tokens: int, layers: list[int],
        limits: Mapping[str, Any],
    ) -> Tensor:
        text = choice.get(_ROUTED)
        if self.records_routing:
            asked = {"name": answer.get("request_id"), "layers": layers}
            record = await self._ask("POST", "/alignlab/routing", json=asked, **limits)
            text = record.get(_ROUTED)
        return answers.expert_choices(text, num_tokens, layers=layers, of_all_layers=not self.records_routing)

    async def _ask(
        self, method: str, path: str, *, deadline_s: float, max_bytes: int, **options: Any
    ) -> dict[str, Any]:
        """Ask, and return the object that the server answers.

        Args:
            deadline_s: for all of it; a request that is sent once more has what is left of it.
        """
        try:
            reply = await self._send(method, path, time.monotonic() + deadline_s, max_bytes=max_bytes, **options)
        except TimeoutError as error:
            raise ServerLost(f"waited for its answer to {path}, which was not whole within {deadline_s:g} s") from error
        except TooLargeError as error:
            raise ServerFaulty(str(error)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            why = excerpt(str(error).encode(errors="replace"), self._token)
            raise ServerLost(f"{type(error).__name__}: {why}".rstrip(": ")) from error
        if reply.status != OK:
            raise self._failure(path, reply)
        try:
            answer = reply.json()
        except ValueError as error:
            raise ServerFaulty(f"its answer is no JSON: {reply.excerpt(self._token)!r}") from error
        if not isinstance(answer, dict):
            raise ServerFaulty(f"its answer is no object: {reply.excerpt(self._token)!r}")
        return answer

    async def _send(self, method: str, path: str, until: float, **options: Any) -> Reply:
        """A request that breaks off is sent again once: the server may have closed an idle connection just then."""
        url = f"{self.address}{path}"
        try:
            return await exchange(self._http, method, url, deadline_s=until - time.monotonic(), **options)
        except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
            if "content" in options:  # a stream, which is used up
                raise
            return await exchange(self._http, method, url, deadline_s=until - time.monotonic(), **options)

    def _failure(self, path: str, reply: Reply) -> Exception:
        text = reply.excerpt(self._token)
        match reply.status:
            case 401:
                return ConfigError(
                    f"the server {self.address} does not take this run's token; set {VARIABLE} to one value for the "
                    "servers and the training"
                )
            case 404 if path == "/alignlab/about":
                return ConfigError(
                    f"{self.address} is no server of alignlab's; start one with bash launch/serve_vllm.sh CONFIG, or "
                    "correct trainer.rollout.servers"
                )
            case status if status in _REFUSALS:
                return RolloutError(f"the server {self.address} refuses {path}: {text}")
            case status:
                return ServerLost(f"it answered {status}: {text}")


@contextlib.contextmanager
def _believed() -> Iterator[None]:
    """What a server cannot have meant is a fault of the server."""
    try:
        yield
    except FaultyAnswer as error:
        raise ServerFaulty(str(error)) from error


def _max_answer_bytes(request: Request, sparse_layers: Sequence[int]) -> int:
    """Return how long an answer may be: a few bytes for each token, and for each layer whose experts are told."""
    num_tokens = len(request.token_ids) + int(request.params.get("max_tokens") or 0)
    num_layers = 1 + max(sparse_layers, default=-1)
    return _MAX_ABOUT_BYTES + num_tokens * (_BYTES_PER_TOKEN + _BYTES_PER_EXPERT_LAYER * num_layers)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with reading(path, "the weights for vLLM's servers", RolloutError):
        async with await anyio.open_file(path, "rb") as file:
            while chunk := await file.read(_CHUNK):
                yield chunk


def _check_versions(versions: Sequence[str], given: str, *, exact: bool) -> None:
    """See that tokens come from the weights given or, unless `exact`, from others of the same run."""
    run = given.partition("-")[0]
    for version in versions:
        if version != given and (exact or version.partition("-")[0] != run):
            raise ServerLost(f"it has the weights {version} and was given {given}")
