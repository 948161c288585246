"""The process group in which a trainer's first rank broadcasts weights to the workers of its servers.

Gloo connects processes whose weights are on CPUs, NCCL those on GPUs. The first rank listens at one address for as long
as the group is being made, and servers learn the address, the port and a random name from an authenticated request.
What travels afterwards are the bytes of tensors: nothing is unpickled.

vLLM's own `stateless_init_torch_distributed_process_group` would listen at all addresses of the machine, and its
`StatelessProcessGroup` unpickles what anybody on the network puts into its store.
"""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, TCPStore

from alignlab.errors import RolloutError
from alignlab.rollout.vllm.protocol import upload_deadline_s

JOIN_S = 60.0
"""Limit on the wait for all workers to join a group."""
BROKE_OFF = "the broadcast of the weights broke off"
"""Begins the message of every `BroadcastBroken`, by which it is recognized behind vLLM's own errors."""
_JOINED, _CONNECTED = "joined", "connected"
_POLL_S = 0.005
_REMARKS = re.compile(r"^\[[^\]]*\] ?|\. This is typically caused.*")
"""Gloo's place in its source, and its advice to its developers."""


class BroadcastBroken(RolloutError):
    """A process of the group died, did not come, or took too long; the group can be used no more."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"{BROKE_OFF}: {reason}")


@dataclass(frozen=True)
class Rendezvous:
    """The way to the other processes of a group; all of it is secret.

    Attributes:
        name: random, unique name of the group.
        host: address at which the first rank listens.
        port: its port there.
        world_size: number of processes, the first rank included.
        join_s: limit on the wait for all of them to join, seconds.
        nccl_id: NCCL's identity of the group, in hexadecimal digits; empty for gloo.
    """

    name: str
    host: str
    port: int
    world_size: int
    join_s: float
    nccl_id: str = ""


class WeightGroup(Protocol):
    """A group in which rank 0 broadcasts.

    Attributes:
        device: where the tensors of a broadcast lie.
    """

    device: torch.device

    def broadcast(self, data: Tensor) -> None:
        """Overwrite `data`, [bytes] uint8, by rank 0's, and wait for the end.

        Raises:
            BroadcastBroken: another process died, or the time for this many bytes is over.
        """
        ...

    def close(self) -> None:
        """End all connections, so that nobody waits for this process."""
        ...


class GlooGroup:
    """A group of processes with weights on CPUs, connected by gloo; a `WeightGroup`.

    Args:
        store: of this group alone.
        rank: of this process.
        rendezvous: how the processes find each other.
    """

    device = torch.device("cpu")

    def __init__(self, store: Store, rank: int, rendezvous: Rendezvous) -> None:
        gloo: Any = ProcessGroupGloo  # torch declares neither its options nor that it is a backend
        options = gloo._Options()
        own_address = address_towards(rendezvous.host, rendezvous.port)
        options._devices = [gloo.create_device(hostname=own_address)]  # else wherever the host's name leads
        options._timeout = timedelta(seconds=rendezvous.join_s)
        with _named_faults():
            self._backend = gloo(store, rank, rendezvous.world_size, options)

    def broadcast(self, data: Tensor) -> None:
        """Overwrite `data` by rank 0's, and wait for the end."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=upload_deadline_s(data.nbytes))
        with _named_faults():
            self._backend.broadcast([data], options).wait()

    def close(self) -> None:
        """End all connections."""
        self._backend = None


