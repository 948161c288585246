"""One server, from the trainer's side: what it is asked, and what an answer that is none means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx2
from torch import Tensor

from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.vllm.completions import Answer, Request, padded
from alignlab.rollout.vllm.server.access import SERVED_NAME, VARIABLE
from alignlab.rollout.vllm.server.wire import decode_routing

CONNECT_S = 5.0
_CHUNK = 2**20
_ROUTED = "routed_experts"


class ServerLost(Exception):
    """A server does not answer as it should: what it was asked goes elsewhere."""


class VLLMServer:
    """One server.

    Attributes:
        address: http://HOST:PORT.
        alive: whether requests go to it.
        version: of the weights that it was given last.
        is_proved: a canary has seen them computed rightly since it was admitted.
        generation: counts its admissions; places in its queue are told apart by it.
        turn: held by whoever gives it weights.
        calls: requests that are running, to be given up when it is lost.
        missed: times in a row that it did not say that it lives.
        records_routing: it keeps the experts chosen, to be fetched after each request.
    """

    def __init__(self, address: str, http: httpx2.AsyncClient) -> None:
        self.address = address.rstrip("/")
        self.alive = False
        self.version = ""
        self.is_proved = False
        self.generation = 0
        self.turn = asyncio.Lock()
        self.calls: set[anyio.CancelScope] = set()
        self.missed = 0
        self.records_routing = False
        self._http = http

    async def about(self) -> dict[str, Any]:
        """Who it is.

        Raises:
            ServerLost: it cannot be reached.
            ConfigError: what answers is no server of ours, or it knows another token.
        """
        told = await self._ask("GET", "/alignlab/about", timeout=CONNECT_S)
        self.records_routing = bool(told["records_routing"])
        return told

    async def lives(self) -> bool:
        """Whether it says so in time, and its engine too."""
        try:
            await self.about()
        except ServerLost:
            return False
        return True

    async def release(self) -> None:
        """Let another run have it."""
        with contextlib.suppress(ServerLost):
            await self._ask("POST", "/alignlab/release", timeout=CONNECT_S)

    async def put(self, version: str, path: Path) -> dict[str, str]:
        """Give it new weights; returns the digests of what arrived.

        Raises:
            ServerLost: it was not reached, or died meanwhile.
            RolloutError: it cannot load them.
        """
        size = {"Content-Length": str(path.stat().st_size)}
        told = await self._ask("PUT", f"/alignlab/weights/{version}", content=_chunks(path), headers=size)
        return dict(told["arrived"])

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
            ServerLost: it died, gave the request up, or has other weights.
            RolloutError: it refuses the request.
        """
        weights = self.version
        body = {
            "request_id": name, "model": weights if adapter else SERVED_NAME, "token_ids": list(request.token_ids),
            "sampling_params": request.params,
        }
        told = await self._ask("POST", "/inference/v1/generate", json=body)
        [choice] = told["choices"]
        ids = tuple(choice["token_ids"])
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"it gave a request up ({choice['finish_reason']})")
        versions = [weights] * len(ids) if adapter else _versions(choice.get("weight_versions") or (), len(ids))
        _check_versions(versions, weights, exact=exact)
        return Answer(
            token_ids=ids,
            logprobs=tuple(step["logprob"] for step in choice["logprobs"]["content"]),
            finish_reason=choice["finish_reason"],
            stop_text=choice["stop_reason"] if isinstance(choice["stop_reason"], str) else None,
            policy_versions=tuple(int(version.split("-")[1]) for version in versions),
            routing=await self._routing(told, choice, len(request.token_ids) + len(ids), sparse_layers),
        )

    async def _routing(
        self, told: Mapping[str, Any], choice: Mapping[str, Any], num_tokens: int, layers: list[int]
    ) -> Tensor | None:
        if not layers:
            return None
        if not self.records_routing:
            return padded(decode_routing(choice[_ROUTED])[:, layers], num_tokens)
        kept = await self._ask("POST", "/alignlab/routing", json={"name": told["request_id"], "layers": layers})
        return padded(decode_routing(kept[_ROUTED]), num_tokens)

    async def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = await self._send(method, f"{self.address}{path}", **options)
        except httpx2.TransportError as error:
            raise ServerLost(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if response.status_code == 200:
            return dict(response.json())
        raise self._failure(path, response)

    async def _send(self, method: str, url: str, **options: Any) -> httpx2.Response:
        """A request that breaks off is sent again once: the server may have closed an idle connection just then."""
        try:
            return await self._http.request(method, url, **options)
        except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
            if "content" in options:  # a stream, which is used up
                raise
            return await self._http.request(method, url, **options)

    def _failure(self, path: str, response: httpx2.Response) -> Exception:
        text = response.text[:500]
        match response.status_code:
            case 401:
                return ConfigError(
                    f"the server {self.address} does not take this run's token; set {VARIABLE} to one value for the "
                    "servers and the training"
                )
            case 404 if path.startswith("/alignlab"):
                return ConfigError(
                    f"{self.address} is no server of alignlab's; start one with bash launch/serve_vllm.sh CONFIG, or "
                    "correct trainer.rollout.servers"
                )
            case 400 | 422:
                return RolloutError(f"the server {self.address} refuses {path}: {text}")
            case status:
                return ServerLost(f"it answered {status}: {text}")


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        while chunk := await file.read(_CHUNK):
            yield chunk


def _check_versions(versions: Sequence[str], given: str, *, exact: bool) -> None:
    """See that tokens come from the weights given or, unless `exact`, from others of the same run."""
    run = given.partition("-")[0]
    for version in versions:
        if version != given and (exact or version.partition("-")[0] != run):
            raise ServerLost(f"it has the weights {version} and was given {given}")


def _versions(spans: Any, num_tokens: int) -> list[str]:
    """The version of each token's weights, from vLLM's spans of tokens."""
    versions: list[str] = []
    for span in spans:
        versions += [span["version"]] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise ServerLost(f"it told the weights' version of {len(versions)} tokens of {num_tokens}")
    return versions
