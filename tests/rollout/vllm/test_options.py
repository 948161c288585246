"""Options that vLLM is started with, and settings that it could not run; these tests need no vLLM."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import ServedCache, VLLMServerSettings, VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import add_lora
from alignlab.rollout.verification import GATES, ROUNDED_GATE, default_gate
from alignlab.rollout.vllm import options as vllm_options
from alignlab.rollout.vllm import weight_broadcast
from alignlab.rollout.vllm.installation import MODEL_RUNNER_VARIABLE
from alignlab.rollout.vllm.options import (
    check_quantization,
    check_served_cache,
    engine_options,
    require_gpus,
    sync_adapter_only,
)
from alignlab.rollout.vllm.servers import ServerBackend
from tests.models.attention_kinds import LATENT
from tests.rollout.vllm.conftest import DENSE, QWEN3_MOE, make_model


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that pretends a GPU of a compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize("kind", [VLLMSettings, VLLMServerSettings])
def test_one_gpu_needs_no_option_and_several_are_vllms_workers(kind: Any) -> None:
    model = make_model(DENSE)
    assert "tensor_parallel_size" not in engine_options(kind(), model, adapter_rank=0, on_cpu=True)
    options = engine_options(kind(tensor_parallel=2), model, adapter_rank=0, on_cpu=True)
    assert options["tensor_parallel_size"] == 2 and options["distributed_executor_backend"] == "mp"


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel is 3, and must divide the model's 2 .* one of 1, 2"):
        engine_options(VLLMSettings(tensor_parallel=3), make_model(DENSE), adapter_rank=0, on_cpu=True)


@pytest.mark.parametrize("kind", [VLLMSettings, VLLMServerSettings])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["latent_attention", "full_attention"], **LATENT}, "latent_attention, which vLLM"),
        ({"layer_types": ["gated_attention"] * 2}, "gated_attention, which vLLM serves in models of a Hub family al"),
        ({"layer_types": ["sliding_gated_attention"] * 2, "sliding_window": 6}, "holds sliding_gated_attention, and"),
    ],
    ids=["latent", "gated", "gated window"],
)
def test_attention_that_vllm_cannot_compute_is_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*; use rollout.engine: embedded"):
        engine_options(kind(), make_model(DENSE | changes), adapter_rank=0, on_cpu=True)


GEMMA2: dict[str, Any] = {
    "norm_type": "zero_centered_rmsnorm", "norm_position": "sandwich", "embedding_multiplier": 8.0,
    "hidden_act": "gelu_pytorch_tanh",
}  # of hidden size 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_attn": True}, "parallel_attn is True, which .* embedded, or parallel_attn: False"),
        ({**GEMMA2, "embedding_multiplier": 7.0}, "norm_type is zero_centered_rms.* or norm_type: rmsnorm, "),
        (
            {"hidden_act": "relu", "mlp_gated": False},
            "hidden_act is relu, mlp_gated is False, which .* embedded, or hidden_act: silu, mlp_gated: True",
        ),
        ({"norm_position": "sandwich"}, "norm_position is sandwich, which .* embedded, or norm_position: pre"),
        ({"query_pre_attn_scalar": 3}, "query_pre_attn_scalar is 3, which .* embedded, or query_pre_attn_scalar: None"),
    ],
    ids=["parallel", "norm", "feed-forward", "places", "scale"],
)
def test_blocks_that_vllm_cannot_compute_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_options(VLLMSettings(), make_model(DENSE | changes), adapter_rank=0, on_cpu=True)


@pytest.mark.parametrize("changes", [GEMMA2, {"fused_projections": True}, {"hidden_act": "gelu"}])
def test_blocks_of_a_family_are_left_to_vllm_s_class_of_it(changes: dict[str, Any]) -> None:
    assert engine_options(VLLMSettings(), make_model(DENSE | changes), adapter_rank=0, on_cpu=True)


def test_an_adapter_is_merged_where_several_workers_would_hold_parts_of_it() -> None:
    policy = add_lora(make_model(DENSE), LoraSettings(rank=4))
    assert sync_adapter_only(VLLMSettings(), policy, on_cpu=False)
    assert not sync_adapter_only(VLLMSettings(tensor_parallel=2), policy, on_cpu=False)
    with pytest.raises(ConfigError, match=r"sync is .*adapter.* merged or auto with tensor_parallel 2"):
        VLLMSettings(tensor_parallel=2, sync="adapter")


def test_weights_that_are_broadcast_are_merged_and_an_adapter_alone_is_refused() -> None:
    policy = add_lora(make_model(DENSE), LoraSettings(rank=4))
    assert sync_adapter_only(VLLMServerSettings(transfer="file"), policy, on_cpu=False)
    assert not sync_adapter_only(VLLMServerSettings(transfer="broadcast"), policy, on_cpu=False)
    with pytest.raises(ConfigError, match=r"transfer is .*broadcast.* auto or file with sync: adapter"):
        VLLMServerSettings(transfer="broadcast", sync="adapter")


@pytest.mark.parametrize(
    ("transfer", "device", "card", "expected"),
    [
        ("auto", "cpu", "", False), ("file", "cpu", "", False), ("broadcast", "cpu", "", True),
        ("auto", "cuda", "b", True), ("auto", "cuda", "a", False), ("file", "cuda", "b", False),
        ("broadcast", "cuda", "b", True),
    ],
)  # fmt: skip
def test_auto_broadcasts_between_gpus_of_their_own_and_else_sends_a_file(
    transfer: Any, device: str, card: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_broadcast, "card_of", lambda device: "" if device.type == "cpu" else "a")
    monkeypatch.setattr(weight_broadcast.importlib.util, "find_spec", lambda name: object())
    abouts = {"http://0": {"device": device, "cards": [card]}}
    settings = VLLMServerSettings(transfer=transfer)
    assert weight_broadcast.uses_broadcast(settings, torch.device(device), abouts) == expected


@pytest.mark.parametrize("name", ["fp8", "fp8_per_channel", "fp8_per_block"])
def test_fp8_is_an_option_of_vllm_on_a_gpu_that_has_it(name: Any, gpu: Any) -> None:
    gpu(8, 9)
    model = make_model(DENSE, dtype=torch.bfloat16)
    options = engine_options(VLLMSettings(quantization=name), model, adapter_rank=0, on_cpu=False)
    assert options["quantization"] == {"fp8": "fp8_per_tensor"}.get(name, name)
    plain = engine_options(VLLMSettings(), model, adapter_rank=0, on_cpu=False)
    assert "quantization" not in plain and "kv_cache_dtype" not in plain


def test_quantization_is_refused_where_vllm_does_not_have_it(gpu: Any) -> None:
    settings = VLLMSettings(quantization="fp8")
    check_quantization(VLLMSettings())
    with pytest.raises(ConfigError, match=r"rollout\.quantization is fp8, and must be null on a CPU"):
        check_quantization(settings)
    gpu(8, 0)
    with pytest.raises(ConfigError, match=r"on a GPU of compute capability 8\.0, which has no fp8"):
        check_quantization(settings)
    check_quantization(VLLMSettings(quantization="int8"))
    gpu(9, 0)
    check_quantization(settings)
    with pytest.raises(ConfigError, match="for a model in float32, which vLLM does not quantize"):
        engine_options(settings, make_model(DENSE), adapter_rank=0, on_cpu=False)


def test_int8_is_for_experts_which_alone_vllm_rounds(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(vllm_options, "check_returns_experts", lambda: None)
    settings = VLLMSettings(quantization="int8")
    with pytest.raises(ConfigError, match="int8, for which vLLM rounds experts alone, and the model has none; use fp8"):
        engine_options(settings, make_model(DENSE, dtype=torch.bfloat16), adapter_rank=0, on_cpu=False)
    sparse = make_model(QWEN3_MOE, dtype=torch.bfloat16)
    chosen = engine_options(settings, sparse, adapter_rank=0, on_cpu=False)["quantization"]
    assert chosen == "int8_per_channel_weight_only"


def test_a_rounded_cache_is_vllms_option_and_refused_where_its_attention_reads_it_wrongly(gpu: Any) -> None:
    model = make_model(DENSE)
    for name in ("fp8", "fp8_e5m2"):
        chosen = engine_options(VLLMSettings(kv_cache=name), model, adapter_rank=0, on_cpu=True)
        assert chosen["kv_cache_dtype"] == name
    settings = VLLMSettings(kv_cache="int8_per_token_head")
    with pytest.raises(ConfigError, match="kv_cache is int8_per_token_head, and must be fp8 or fp8_e5m2 on a CPU"):
        check_served_cache(settings)
    with pytest.raises(ConfigError, match=r"rollout\.kv_cache is fp8_per_token_head"):
        engine_options(VLLMSettings(kv_cache="fp8_per_token_head"), model, adapter_rank=0, on_cpu=True)
    gpu(9, 0)
    chosen = engine_options(settings, model, adapter_rank=0, on_cpu=False)
    assert chosen["kv_cache_dtype"] == "int8_per_token_head"


@pytest.mark.vllm
def test_vllm_has_what_is_passed_through() -> None:
    from vllm.config.cache import CacheDType
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    assert set(vllm_options.VLLM_QUANTIZATIONS.values()) <= set(ONLINE_QUANT_SHORTHAND_NAMES)
    assert set(get_args(ServedCache)) <= set(get_args(CacheDType))


def test_a_model_that_servers_cannot_run_is_refused_before_they_are_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ConfigError, match="for a model in float32, which vLLM does not quantize"):
        ServerBackend(make_model(DENSE), tokenizer, VLLMServerSettings(quantization="fp8"))
    with pytest.raises(ConfigError, match="tensor_parallel is 3, and must divide the model's 2 attention heads"):
        ServerBackend(make_model(DENSE), tokenizer, VLLMServerSettings(tensor_parallel=3))
    ServerBackend(make_model(DENSE, dtype=torch.bfloat16), tokenizer, VLLMServerSettings(quantization="fp8"))


def test_the_canarys_gate_is_wider_for_a_quantized_engine() -> None:
    assert default_gate(torch.bfloat16, None) == GATES[torch.bfloat16] < ROUNDED_GATE
    assert default_gate(torch.bfloat16, "fp8") == ROUNDED_GATE
    assert default_gate(torch.float32, None, "fp8") == ROUNDED_GATE


def test_more_workers_than_gpus_are_refused() -> None:
    require_gpus(2, 2)
    with pytest.raises(ConfigError, match="tensor_parallel is 4, and this process sees 2 GPUs; use 2 or less"):
        require_gpus(4, 2)


def test_a_mixture_on_a_gpu_needs_the_model_runner_that_returns_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(QWEN3_MOE)
    monkeypatch.setenv(MODEL_RUNNER_VARIABLE, "1")
    assert engine_options(VLLMSettings(), model, adapter_rank=0, on_cpu=False)["enable_return_routed_experts"]
    monkeypatch.setenv(MODEL_RUNNER_VARIABLE, "0")
    with pytest.raises(ConfigError, match=f"{MODEL_RUNNER_VARIABLE} is 0, and must be 1 for a mixture of experts"):
        engine_options(VLLMSettings(), model, adapter_rank=0, on_cpu=False)
    for options in (
        engine_options(VLLMSettings(), model, adapter_rank=0, on_cpu=True),
        engine_options(VLLMSettings(), make_model(DENSE), adapter_rank=0, on_cpu=False),
    ):
        assert "enable_return_routed_experts" not in options
