"""Weights that will be spread over ranks are loaded without a copy for each rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from alignlab.models.hub.checkpoints import load_model
from tests.ranks import ROOT, run_ranks

_SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 512, "intermediate_size": 64, "moe_intermediate_size": 1024, "num_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture in bfloat16, whose experts lie in the file one by one."""
    folder = tmp_path_factory.mktemp("loading")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE)).to(torch.bfloat16).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    def load(strategy: str) -> list[dict[str, Any]]:
        done = run_ranks(str(ROOT / "tests/loop/rank_loading.py"), str(folder), strategy)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((folder / f"{strategy}.{rank}.json").read_text()) for rank in (0, 1)]

    return load


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_no_rank_has_a_copy_of_all_weights(
    strategy: str, folder: Path, loaded: Callable[[str], list[dict[str, Any]]]
) -> None:
    expected: Any = load_model(str(folder / "model"), dtype=torch.float32)
    whole_mib = sum(parameter.nbytes for parameter in expected.parameters()) / 2**20
    assert whole_mib > 190
    for memory in loaded(strategy):
        # With a copy of its own it is over 1 when loaded, and over 1.5 with its part and what is imported until then.
        assert memory["loaded"] - memory["before"] < 0.5 * whole_mib, memory
        assert memory["spread"] - memory["before"] < 1.3 * whole_mib, memory
    for rank in (0, 1):
        weights = load_file(folder / f"{strategy}.{rank}.safetensors")
        names = {f"model.{name}": parameter for name, parameter in expected.named_parameters()}
        assert weights.keys() == names.keys()
        assert all(torch.equal(weights[name], parameter) for name, parameter in names.items())
