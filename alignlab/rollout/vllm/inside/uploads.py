"""Checks of what a trainer sends to a server: new weights, and questions about experts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import anyio

from alignlab.errors import DiskError
from alignlab.files.library_errors import writing
from alignlab.files.private_folders import PrivateFolder, temporary_folder
from alignlab.rollout.vllm.inside.asgi import Refusal, Scope, declared_length
from alignlab.rollout.vllm.packed_weights import shapes_from_json
from alignlab.rollout.vllm.protocol import is_weights_version, upload_deadline_s
from alignlab.rollout.vllm.weight_group import Rendezvous

FILE_NAME = "adapter_model.safetensors"
"""Name of an uploaded file; vLLM looks for it in an adapter's folder."""
_SPARE_BYTES = 64 * 2**20
_MAX_LAYERS, _MAX_NAME = 4096, 256
_MAX_WORKERS, _MAX_BUFFER_BYTES = 2**16, 2**34
_MAX_JOIN_S = 3600.0


class Upload(Protocol):
    """A request whose body comes in parts, like Starlette's."""

    scope: Scope

    def stream(self) -> AsyncIterator[bytes]:
        """Yield the parts of the body."""
        ...


def max_upload_bytes(folder: Path) -> int:
    """Return the largest size of new weights for a checkpoint: twice its own, as the update may untie its head."""
    return 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) + _SPARE_BYTES


def check_version(version: str) -> None:
    """Raise if `version` does not have the form of a `weights_version`.

    Raises:
        Refusal: it does not.
    """
    if not is_weights_version(version):
        raise Refusal(422, "the version of weights must be RUN-POLICY_VERSION-ATTEMPT, such as 0f3a-12-13")


async def receive_upload(request: Upload, *, max_bytes: int) -> PrivateFolder:
    """Receive a body into the file `FILE_NAME` of a new private folder.

    Raises:
        Refusal: the body declares no length, is larger than `max_bytes` or the room for it, or is too slow.
    """
    length = declared_length(request.scope)
    if not length:
        raise Refusal(411, "weights must be sent with their size in Content-Length")
    if length > max_bytes:
        raise Refusal(413, f"weights of this model have at most {max_bytes:,} bytes, and {length:,} are sent")
    try:
        folder = temporary_folder(length)
    except DiskError as error:
        raise Refusal(507, str(error)) from error
    try:
        deadline_s = upload_deadline_s(length)
        with anyio.fail_after(deadline_s):
            await _receive(request, Path(folder.name) / FILE_NAME, length)
    except TimeoutError as error:
        folder.cleanup()
        raise Refusal(408, f"the weights ({length:,} bytes) did not arrive whole within {deadline_s:.0f} s") from error
    except DiskError as error:
        folder.cleanup()
        raise Refusal(507, str(error)) from error
    except BaseException:  # the connection broke off
        folder.cleanup()
        raise
    return folder


async def _receive(request: Upload, path: Path, length: int) -> None:
    num_missing = length
    with writing(path, "the weights"), path.open("wb") as file:
        async for chunk in request.stream():
            num_missing -= len(chunk)
            if num_missing < 0:
                break
            file.write(chunk)
    if num_missing:
        raise Refusal(400, f"the weights must have the {length:,} bytes that Content-Length says")


def parse_broadcast(body: bytes, *, num_workers: int, max_bytes: int) -> dict[str, Any]:
    """Return the announcement of a broadcast, the fields of a `transfer.Broadcast`.

    Args:
        num_workers: of this server.
        max_bytes: largest size of all tensors together.

    Raises:
        Refusal: the body is no such announcement, or announces more than `max_bytes`.
    """
    try:
        message: Any = json.loads(body)
        rendezvous = Rendezvous(**message["rendezvous"])
        first_rank, buffer_bytes = message["first_rank"], message["buffer_bytes"]
        shapes = shapes_from_json(message["tensors"])
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise Refusal(400, f"the body must announce a broadcast: {type(error).__name__} {error}") from error
    _check_announced(rendezvous, first_rank, buffer_bytes)
    if first_rank + num_workers > rendezvous.world_size:
        raise Refusal(400, f"the group must have room for this server's {num_workers} workers from rank {first_rank}")
    size = sum(shape.num_bytes for shape in shapes)
    if size > max_bytes:
        raise Refusal(413, f"weights of this model have at most {max_bytes:,} bytes, and {size:,} are announced")
    known = {"rendezvous": asdict(rendezvous), "tensors": message["tensors"]}
    return known | {"first_rank": first_rank, "buffer_bytes": buffer_bytes}


def _check_announced(rendezvous: Rendezvous, first_rank: Any, buffer_bytes: Any) -> None:
    """Raise a Refusal if what another process has sent is of another type, or out of range."""
    texts = (rendezvous.name, rendezvous.host, rendezvous.nccl_id)
    if not all(isinstance(text, str) and len(text) <= _MAX_NAME for text in texts) or not rendezvous.name:
        raise Refusal(400, f"name, host and nccl_id of the rendezvous must have at most {_MAX_NAME} characters")
    limits = (
        (rendezvous.port, 2**16), (rendezvous.world_size, _MAX_WORKERS), (first_rank, _MAX_WORKERS),
        (buffer_bytes, _MAX_BUFFER_BYTES),
    )  # fmt: skip
    if not all(type(number) is int and 0 < number < limit for number, limit in limits):
        raise Refusal(400, "port, world_size, first_rank and buffer_bytes must be whole numbers from 1, not huge")
    if not isinstance(rendezvous.join_s, int | float) or not 0 < rendezvous.join_s <= _MAX_JOIN_S:
        raise Refusal(400, f"join_s must be a number of seconds, at most {_MAX_JOIN_S:g}")


def parse_routing_question(body: bytes) -> tuple[str, list[int]]:
    """Return (name of a request, layers whose experts are asked for).

    Raises:
        Refusal: the body is not such a question.
    """
    try:
        question: Any = json.loads(body)
        name, layers = question["name"], question["layers"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise Refusal(400, "the body must be a JSON object with name and layers") from error
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise Refusal(400, f"name must be that of a request, of at most {_MAX_NAME} characters")
    is_list = isinstance(layers, list) and 0 < len(layers) <= _MAX_LAYERS
    if not is_list or not all(type(layer) is int and 0 <= layer < _MAX_LAYERS for layer in layers):
        raise Refusal(400, f"layers must be a list of at most {_MAX_LAYERS} layer numbers")
    return name, layers
