"""Room for requests on servers: the first free slot is taken, so that a slow server gets fewer requests."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from alignlab.rollout.vllm.client import VLLMServer


class Slot(NamedTuple):
    """Room for one request on a server.

    Attributes:
        number: slots of low numbers are taken first, from all servers in turn.
        server: index of the server.
        generation: of the server when the slot was made; slots of older generations are void.
    """

    number: int
    server: int
    generation: int


class Slots:
    """The slots of all servers.

    Args:
        servers: by index.
        per_server: number of requests that a server takes at once.
    """

    def __init__(self, servers: list[VLLMServer], per_server: int) -> None:
        self._servers, self._per_server = servers, per_server
        self._free: asyncio.PriorityQueue[Slot] = asyncio.PriorityQueue()

    def add(self, server: VLLMServer) -> None:
        """Make the slots of a server that was admitted anew."""
        index = self._servers.index(server)
        for number in range(self._per_server):
            self._free.put_nowait(Slot(number, index, server.generation))

    async def take(self) -> tuple[Slot, VLLMServer]:
        """Wait for a free slot of a server that is alive; return the server too."""
        while True:
            slot = await self._free.get()
            server = self._servers[slot.server]
            if server.is_alive and server.generation == slot.generation:
                return slot, server

    def give_back(self, slot: Slot) -> None:
        """Make a slot free again."""
        self._free.put_nowait(slot)