class NcclGroup:
    """A group of processes with weights on GPUs, one each, connected by NCCL; a `WeightGroup`.

    vLLM's communicator is used, because that of torch ends the whole process when another one dies.

    Args:
        rank: of this process.
        rendezvous: how the processes find each other.
        device: GPU of this process.
    """

    def __init__(self, rank: int, rendezvous: Rendezvous, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.utils.nccl import unpinned_nccl_env

        self.device = device

        def connect() -> Any:
            with unpinned_nccl_env():
                return PyNcclCommunicator.from_unique_id_bytes(
                    bytes.fromhex(rendezvous.nccl_id), rank, rendezvous.world_size, device
                )

        self._communicator: Any = _in_time(connect, rendezvous.join_s, "NCCL to connect the processes")
        if self._communicator.disabled:
            raise BroadcastBroken("VLLM_DISABLE_PYNCCL is set; unset it, or use rollout.transfer: file")

    def broadcast(self, data: Tensor) -> None:
        """Overwrite `data` by rank 0's, and wait for the end: of work on this GPU's present stream alone."""
        stream, deadline_s = torch.cuda.current_stream(self.device), upload_deadline_s(data.nbytes)
        until = time.monotonic() + deadline_s
        with _named_faults():
            self._communicator.broadcast(data, src=0, stream=stream)
            is_done = torch.cuda.Event()
            is_done.record(stream)
            while not is_done.query():  # a wait of CUDA's own would have no end once another process is dead
                if time.monotonic() >= until:
                    raise BroadcastBroken(f"waited {deadline_s:.0f} s for NCCL")
                time.sleep(_POLL_S / 10)

    def close(self) -> None:
        """End all connections, and what waits for them on the GPU."""
        self._communicator.destroy()


class GroupInMaking:
    """A new group, to which the first rank invites workers. It listens until `join` or `close`.

    Args:
        host: address to listen at, of this machine.
        num_workers: number of processes beside this one.
        device: of the weights in this process.
    """

    def __init__(self, host: str, num_workers: int, device: torch.device) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        port = listener.getsockname()[1]
        nccl_id = "" if device.type == "cpu" else _new_nccl_id()
        self.rendezvous = Rendezvous(secrets.token_hex(16), host, port, 1 + num_workers, JOIN_S, nccl_id)
        self._device = device
        self._store: Store | None = PrefixStore(self.rendezvous.name, TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_S),
            master_listen_fd=listener.detach(),
        ))  # fmt: skip

    def join(self, has_failed: Callable[[], bool]) -> WeightGroup:
        """Wait until all workers have joined, and return the group.

        Args:
            has_failed: returns True once a worker will certainly not join.

        Raises:
            BroadcastBroken: a worker did not join in time, or will not.
        """
        assert self._store is not None
        try:
            with _named_faults():
                self._await_workers(self._store, _JOINED, has_failed)
                group = _connected(self._store, 0, self.rendezvous, self._device)
                try:
                    self._await_workers(self._store, _CONNECTED, has_failed)  # they still read from the store
                except BaseException:
                    group.close()
                    raise
            return group
        finally:
            self.close()

    def close(self) -> None:
        """Listen no more."""
        self._store = None

    def _await_workers(self, store: Store, key: str, has_failed: Callable[[], bool]) -> None:
        join_s, expected = self.rendezvous.join_s, self.rendezvous.world_size - 1
        until = time.monotonic() + join_s
        while (count := store.add(key, 0)) < expected:
            if has_failed():
                raise BroadcastBroken("a server will not take part")
            if time.monotonic() >= until:
                raise BroadcastBroken(
                    f"{expected - count} of {expected} workers did not reach {self.rendezvous.host} within {join_s:g} s"
                )
            time.sleep(_POLL_S)


def join(rendezvous: Rendezvous, rank: int, device: torch.device) -> WeightGroup:
    """Join a group that its first rank is making, and return it.

    Args:
        rank: of this process, from 1.
        device: of the weights in this process.

    Raises:
        BroadcastBroken: the first rank cannot be reached, or another worker did not come in time.
    """
    with _named_faults():
        store = PrefixStore(rendezvous.name, TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=rendezvous.join_s),
        ))  # fmt: skip
        store.add(_JOINED, 1)
        group = _connected(store, rank, rendezvous, device)
        store.add(_CONNECTED, 1)
    return group


def card_of(device: torch.device) -> str:
    """Return the identity of a GPU, the same in every process; an empty text for a CPU."""
    return "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine from which `host` is reached; nothing is sent.

    Raises:
        OSError: no way leads there.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _connected(store: Store, rank: int, rendezvous: Rendezvous, device: torch.device) -> WeightGroup:
    return NcclGroup(rank, rendezvous, device) if rendezvous.nccl_id else GlooGroup(store, rank, rendezvous)


def _new_nccl_id() -> str:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.utils.nccl import unpinned_nccl_env

    with unpinned_nccl_env():
        return bytes(NCCLLibrary().ncclGetUniqueId().internal).hex()


def _in_time(work: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """Return the result of `work`, which has no deadline of its own, and goes on in a thread if it is too slow."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised by the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="alignlab-join", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if errors:
        raise errors[0]
    if not results:
        raise BroadcastBroken(f"waited {deadline_s:g} s for {what}")
    return results[0]


@contextmanager
def _named_faults() -> Iterator[None]:
    """Raise errors of torch, gloo, NCCL and sockets as `BroadcastBroken`."""
    try:
        yield
    except BroadcastBroken:
        raise
    except (RuntimeError, OSError) as error:
        raise BroadcastBroken(_REMARKS.sub("", str(error).partition("\n")[0])) from error
