"""Memory of models of real sizes, by tensors without values: activations of a pack, and the engine's cache.

FlexAttention is replaced by a function that keeps what FlexAttention keeps. What is measured of a few layers is
extrapolated to all: a layer keeps the same as the next.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alignlab.config.model import LoraSettings
from alignlab.models import layout
from alignlab.models.adapters import add_lora
from alignlab.models.cache_spec import cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, hidden_states
from alignlab.models.routing import RoutingRecord
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.types import Segments

NUM_TOKENS = 4096
DENSE_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}
MIXTURE_30B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "use_qk_norm": True,
}


class _AsFlex(torch.autograd.Function):
    """Keeps what FlexAttention keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def kept_bytes(shape: dict[str, Any], num_layers: int, *, checkpointing: bool) -> int:
    """Bytes that the forward pass of a pack keeps for its backward pass, beside the weights; LoRA in bfloat16."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)  # modules of such tensors cannot be converted afterwards
        try:
            model: Any = PolicyForCausalLM(PolicyConfig(**shape | {"num_hidden_layers": num_layers}))
        finally:
            torch.set_default_dtype(torch.float32)
        for rotary in model.model.rotary_embs.values():  # made on the host, in float32
            rotary.inv_freq = rotary.inv_freq.float().to("cuda")
        model = add_lora(model, LoraSettings(rank=16)).train()
        if checkpointing:
            causal_lm(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in held:
                sizes[storage._cdata] = storage.nbytes()
                kept.append(tensor)  # so that no other storage gets its address
            return tensor

        tokens = torch.zeros(NUM_TOKENS, dtype=torch.long)
        options = {"routing": RoutingRecord()} if "num_experts" in shape else {}
        segments = Segments.single(NUM_TOKENS, torch.device("cuda", 0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden_states(model, tokens, tokens, segments, **options)
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("shape", "checkpointing", "expected_gb"),
    [(DENSE_8B, False, 24.2), (DENSE_8B, True, 1.1), (MIXTURE_30B, False, 25.3), (MIXTURE_30B, True, 0.8)],
    ids=["8B", "8B with checkpointing", "30B-A3B", "30B-A3B with checkpointing"],
)
def test_activations_of_4096_tokens_stay_within_bounds(
    shape: dict[str, Any], checkpointing: bool, expected_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "packed_attention", lambda q, k, v, *_, **__: _AsFlex.apply(q, k, v).transpose(1, 2))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    one, two = (kept_bytes(shape, layers, checkpointing=checkpointing) for layers in (1, 2))
    total = one + (two - one) * (shape["num_hidden_layers"] - 1)
    assert 0.8 * expected_gb < total / 1e9 < 1.1 * expected_gb


@pytest.mark.parametrize(("shape", "kib"), [(DENSE_8B, 128), (MIXTURE_30B, 96)], ids=["8B", "30B-A3B"])
def test_the_cache_of_a_token_has_its_keys_and_values_alone(shape: dict[str, Any], kib: int) -> None:
    """2 bytes x 2 x layers x kv heads x size of a head."""
    with FakeTensorMode(), torch.device("cuda"):
        cache = PagedCache(cache_specs(PolicyForCausalLM(PolicyConfig(**shape))), block_size=16)
    assert cache.block_bytes(torch.bfloat16) == {None: 16 * kib * 1024}
