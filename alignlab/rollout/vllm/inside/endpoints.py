"""Endpoints of a server beside vLLM's own, added by vLLM's plug-in entry point for endpoints.

    GET  /alignlab/about              description of the server: weights, model, sizes; checks that its engine lives
    PUT  /alignlab/weights/{version}  upload of new weights; answered with digests once they are in use
    POST /alignlab/broadcast/{version}  the same, by a process group with the trainer, which the request names
    POST /alignlab/release            the run that uploaded the weights needs the server no more
    POST /alignlab/routing            experts chosen for a request, where vLLM does not return them (on a CPU)

An update is one request, and its file is complete before anything changes: a trainer that dies in the middle leaves no
half update. Requests in flight wait meanwhile. With full weights, they go on under the new weights, and their earlier
tokens are computed again. With an adapter, they end with the adapter that they began with, which is unloaded later.
"""

from __future__ import annotations

import asyncio
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import State
from transformers import AutoTokenizer
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.platforms import current_platform

from alignlab.files.private_folders import PrivateFolder
from alignlab.models.sync_digests import algorithm_on
from alignlab.rollout.vllm import protocol
from alignlab.rollout.vllm.inside import uploads
from alignlab.rollout.vllm.inside.asgi import Refusal
from alignlab.rollout.vllm.inside.connections import use_bounded_connections
from alignlab.rollout.vllm.inside.token_guard import TokenGuard
from alignlab.rollout.vllm.inside.transfer import FILE
from alignlab.rollout.vllm.serialization import adapter_config
from alignlab.rollout.vllm.weight_group import BROKE_OFF

_ENGINE_DEADLINE_S = 4.0
router = APIRouter()


class Endpoints:
    """The plug-in that vLLM loads."""

    name = "alignlab"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and bound the connections of the server that is about to start."""
        use_bounded_connections()
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Create the state that the routes use."""
        assert engine_client is not None
        state.alignlab = ServedWeights(engine_client, state, args)
        await state.alignlab.start()


class ServedWeights:
    """The weights of this server, and their replacement.

    Attributes:
        version: `weights_version` in use; None before the first update, and after one that failed.
        digest: one digest of all tensors as they arrived.
        is_released: another run may take the server over at once.
    """

    def __init__(self, engine: Any, state: State, args: Namespace) -> None:
        self.version: str | None = None
        self.digest = ""
        self.is_released = True
        self._engine, self._models = engine, state.openai_serving_models
        self._config: Any = engine.model_config
        self._kv_cache: str = state.vllm_config.cache_config.cache_dtype
        self._lora: Any = state.vllm_config.lora_config
        self._uses_v2_model_runner = bool(state.vllm_config.use_v2_model_runner)
        self._adapters: dict[str, PrivateFolder] = {}
        self._update_lock, self._upload_lock = asyncio.Lock(), asyncio.Lock()
        self._cards: list[str] = []
        self._group = ""
        self._max_upload_bytes = uploads.max_upload_bytes(Path(args.model))
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
        dtype = str(self._config.dtype).removeprefix("torch.")
        self._identity = protocol.model_identity(self._config.hf_config, tokenizer, dtype)

    @property
    def records_routing(self) -> bool:
        """True if the experts chosen are fetched from here, rather than sent with each answer."""
        return bool(current_platform.is_cpu() and getattr(self._config.hf_config, "num_experts", 0))

    async def start(self) -> None:
        """Ask the workers for their GPUs, and begin to record experts, if that is done here."""
        self._cards = list(await self._engine.collective_rpc("alignlab_card"))
        if self.records_routing:
            await self._engine.collective_rpc("alignlab_record_routing")

    async def about(self) -> dict[str, Any]:
        """Return the description of this server.

        Raises:
            TimeoutError: the engine does not answer.
        """
        if not self._update_lock.locked():  # an engine that loads weights answers nothing else
            await asyncio.wait_for(self._engine.get_weight_version(), _ENGINE_DEADLINE_S)
        return {
            "version": self.version,
            "digest": self.digest,
            "digest_algorithm": algorithm_on(current_platform.device_type),
            "device": current_platform.device_type,
            "cards": self._cards,
            "group": self._group,
            "model_runner": 2 if self._uses_v2_model_runner else 1,
            "idle_s": 1e9 if self.is_released else time.monotonic() - TokenGuard.last_used,
            "identity": self._identity,
            "context_tokens": self._config.max_model_len,
            "quantization": self._config.quantization,
            "kv_cache": None if self._kv_cache == "auto" else self._kv_cache,
            "lora_rank": self._lora.max_lora_rank if self._lora else 0,
            "records_routing": self.records_routing,
        }

    async def replace(self, version: str, request: Request) -> dict[str, str]:
        """Receive weights and use them from now on; return the digest of each tensor as it arrived.

        Raises:
            Refusal: the upload is refused.
        """
        async with self._upload_lock:
            folder = await uploads.receive_upload(request, max_bytes=self._max_upload_bytes)
        path = Path(folder.name) / uploads.FILE_NAME
        try:
            async with self._update_lock:
                self.version, self.is_released = None, False
                adapter = adapter_config(path)
                if adapter is None:
                    arrived = await self._load_all(version, {"key": f"{FILE}{path}"})
                else:
                    arrived = await self._load_adapter(version, folder, adapter)
                self.version, self.digest = version, protocol.digest_of_all(arrived)
        finally:
            if version not in self._adapters:  # vLLM reads an adapter again after it evicted it
                folder.cleanup()
        return arrived

    async def receive(self, version: str, body: bytes) -> dict[str, str]:
        """Receive weights that a trainer broadcasts, and use them from now on; return the digest of each tensor.

        Args:
            body: announcement of the broadcast.

        Raises:
            Refusal: the announcement is refused.
        """
        broadcast = uploads.parse_broadcast(body, num_workers=len(self._cards), max_bytes=self._max_upload_bytes)
        async with self._update_lock:
            self.version, self.is_released, self._group = None, False, ""
            arrived = await self._load_all(version, {"broadcast": broadcast})
            self.version, self.digest = version, protocol.digest_of_all(arrived)
            self._group = broadcast["rendezvous"]["name"]
        return arrived

    async def routing(self, name: str, layers: list[int]) -> bytes:
        """Return and forget the experts chosen for a request, see `encode_routing`."""
        workers = await self._engine.collective_rpc("alignlab_send_routing", args=(name, layers))
        return bytes(workers[0])  # every worker of a model in parts computes the whole router

    async def _load_all(self, version: str, update_info: dict[str, Any]) -> dict[str, str]:
        engine = self._engine
        await engine.pause_generation(mode="keep")
        try:
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
            await engine.finish_weight_update(version)
            if not await engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("the prefix cache could not be dropped")
            arrived = protocol.digests_of_workers(await engine.collective_rpc("alignlab_arrived"))
        except BaseException:
            await engine.pause_generation(mode="abort")  # paused requests would wait for ever
            raise
        await engine.resume_generation()
        return arrived

    async def _load_adapter(self, version: str, folder: PrivateFolder, config: dict[str, Any]) -> dict[str, str]:
        (Path(folder.name) / "adapter_config.json").write_text(json.dumps(config))
        await self._unload_unused()
        await self._checked(
            self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=version, lora_path=folder.name))
        )
        self._adapters[version] = folder
        number = self._models.lora_requests[version].lora_int_id
        [arrived] = await self._engine.collective_rpc("alignlab_adapter_arrived", args=(number,))
        return dict(arrived)

    async def _unload_unused(self) -> None:
        """Unload the oldest adapters that exceed the limit, except those that requests in flight use."""
        running = {state.lora_name for state in self._engine.output_processor.request_states.values()}
        for name in list(self._adapters)[: len(self._adapters) + 1 - self._lora.max_loras]:
            if name not in running:
                number = self._models.lora_requests[name].lora_int_id
                await self._checked(self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name)))
                await self._engine.remove_lora(number)
                self._adapters.pop(name).cleanup()

    @staticmethod
    async def _checked(call: Any) -> None:
        """Await a call of vLLM's, and raise the error that it returns."""
        result = await call
        if isinstance(result, ErrorResponse):
            raise RuntimeError(result.error.message)


