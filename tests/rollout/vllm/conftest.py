"""vLLM itself, in this process. Its engines are made once a file: each takes seconds to start."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import VLLMSettings
from alignlab.models.checkpoints import new_model
from tests.rollout.conftest import VOCAB

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
