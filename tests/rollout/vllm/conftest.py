"""Engines of the real vLLM, made once for each test file, since each takes seconds to start; and stand-in servers."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import VLLMServerSettings, VLLMSettings
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.hub.export import write_base
from alignlab.rollout.vllm.launch import ServerProcess
from tests.forks import Fork, ForkServer
from tests.rollout.conftest import VOCAB
from tests.rollout.vllm.stand_in import RUN, StandIn, weights

FORKS = ForkServer("tests.rollout.vllm.forked")
INSTALLED = importlib.util.find_spec("vllm") is not None
# Sizes that vLLM's kernels take on a CPU: hidden and expert sizes are multiples of 32, and so is a head's.
DENSE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2,
}
TIED = DENSE | {"tie_word_embeddings": True}
QWEN3_MOE = DENSE | {
    "use_qk_norm": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}
# Architectures that no Hub family has.
OWN_DENSE = DENSE | {
    "use_qk_norm": True, "attention_bias": True, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6,
}
OWN_ATTENTION = DENSE | {
    "use_qk_norm": True, "no_rope_layers": [1, 0], "attention_sinks": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
OWN_MOE = QWEN3_MOE | {
    "scoring_func": "sigmoid", "n_shared_experts": 1, "router_bias_update_rate": 0.01, "routed_scaling_factor": 1.5,
    "mlp_layer_types": ["dense", "sparse"],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where vLLM is not installed."""
    for item in items:
        if item.get_closest_marker("vllm") and not INSTALLED:
            item.add_marker(pytest.mark.skip(reason="needs vLLM"))


def make_model(architecture: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model whose vocabulary is that of the tests' tokenizer."""
    torch.manual_seed(seed)
    return new_model(architecture, vocab_size=VOCAB, dtype=dtype)


class ForkedWorker(ForkServerProcess):
    """A worker of a vLLM that is spread over processes, forked from one that has imported vLLM."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)

    def start(self) -> None:
        """Start the process."""
        FORKS.start(super())

    def run(self) -> None:
        """Be the worker, in the forked process."""
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class WorkerContext(ForkServerContext):
    """Takes the place of the context by which vLLM starts new interpreters."""

    Process = ForkedWorker


@pytest.fixture(scope="module")
def make_vllm(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Any]]:
    """Make a rollout engine with vLLM in this process, on a model; other keywords are settings.

    Engines live to the end of the file: vLLM's groups of ranks belong to the process, and go with the first engine.
    """
    engines: list[Any] = []
    defaults = {"cache_gib": 0.1, "block_size": 32, "canary_every_updates": 1, "canary_new_tokens": 8}

    def make(model: Any, **settings: Any) -> Any:
        from alignlab.rollout.engine import make_engine

        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # vLLM's own, when it is imported and started
            importlib.import_module("alignlab.rollout.vllm.in_process")
            gc.freeze()  # the start and the end of an engine collect, again and again
            if settings.get("tensor_parallel", 1) > 1:
                from vllm.v1.executor import multiproc_executor

                patch.setattr(multiproc_executor, "get_mp_context", WorkerContext)
            engines.append(make_engine(model, tokenizer, VLLMSettings(**defaults | settings)))
            return engines[-1]

    yield make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        for engine in engines:
            engine.close()
    if engines:  # collect them, once, and leave out of collections what was imported
        engines.clear()
        gc.unfreeze()
        gc.collect()
        gc.freeze()


SMALL: dict[str, Any] = {
    "cache_gib": 0.1, "block_size": 32, "canary_every_updates": 1, "canary_new_tokens": 8, "memory_frac": 0.2,
}
PATIENCE: dict[str, Any] = {"health_every_s": 0.1, "request_timeout_s": 60, "reconnect_s": 60}


def free_address() -> str:
    """Return an address of this machine at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def wait_until_up(server: Any) -> None:
    """Wait until a started server process answers; an error if it ends instead."""
    while not server.is_healthy():
        assert server.process.poll() is None, "the server ended before it was up; see vLLM's messages above"
        time.sleep(0.5)


class ForkedServer(ServerProcess):
    """A server's process, forked from one that has imported vLLM."""

    def start(self) -> None:
        """Start the process; its output goes to standard error."""
        self.was_up, self.started_at = False, time.monotonic()
        with mock.patch.dict(os.environ, self.environment):
            self.process = Fork(FORKS, self.command[1:], self.environment)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def serve(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Start servers of a model, each in its own processes; return their settings and the processes once they are up.

    With `forked` false, they are started as users' servers are: each process imports vLLM, in many seconds.
    """
    from alignlab.rollout.vllm.launch import end_all

    started: list[ServerProcess] = []

    def start(
        model: Any, *, count: int = 1, lora_rank: int = 0, forked: bool = True, **settings: Any
    ) -> tuple[Any, list[ServerProcess]]:
        from alignlab.rollout.vllm.launch import make_server
        from alignlab.rollout.vllm.options import engine_options

        addresses = tuple(free_address() for _ in range(count))
        server_settings = VLLMServerSettings(servers=addresses, **SMALL | PATIENCE | settings)
        folder = Path(tmp_path_factory.mktemp("served"))
        write_base(model, folder)
        tokenizer.save_pretrained(folder)
        options = engine_options(server_settings, model, adapter_rank=lora_rank, on_cpu=True)
        servers = [make_server(address, folder, options) for address in addresses]
        if forked:
            servers = [ForkedServer(server.address, server.command, server.environment) for server in servers]
        for server in servers:
            server.start()
        started.extend(servers)
        for server in servers:
            wait_until_up(server)
        return server_settings, servers

    yield start
    for server in started:
        server.send_signal(signal.SIGKILL)
    end_all(started)


@pytest.fixture(scope="module")
def make_client(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Any]]:
    """Make the rollout engine of started servers."""
    engines: list[Any] = []

    def make(model: Any, settings: VLLMServerSettings) -> Any:
        from alignlab.rollout.engine import make_engine

        engines.append(make_engine(model, tokenizer, settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def start() -> Iterator[Callable[..., StandIn]]:
    """Start stand-ins, which end with the test."""
    started: list[StandIn] = []

    def make(port: int = 0) -> StandIn:
        started.append(StandIn(port))
        return started[-1]

    yield make
    for server in started:
        if server.socket.fileno() >= 0:
            server.die()


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Make pools of stand-ins that have been given weights."""
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", "a-token-of-the-tests")
    from alignlab.rollout.vllm.pool import ServerPool

    pools: list[ServerPool] = []

    def make(*servers: StandIn, layers: list[int] | None = None, **settings: Any) -> ServerPool:
        addresses = tuple(server.address for server in servers)
        server_settings = VLLMServerSettings(
            servers=addresses, **{"health_every_s": 0.01, "reconnect_s": 30} | settings
        )
        pool = ServerPool(
            server_settings, lambda address, about: None, layers or [], run=RUN, rank=0, vocab_size=10
        )
        pools.append(pool)
        pool.open()
        pool.put(weights(tmp_path, 1))
        return pool

    yield make
    for pool in pools:
        pool.close()
