"""vLLM itself, in this process. Its engines are made once a file: each takes seconds to start."""

from __future__ import annotations

import importlib.util
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import VLLMServerSettings, VLLMSettings
from alignlab.models.checkpoints import new_model
from alignlab.models.export import write_base
from tests.rollout.conftest import VOCAB
from tests.rollout.vllm.stand_in import RUN, StandIn, weights

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
# Shapes that no Hub family has.
OWN_DENSE = DENSE | {
    "use_qk_norm": True, "attention_bias": True, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6,
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
    """A random model whose vocabulary is that of the tests' tokenizer."""
    torch.manual_seed(seed)
    return new_model(architecture, vocab_size=VOCAB, dtype=dtype)


@pytest.fixture(scope="module")
def make_vllm(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Any]]:
    """vLLM on a model; other keywords are the settings'.

    Engines stay to the end of the file: vLLM's groups of ranks are the process's, and go with the first engine.
    """
    made: list[Any] = []
    defaults = {"cache_gib": 0.1, "block_size": 32, "canary_every_updates": 1, "canary_new_tokens": 8}

    def make(model: Any, **settings: Any) -> Any:
        from alignlab.rollout.engines import make_engine

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own, when it is imported and started
            made.append(
                make_engine(model, tokenizer, VLLMSettings(**defaults | settings))
            )
            return made[-1]

    yield make
    for engine in made:
        engine.close()


SMALL: dict[str, Any] = {
    "cache_gib": 0.1, "block_size": 32, "canary_every_updates": 1, "canary_new_tokens": 8, "memory_frac": 0.2,
}
PATIENCE: dict[str, Any] = {"health_every_s": 0.1, "request_timeout_s": 60, "reconnect_s": 60}


def free_address() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def serve(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Servers of a model, each in processes of its own, up; their settings, and the processes."""
    from alignlab.rollout.vllm.server.process import ServerProcess, end_all

    started: list[ServerProcess] = []

    def start(model: Any, *, count: int = 1, lora_rank: int = 0, **settings: Any) -> tuple[Any, list[ServerProcess]]:
        from alignlab.models.attention import causal_lm
        from alignlab.rollout.vllm.options import adapter_options, engine_options, merged_options
        from alignlab.rollout.vllm.server.process import make_server, wait_until_up

        addresses = tuple(free_address() for _ in range(count))
        asked = VLLMServerSettings(servers=addresses, **SMALL | PATIENCE | settings)
        folder = Path(tmp_path_factory.mktemp("served"))
        write_base(model, folder)
        tokenizer.save_pretrained(folder)
        lm = causal_lm(model)
        sparse = bool(getattr(lm.config, "sparse_layers", ()))
        options = engine_options(asked, dtype=lm.dtype, context_tokens=128, on_cpu=True, sparse=sparse)
        versions = asked.max_staleness + 1
        options |= adapter_options(lora_rank, num_versions=versions) if lora_rank else merged_options()
        servers = [make_server(address, folder, options) for address in addresses]
        for server in servers:
            server.start()
        started.extend(servers)
        for server in servers:
            wait_until_up(server)
        return asked, servers

    yield start
    for server in started:
        server.stop(signal.SIGKILL)
    end_all(started)


@pytest.fixture(scope="module")
def make_client(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Any]]:
    """The rollout engine of some servers."""
    made: list[Any] = []

    def make(model: Any, settings: VLLMServerSettings) -> Any:
        from alignlab.rollout.engines import make_engine

        made.append(make_engine(model, tokenizer, settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def start() -> Iterator[Callable[..., StandIn]]:
    """Starts stand-ins, which end with the test."""
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
    """Pools of stand-ins that have been given weights."""
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", "a-token-of-the-tests")
    from alignlab.rollout.vllm.server.pool import ServerPool

    pools: list[ServerPool] = []

    def make(*servers: StandIn, layers: list[int] | None = None, **settings: Any) -> ServerPool:
        addresses = tuple(server.address for server in servers)
        asked = VLLMServerSettings(servers=addresses, **{"health_every_s": 0.01, "reconnect_s": 30} | settings)
        pool = ServerPool(asked, {"vocab_size": 10}, layers or [], run=RUN, rank=0, check=lambda about: None)
        pools.append(pool)
        pool.open()
        pool.put(weights(tmp_path, 1))
        return pool

    yield make
    for pool in pools:
        pool.close()
