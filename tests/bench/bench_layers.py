"""Kinds of layers by the length of the sequence: time of a training pass, and of decoding in the embedded engine.

    python -m tests.bench.bench_layers [--tokens 512 2048 8192] [--rows 8] [--repeats 3]

Training: forward and backward pass of one layer, float32, hidden size 512, 8 heads of 64, of one sequence;
milliseconds for 1,000 tokens, the least of the repeats. Decoding: a model of 8 such layers with a vocabulary of 1,000,
all of one kind or 3 recurrent to 1 of attention, samples 32 tokens after prompts of these lengths, several rows at a
time; tokens a second once the prompts are computed, the most of the repeats, and MiB that the cache takes for these
rows. One thread. Kinds are measured in turn, each repeat. Prints two tables, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.models.attention_kinds import make_attention
from alignlab.models.config import PolicyConfig
from alignlab.models.recurrent.layer import RecurrentLayer
from alignlab.models.rope import RotaryEmbedding
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.memory import engine_bytes
from alignlab.types import Prompt, SamplingParams, Segments
from tests.trainers.rank_engines import make_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1 << 20,
}
HEADS: dict[str, Any] = {
    "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}
LATENT: dict[str, Any] = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
FIELDS: dict[str, dict[str, Any]] = {
    "full_attention": {}, "latent_attention": LATENT, "gated_deltanet": HEADS, "kimi_delta_attention": HEADS,
}
MODELS: dict[str, dict[str, Any]] = {
    "full attention": {"layer_types": ["full_attention"] * 8},
    "latent attention": {"layer_types": ["latent_attention"] * 8, **LATENT},
    "Gated DeltaNet": {"layer_types": ["gated_deltanet"] * 8, **HEADS},
    "3 Gated DeltaNet : 1 gated": {"layer_types": (["gated_deltanet"] * 3 + ["gated_attention"]) * 2, **HEADS},
    "3 Kimi Delta : 1 latent": {
        "layer_types": (["kimi_delta_attention"] * 3 + ["latent_attention"]) * 2, **HEADS, **LATENT,
    },
}  # fmt: skip
NEW_TOKENS = 32


def training_ms(kind: str, length: int) -> float:
    """Milliseconds for 1,000 tokens of a forward and backward pass of one layer over a sequence."""
    torch.manual_seed(0)
    config = PolicyConfig(**SHAPE, num_hidden_layers=1, layer_types=[kind], **FIELDS[kind])
    layer = make_attention(config, 0)
    rotation = None
    if not isinstance(layer, RecurrentLayer):
        assert layer.rotary_size is not None
        rotation = RotaryEmbedding(config, layer.rotary_size)(torch.arange(length)[None], torch.float32)
    x = torch.randn(1, length, config.hidden_size, requires_grad=True)
    start = time.perf_counter()
    layer(x, rotation, layout=Segments.single(length))[0].sum().backward()
    return 1e6 * (time.perf_counter() - start) / length


def decoding(name: str, length: int, rows: int) -> tuple[float, float]:
    """Tokens a second of decoding after prompts of a length, and MiB of the cache."""
    torch.manual_seed(0)
    config = PolicyConfig(**SHAPE, num_hidden_layers=8, **MODELS[name])
    model = PolicyForCausalLM(config).eval()
    settings = RolloutSettings(max_running=rows, prefill_tokens=rows * length)
    engine = EmbeddedEngine(model, make_tokenizer(), settings)
    prompts = [Prompt(tuple(torch.randint(0, 1000, (length,)).tolist()), "") for _ in range(rows)]
    times: list[float] = []
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    engine.generate(prompts, sampling, on_step=lambda *_: times.append(time.perf_counter()))
    first = len(times) - NEW_TOKENS  # the step that computed the last of the prompts
    taken = engine_bytes(
        model, settings, torch.device("cpu"), num_sequences=rows, num_tokens=length + NEW_TOKENS
    )
    return rows * (NEW_TOKENS - 1) / (times[-1] - times[first]), taken / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    training = {kind: dict.fromkeys(args.tokens, float("inf")) for kind in FIELDS}
    speed = {name: dict.fromkeys(args.tokens, (0.0, 0.0)) for name in MODELS}
    for _ in range(args.repeats):
        for length in args.tokens:
            for kind in FIELDS:
                training[kind][length] = min(training[kind][length], training_ms(kind, length))
            for name in MODELS:
                speed[name][length] = max(speed[name][length], decoding(name, length, args.rows))
    header = "".join(f"{length:>16,}" for length in args.tokens)
    print(f"{'ms for 1,000 tokens of training':34}{header}")
    for kind, of_length in training.items():
        print(f"{kind:34}" + "".join(f"{value:16.0f}" for value in of_length.values()))
    print(f"\n{'tokens/s of decoding (MiB)':34}{header}")
    for name, by_length in speed.items():
        print(f"{name:34}" + "".join(f"{rate:9.0f} ({mib:4.0f})" for rate, mib in by_length.values()))
    print(json.dumps({"training_ms": training, "decoding": speed, "rows": args.rows}))


if __name__ == "__main__":
    main()
