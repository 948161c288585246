"""The table of kinds of attention in alignlab/models/README.md, with figures from what the layers declare.

`python -m tests.models.kinds_table` prints it.
"""

from __future__ import annotations

from typing import Any

import torch

from alignlab.models.attention_kinds import make_attention
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig

# Kind, the paper, a model that has it, its shape.
ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("full_attention", "2305.13245", "Qwen3-8B", {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    }),
    ("sliding_attention", "2004.05150", "Gemma-3-4B", {
        "hidden_size": 2560, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 1024,
    }),
    ("gated_attention", "2505.06708", "Qwen3-Next", {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    }),
    ("sliding_gated_attention", "2505.06708", "none yet; that of Qwen3-Next with a window", {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "sliding_window": 4096,
    }),
    ("mixture_of_heads", "2210.05144", "32 of 64 heads on the shape of Qwen3-8B", {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 128,
        "num_attention_experts": 64,
    }),
    ("latent_attention", "2405.04434", "DeepSeek-V3", {
        "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }),
)  # fmt: skip


_LINEAR = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
# Of layers that keep a state of each sequence.
RECURRENT_ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("gated_deltanet", "2412.06464", "Qwen3.5, its default sizes", {
        "hidden_size": 4096, "num_attention_heads": 16, **_LINEAR, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }),
    ("fused_gated_deltanet", "2412.06464", "Qwen3-Next", {
        "hidden_size": 2048, "num_attention_heads": 16, **_LINEAR, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }),
    ("kimi_delta_attention", "2510.26692", "Kimi Linear 48B-A3B", {
        "hidden_size": 2304, "num_attention_heads": 32, **_LINEAR, "linear_num_key_heads": 32,
        "linear_num_value_heads": 32,
    }),
)  # fmt: skip


def _spec_of(kind: str, shape: dict[str, Any]) -> LayerCacheSpec:
    with torch.device("meta"):
        return make_attention(PolicyConfig(**shape, num_hidden_layers=1, layer_types=[kind]), 0).cache_spec()


def recurrent_rows() -> list[str]:
    """Return the lines of the table of layers that keep a state of each sequence."""
    lines = [
        "| kind | paper | a layer keeps of a sequence | for example | KiB in bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for kind, paper, example, shape in RECURRENT_ROWS:
        spec = _spec_of(kind, shape)
        kept = [
            f"{name} [{', '.join(map(str, size))}]{' in float32' if dtype == torch.float32 else ''}"
            for name, size, dtype in spec.sequence_entries(torch.bfloat16)
        ]
        kib = spec.sequence_bytes(torch.bfloat16) // 1024
        lines.append(f"| `{kind}` | arXiv:{paper} | {', '.join(kept)} | {example} | {kib:,} |")
    return lines


def rows() -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| kind | paper | a layer keeps of a token | for example | numbers | bytes in bfloat16 | of tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, paper, example, shape in ROWS:
        spec = _spec_of(kind, shape)
        kept = ", ".join(f"{name} [{', '.join(map(str, size))}]" for name, size in spec.per_token.items())
        if spec.value_columns is not None:
            kept += f", whose first {spec.value_columns} numbers are the value"
        tokens = "all" if spec.window is None else f"the last {spec.window:,}"
        numel = spec.token_numel
        lines.append(f"| `{kind}` | arXiv:{paper} | {kept} | {example} | {numel:,} | {2 * numel:,} | {tokens} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*rows(), "", *recurrent_rows()]))
