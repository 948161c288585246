"""Weights on their way from a training's first rank to all servers at once, by a process group.

An update is one broadcast. Each server is told by HTTP which tensors will come and where the group meets; its answer,
with the digests of what arrived, comes when the weights are in use. The group stays for the next update if the same
servers take part in it, and none has left it.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import anyio
import torch

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.network.addresses import leads_to_loopback
from alignlab.rollout.verification import check_arrived
from alignlab.rollout.vllm import packed_weights
from alignlab.rollout.vllm.client import BroadcastBrokeOff, ServerLost, VLLMServer
from alignlab.rollout.vllm.packed_weights import TensorShape
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from alignlab.rollout.vllm.pool import ServerPool
from alignlab.rollout.vllm.weight_delivery import SentWeights
from alignlab.rollout.vllm.weight_group import (
    BroadcastBroken,
    GroupInMaking,
    Rendezvous,
    WeightGroup,
    address_towards,
    card_of,
)

ANSWER_S = 30.0
"""Limit on the wait for a server's answer once the broadcast has broken off."""
_LOOPBACK = "127.0.0.1"
_FIX = "use rollout.transfer: file"
Described = Sequence[tuple[VLLMServer, Mapping[str, Any]]]


@dataclass
class _Outcome:
    """Tells the tasks that wait for servers how the broadcast ended, and the broadcast whether a server failed.

    Attributes:
        digests: of the tensors that were sent; or a `BroadcastBroken`, if not all were sent.
        has_failed: set once a server will certainly not take part.
    """

    digests: Future[Mapping[str, str]] = field(default_factory=Future)
    has_failed: Event = field(default_factory=Event)


class WeightBroadcast:
    """Broadcasts of the policy's weights to the servers of a pool; on the first rank of a training.

    Args:
        pool: the servers.
        device: of the policy.
    """

    def __init__(self, pool: ServerPool, device: torch.device) -> None:
        self._pool, self._device = pool, device
        self._group: WeightGroup | None = None
        self._rendezvous: Rendezvous | None = None
        self._members = frozenset[VLLMServer]()

    def put(self, weights: PolicyWeights, version: str) -> None:
        """Send new weights to every server that answers.

        Raises:
            BroadcastBroken: a process failed in the middle. The next call, with weights that can be read again, goes
                on with the servers that are left.
            RolloutError: a tensor did not arrive as it was sent, a server cannot load it, or no server answers.
            ConfigError: another run is using a server, two processes share a GPU, or the weights cannot be read.
        """
        digests: dict[str, str] = {}
        described = self._pool.ready(SentWeights(version, None, digests, is_adapter=False))
        check_cards(self._device, [(server.address, about) for server, about in described])
        in_making = None if self._fits(described) else self._new_group(described)
        shapes, outcome = packed_weights.shapes_of(weights.shapes()), _Outcome()
        taking = self._start_taking(described, shapes, version, outcome)
        try:
            if in_making is not None:
                self._group = in_making.join(outcome.has_failed.is_set)
            assert self._group is not None
            packed_weights.send(weights, shapes, self._group, buffer_bytes=packed_weights.BUFFER_BYTES)
            digests.update(weights.digests())
            outcome.digests.set_result(digests)
        except BaseException as error:
            self.close()  # so that no server waits for more
            broken = error if isinstance(error, BroadcastBroken) else BroadcastBroken(f"the training failed: {error}")
            outcome.digests.set_exception(broken)
            _raise_refusal(taking.result())
            raise
        errors = taking.result()
        _raise_refusal(errors)
        if all(errors) or any(isinstance(error, BroadcastBrokeOff) for error in errors):
            self.close()
            raise BroadcastBroken("; ".join(map(str, filter(None, errors))))

    def close(self) -> None:
        """End the connections of the group, if there is one."""
        if self._group is not None:
            self._group.close()
        self._group, self._members = None, frozenset()

    def _fits(self, described: Described) -> bool:
        """Return True if the present group is that of these servers, and all are in it."""
        if self._group is None or self._rendezvous is None:
            return False
        are_in_it = all(about.get("group") == self._rendezvous.name for _, about in described)
        return are_in_it and self._members == {server for server, _ in described}

    def _new_group(self, described: Described) -> GroupInMaking:
        """Begin to make a group of this process and all workers of the servers."""
        self.close()
        num_workers = sum(len(about["cards"]) for _, about in described)
        host = listening_address([server.address for server, _ in described])
        in_making = GroupInMaking(host, num_workers, self._device)
        self._rendezvous, self._members = in_making.rendezvous, frozenset(server for server, _ in described)
        return in_making

    def _start_taking(
        self, described: Described, shapes: Sequence[TensorShape], version: str, outcome: _Outcome
    ) -> Future[list[Exception | None]]:
        """Announce the broadcast to all servers, and begin to wait for their answers."""
        assert self._rendezvous is not None
        common = {
            "rendezvous": asdict(self._rendezvous), "tensors": packed_weights.shapes_to_json(shapes),
            "buffer_bytes": packed_weights.BUFFER_BYTES,
        }  # fmt: skip
        num_bytes = sum(shape.num_bytes for shape in shapes)
        first_ranks, next_rank = {}, 1
        for server, about in described:
            first_ranks[server] = next_rank
            next_rank += len(about["cards"])

        async def take(server: VLLMServer) -> str:
            """Have a server take the broadcast, and return the version that it has then."""
            announcement = common | {"first_rank": first_ranks[server]}
            try:
                answer = server.take_broadcast(version, announcement, num_bytes)
                await _check_answer(server, answer, outcome)
            except BaseException:
                outcome.has_failed.set()
                raise
            return version

        return self._pool.start_taking([server for server, _ in described], take)