@router.get(protocol.ABOUT_PATH)
async def about(request: Request) -> JSONResponse:
    """Describe this server."""
    try:
        return JSONResponse(await request.app.state.alignlab.about())
    except Exception as error:  # also the error of an engine that died
        return JSONResponse({"error": f"the engine does not answer: {type(error).__name__} {error}"}, status_code=503)


@router.post(protocol.RELEASE_PATH)
async def release(request: Request) -> JSONResponse:
    """Let another run take the server over."""
    request.app.state.alignlab.is_released = True
    return JSONResponse({})


@router.put(protocol.WEIGHTS_PATH + "/{version}")
async def put_weights(version: str, request: Request) -> JSONResponse:
    """Replace the weights; the body is a safetensors file."""
    try:
        uploads.check_version(version)
        return JSONResponse({"arrived": await request.app.state.alignlab.replace(version, request)})
    except Refusal as refusal:
        return JSONResponse({"error": refusal.message}, refusal.status, {"Connection": "close"})
    except Exception as error:  # sent to the trainer, which stops
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=422)


@router.post(protocol.BROADCAST_PATH + "/{version}")
async def post_broadcast(version: str, request: Request) -> JSONResponse:
    """Replace the weights by those that the trainer broadcasts."""
    try:
        uploads.check_version(version)
        return JSONResponse({"arrived": await request.app.state.alignlab.receive(version, await request.body())})
    except Refusal as refusal:
        return JSONResponse({"error": refusal.message}, refusal.status)
    except Exception as error:  # of vLLM's worker, whose errors arrive as texts
        status = protocol.BROKE_OFF_STATUS if BROKE_OFF in str(error) else 422
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=status)


@router.post(protocol.ROUTING_PATH)
async def post_routing(request: Request) -> Response:
    """Answer with the experts chosen for one request."""
    try:
        name, layers = uploads.parse_routing_question(await request.body())
        experts = await request.app.state.alignlab.routing(name, layers)
        return Response(experts, media_type="application/octet-stream")
    except Refusal as refusal:
        return JSONResponse({"error": refusal.message}, refusal.status)
    except Exception as error:  # no such request, or no such layer
        return JSONResponse({"error": f"no experts are known: {type(error).__name__}: {error}"}, status_code=404)
