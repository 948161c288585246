"""What a server answers beside vLLM's own endpoints, added by vLLM's plug-in entry point for endpoints.

    GET  /alignlab/about              who this server is, and of which version its weights are; the engine is asked too
    PUT  /alignlab/weights/{version}  new weights, in use and digested when it returns
    POST /alignlab/release            the run that gave them needs them no more
    POST /alignlab/routing            experts chosen for a request, where vLLM does not tell (on a CPU)

An update is one call, so that a trainer that dies in the middle leaves nothing half done: the file is whole before
anything is touched. Requests that are running wait, and go on under the new weights, their earlier tokens computed
again; under an adapter they go on with the adapter that they began with, which stays until they are done.
"""

from __future__ import annotations

import asyncio
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from transformers import AutoTokenizer
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.platforms import current_platform

from alignlab.rollout.vllm.server.access import TokenGuard
from alignlab.rollout.vllm.server.asgi import Refusal
from alignlab.rollout.vllm.server.connections import use_bounded_connections
from alignlab.rollout.vllm.server.identity import digest_of_all, model_identity
from alignlab.rollout.vllm.server.private_folders import PrivateFolder
from alignlab.rollout.vllm.server.uploads import (
    FILE_NAME,
    check_version,
    max_upload_bytes,
    received,
    routing_question,
)
from alignlab.rollout.vllm.server.wire import adapter_config
from alignlab.rollout.vllm.transfer import FILE

_ENGINE_S = 4.0
router = APIRouter(prefix="/alignlab")


class Endpoints:
    """The plug-in."""

    name = "alignlab"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and bound the connections of the server that is about to be started."""
        use_bounded_connections()
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Make what the routes use."""
        assert engine_client is not None
        state.alignlab = Weights(engine_client, state, args)
        await state.alignlab.start()


