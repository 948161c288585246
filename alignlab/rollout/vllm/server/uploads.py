"""What a trainer sends to a server, checked before it is used: new weights, and questions about experts."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import anyio

from alignlab.errors import DiskError
from alignlab.library_errors import writing
from alignlab.rollout.vllm.server.asgi import Refusal, Scope, declared_length
from alignlab.rollout.vllm.server.private_folders import PrivateFolder, temporary_folder

FILE_NAME = "adapter_model.safetensors"
"""Of what was received; the name that vLLM looks for in an adapter's folder."""
SLOWEST_BYTES_PER_S = 2**20
_GRACE_S = 60.0
_SPARE_BYTES = 64 * 2**20
_VERSION = re.compile(r"[0-9A-Za-z]{1,64}-\d{1,18}-\d{1,18}")
_MAX_LAYERS, _MAX_NAME = 4096, 256


class Upload(Protocol):
    """A request whose body comes in parts, as Starlette's."""

    scope: Scope

    def stream(self) -> AsyncIterator[bytes]:
        """The parts."""
        ...


def upload_deadline_s(num_bytes: int) -> float:
    """Return how long a body may take, by its size: a minute, and a second for each MiB."""
    return _GRACE_S + num_bytes / SLOWEST_BYTES_PER_S


def max_upload_bytes(folder: Path) -> int:
    """Return the most bytes of new weights for a checkpoint: twice its own, for a head that is no longer tied."""
    return 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) + _SPARE_BYTES


def check_version(version: str) -> None:
    """Raise if `version` is no name of weights.

    Raises:
        Refusal: it is none.
    """
    if not _VERSION.fullmatch(version):
        raise Refusal(422, "the version of weights must be RUN-VERSION-UPDATE, such as 0f3a-12-13")


async def received(request: Upload, *, max_bytes: int) -> PrivateFolder:
    """Receive a body into the file `FILE_NAME` of a new private folder.

    Raises:
        Refusal: the body tells no length, is larger than `max_bytes` or the room for it, or is too slow.
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
    left = length
    with writing(path, "the weights"), path.open("wb") as file:
        async for part in request.stream():
            left -= len(part)
            if left < 0:
                break
            file.write(part)
    if left:
        raise Refusal(400, f"the weights must have the {length:,} bytes that Content-Length says")


def routing_question(body: bytes) -> tuple[str, list[int]]:
    """Return the request's name and the layers that a question about experts asks for.

    Raises:
        Refusal: it does not.
    """
    try:
        asked: Any = json.loads(body)
        name, layers = asked["name"], asked["layers"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise Refusal(400, "the body must be a JSON object with name and layers") from error
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise Refusal(400, f"name must be that of a request, of at most {_MAX_NAME} characters")
    right = isinstance(layers, list) and 0 < len(layers) <= _MAX_LAYERS
    if not right or not all(type(layer) is int and 0 <= layer < _MAX_LAYERS for layer in layers):
        raise Refusal(400, f"layers must be a list of at most {_MAX_LAYERS} numbers of layers")
    return name, layers