async def _check_answer(server: VLLMServer, answer: Awaitable[Mapping[str, str]], outcome: _Outcome) -> None:
    """Wait for a server's answer, and compare the digests in it with those of the tensors that were sent.

    Raises:
        ServerLost: the server did not answer; as `BroadcastBrokeOff`, another process failed.
        RolloutError: a tensor arrived with another content.
    """
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:

        def limit_wait(digests: Future[Mapping[str, str]]) -> None:
            if digests.exception() is not None:
                loop.call_soon_threadsafe(setattr, scope, "deadline", loop.time() + ANSWER_S)

        outcome.digests.add_done_callback(limit_wait)
        arrived = await answer
        try:
            sent = await asyncio.wrap_future(outcome.digests)
        except BroadcastBroken as error:
            raise BroadcastBrokeOff(str(error)) from error
        try:
            check_arrived(sent, arrived)
        except RolloutError as error:
            raise RolloutError(f"server {server.address}: {error}") from error
        return
    raise ServerLost(f"it did not answer within {ANSWER_S:g} s after the broadcast of the weights had broken off")


def _raise_refusal(errors: Iterable[Exception | None]) -> None:
    """Raise the first error that another try would meet again."""
    for error in errors:
        if error is not None and not isinstance(error, ServerLost):
            raise error


def uses_broadcast(
    settings: VLLMServerSettings, device: torch.device, abouts: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Return True if all weights are to be broadcast, as `rollout.transfer` says; see there for auto.

    Args:
        device: of the policy.
        abouts: the servers' descriptions of themselves, by address.

    Raises:
        ConfigError: a broadcast is asked for, and is not possible between these devices.
    """
    if settings.transfer == "broadcast":
        check_cards(device, abouts.items())
        return True
    is_possible = device.type != "cpu" and importlib.util.find_spec("vllm") is not None
    return settings.transfer == "auto" and is_possible and _obstacle(device, abouts.items()) is None


def check_cards(device: torch.device, abouts: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise unless policy and servers are all on CPUs, or each process is on a GPU of its own.

    Args:
        device: of the policy.
        abouts: (address, description) of each server.

    Raises:
        ConfigError: with the server that is in the way.
    """
    obstacle = _obstacle(device, abouts)
    if obstacle is not None:
        raise ConfigError(f"rollout.transfer is broadcast, and {obstacle}")


def _obstacle(device: torch.device, abouts: Iterable[tuple[str, Mapping[str, Any]]]) -> str | None:
    """Return why weights cannot be broadcast between these devices; None if they can."""
    users = {card_of(device): "the training"}
    for address, about in abouts:
        cards = about.get("cards")
        if not isinstance(cards, list) or not cards or not all(isinstance(card, str) for card in cards):
            return f"the server {address} does not tell its GPUs; start it with this version of alignlab"
        if (about.get("device") == "cpu") != (device.type == "cpu"):
            return (
                f"the policy is on {device.type} and the server {address} on {about.get('device')!s:.40}: gloo "
                f"connects CPUs, and NCCL GPUs; {_FIX}"
            )
        for card in cards if device.type != "cpu" else ():
            if card in users:
                return (
                    f"the server {address} shares the GPU {card:.80} with {users[card]}, and NCCL takes one process on "
                    f"a GPU; {_FIX}, or give each its own GPUs (launch/torchrun.sh --gpus, see alignlab serve)"
                )
            users[card] = f"the server {address}"
    return None


def listening_address(addresses: Sequence[str]) -> str:
    """Return the address of this machine at which servers can reach it: loopback if all servers are there.

    Raises:
        ConfigError: no way leads to a server on another machine.
    """
    remote = [url for url in map(urlsplit, addresses) if not leads_to_loopback(url.hostname or "")]
    if not remote:
        return _LOOPBACK
    try:
        return address_towards(str(remote[0].hostname), remote[0].port or 0)
    except OSError as error:
        raise ConfigError(
            f"no way leads to the server {remote[0].geturl()} ({error.strerror}); correct trainer.rollout.servers"
        ) from error
