"""The gap between engine and trainer by dtype: log-probs of sampled tokens, nats; a dense model and a mixture.

    python tests/bench/bench_precision.py

SmolLM2-135M-Instruct, also with an adapter, and a small mixture with random weights whose experts are replayed or
chosen anew; 64 completions of up to 64 tokens each, by the embedded engine. A GPU's TF32 is imitated: operands of the
products of layers are rounded as TF32 rounds them, those inside of attention are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import load_model, load_tokenizer, new_model
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams

aten = torch.ops.aten

MODEL = "smollm2-135m-instruct"
MIXTURE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ImitatedTF32(TorchDispatchMode):
    """Rounds the operands of float32 products to 10 bits behind the point."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            *before, first, second = args
            args = (*before, rounded(first), rounded(second))
        return func(*args, **(kwargs or {}))


def rounded(x: Tensor) -> Tensor:
    """The nearest number of TF32."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def gaps(model: Any, rollouts: list[Rollout], *, replayed: bool = True) -> torch.Tensor:
    """Absolute differences of the log-probs of all sampled tokens, nats."""
    policy, parts = Policy(model), []
    with torch.no_grad():
        for pack in pack_rollouts(rollouts, budget=4096):
            routing = pack.routing if replayed else None
            output = policy(pack.tokens, pack.segments, pack.completion_mask, routing=routing)
            assert pack.rollout_logprobs is not None
            parts.append((output.logprobs - pack.rollout_logprobs).abs()[pack.completion_mask])
    return torch.cat(parts)


def measured() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a line's name and its gaps."""
    tokenizer = load_tokenizer(MODEL)
    texts = [f"Write about the number {n}." for n in range(16)]
    prompts = [Prompt(tuple(tokenizer(text)["input_ids"]), text, index=i) for i, text in enumerate(texts)]
    sampling = SamplingParams(max_new_tokens=64, n=4, seed=1)
    for dtype, tf32 in ((torch.float32, True), *((dtype, False) for dtype in DTYPES)):
        model: Any = load_model(MODEL, dtype=dtype)
        with ImitatedTF32() if tf32 else nullcontext():
            rollouts = EmbeddedEngine(model, tokenizer, RolloutSettings()).generate(prompts, sampling)
            yield f"dense, {str(dtype)[6:]}{', TF32 imitated' if tf32 else ''}", gaps(model, rollouts)
    for merge in (True, False):
        torch.manual_seed(0)
        adapted = add_lora(load_model(MODEL, dtype=torch.bfloat16), LoraSettings(rank=16))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # a small update, as after a few steps
                torch.nn.init.normal_(weight, std=1e-3)
        engine = EmbeddedEngine(adapted, tokenizer, RolloutSettings(merge_lora=merge))
        values = gaps(adapted, engine.generate(prompts, sampling))
        yield f"dense, bfloat16, adapter {'merged' if merge else 'as it is'}", values
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = new_model(MIXTURE, vocab_size=len(tokenizer), dtype=dtype)
        rollouts = EmbeddedEngine(model, tokenizer, RolloutSettings()).generate(prompts, sampling)
        for replayed in (True, False):
            experts = "replayed" if replayed else "chosen anew"
            yield f"mixture, {str(dtype)[6:]}, experts {experts}", gaps(model, rollouts, replayed=replayed)


if __name__ == "__main__":
    for name, values in measured():
        print(f"{name}: mean {values.mean():.2g}, largest {values.max():.2g} nats of {len(values)} tokens", flush=True)