class Weights:
    """The weights that this server was given.

    Attributes:
        version: of the weights in use; None before the first update, and since one that failed.
        digest: of all their tensors, as they arrived.
        released: whether another run may have the server, whenever it was used last.
    """

    def __init__(self, engine: Any, state: State, args: Namespace) -> None:
        self.version: str | None = None
        self.digest = ""
        self.released = True
        self._engine, self._models = engine, state.openai_serving_models
        self._config: Any = engine.model_config
        self._lora: Any = state.vllm_config.lora_config
        self._adapters: dict[str, PrivateFolder] = {}
        self._turn, self._upload = asyncio.Lock(), asyncio.Lock()
        self._max_upload_bytes = max_upload_bytes(Path(args.model))
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
        dtype = str(self._config.dtype).removeprefix("torch.")
        self._identity = model_identity(self._config.hf_config, tokenizer, dtype)

    @property
    def records_routing(self) -> bool:
        """Whether experts chosen are asked for here, and not sent with each answer."""
        return bool(current_platform.is_cpu() and getattr(self._config.hf_config, "num_experts", 0))

    async def start(self) -> None:
        """Begin to record, where that is done here."""
        if self.records_routing:
            await self._engine.collective_rpc("alignlab_record_routing")

    async def about(self) -> dict[str, Any]:
        """What a trainer must know.

        Raises:
            TimeoutError: the engine does not answer.
        """
        if not self._turn.locked():  # while it loads weights it answers nothing else
            await asyncio.wait_for(self._engine.get_weight_version(), _ENGINE_S)
        return {
            "version": self.version,
            "digest": self.digest,
            "idle_s": 1e9 if self.released else time.monotonic() - TokenGuard.last_used,
            "identity": self._identity,
            "context_tokens": self._config.max_model_len,
            "lora_rank": self._lora.max_lora_rank if self._lora else 0,
            "records_routing": self.records_routing,
        }

    async def take(self, version: str, request: Request) -> dict[str, str]:
        """Receive weights and put them to use; returns the digest of each tensor as it arrived.

        Raises:
            Refusal: they are not received.
        """
        async with self._upload:
            folder = await received(request, max_bytes=self._max_upload_bytes)
        path = Path(folder.name) / FILE_NAME
        try:
            async with self._turn:
                self.version, self.released = None, False
                adapter = adapter_config(path)
                if adapter is None:
                    arrived = await self._take_all(version, path)
                else:
                    arrived = await self._take_adapter(version, folder, adapter)
                self.version, self.digest = version, digest_of_all(arrived)
        finally:
            if version not in self._adapters:  # vLLM reads an adapter again where it had to give up its place
                folder.cleanup()
        return arrived

    async def routing(self, name: str, layers: list[int]) -> str:
        """Experts chosen for a request, which are forgotten here."""
        [text] = await self._engine.collective_rpc("alignlab_send_routing", args=(name, layers))
        return str(text)

    async def _take_all(self, version: str, path: Path) -> dict[str, str]:
        engine = self._engine
        await engine.pause_generation(mode="keep")
        try:
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info={"key": f"{FILE}{path}"}))
            await engine.finish_weight_update(version)
            if not await engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("the prefix cache could not be dropped")
            [arrived] = await engine.collective_rpc("alignlab_arrived")
        except BaseException:
            await engine.pause_generation(mode="abort")  # what waits would wait for ever
            raise
        await engine.resume_generation()
        return dict(arrived)

    async def _take_adapter(
        self, version: str, folder: PrivateFolder, config: dict[str, Any]
    ) -> dict[str, str]:
        (Path(folder.name) / "adapter_config.json").write_text(json.dumps(config))
        await self._drop_unused()
        await self._done(
            self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=version, lora_path=folder.name))
        )
        self._adapters[version] = folder
        number = self._models.lora_requests[version].lora_int_id
        [arrived] = await self._engine.collective_rpc("alignlab_adapter_arrived", args=(number,))
        return dict(arrived)

    async def _drop_unused(self) -> None:
        """Unload the oldest adapters that are too many, and that no request is running with."""
        running = {state.lora_name for state in self._engine.output_processor.request_states.values()}
        for name in list(self._adapters)[: len(self._adapters) + 1 - self._lora.max_loras]:
            if name not in running:
                number = self._models.lora_requests[name].lora_int_id
                await self._done(self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name)))
                await self._engine.remove_lora(number)
                self._adapters.pop(name).cleanup()

    @staticmethod
    async def _done(call: Any) -> None:
        result = await call
        if isinstance(result, ErrorResponse):
            raise RuntimeError(result.error.message)


@router.get("/about")
async def about(request: Request) -> JSONResponse:
    """Who this server is."""
    try:
        return JSONResponse(await request.app.state.alignlab.about())
    except Exception as error:  # also what the engine died of
        return JSONResponse({"error": f"the engine does not answer: {type(error).__name__} {error}"}, status_code=503)


@router.post("/release")
async def release(request: Request) -> JSONResponse:
    """Another run may have the server."""
    request.app.state.alignlab.released = True
    return JSONResponse({})


@router.put("/weights/{version}")
async def put_weights(version: str, request: Request) -> JSONResponse:
    """New weights; the body is a safetensors file."""
    try:
        check_version(version)
        return JSONResponse({"arrived": await request.app.state.alignlab.take(version, request)})
    except Refusal as refusal:
        return JSONResponse({"error": refusal.message}, refusal.status, {"Connection": "close"})
    except Exception as error:  # told to the trainer, which stops
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=422)


@router.post("/routing")
async def post_routing(request: Request) -> JSONResponse:
    """Experts chosen for one request."""
    try:
        name, layers = routing_question(await request.body())
        return JSONResponse({"routed_experts": await request.app.state.alignlab.routing(name, layers)})
    except Refusal as refusal:
        return JSONResponse({"error": refusal.message}, refusal.status)
    except Exception as error:  # it has no such request, or no such layer
        return JSONResponse({"error": f"no experts are known: {type(error).__name__}: {error}"}, status_code=404)
