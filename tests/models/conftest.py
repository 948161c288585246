"""Small random models and random packs of sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from alignlab.types import Segments

VOCAB = 48
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
}


def make_segments(groups: list[tuple[int, list[int]]]) -> Segments:
    """A pack from (prompt length, completion lengths); without completions the prompt is a plain sequence."""
    rows: list[tuple[int, int, int, int]] = []
    sequence = 0
    for group, (prompt, completions) in enumerate(groups):
        root = len(rows)
        rows.append((prompt, -1, -1 if completions else sequence, group))
        sequence += not completions
        for length in completions:
            rows.append((length, root, sequence, group))
            sequence += 1
    lengths, prefixes, sequences, group_ids = (tuple(column) for column in zip(*rows, strict=True))
    return Segments(lengths, prefixes, sequences, group_ids)


def sequences_of(segments: Segments) -> list[torch.Tensor]:
    """Tokens of each whole sequence, its prompt included, by sequence id."""
    runs = [torch.arange(a, a + n) for a, n in zip(segments.starts, segments.lengths, strict=True)]
    found = {
        sequence: torch.cat([runs[prefix], run]) if prefix >= 0 else run
        for run, prefix, sequence in zip(runs, segments.prefixes, segments.sequence_ids, strict=True)
        if sequence >= 0
    }
    return [found[sequence] for sequence in sorted(found)]


def packs(max_length: int = 9) -> st.SearchStrategy[list[tuple[int, list[int]]]]:
    """Arguments of `make_segments`: plain sequences and prompts with completions, of all lengths."""
    length = st.integers(1, max_length)
    return st.lists(st.tuples(length, st.lists(length, max_size=4)), min_size=1, max_size=4)


@pytest.fixture
def pack() -> Segments:
    """Two prompts with completions, and a plain sequence between them."""
    return make_segments([(5, [3, 1, 6]), (7, []), (2, [4, 4])])


@pytest.fixture
def tokens(pack: Segments) -> torch.Tensor:
    return torch.randint(2, VOCAB, (pack.num_tokens,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attn_implementation="alignlab")).eval()


@pytest.fixture
def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, attn_implementation="alignlab")).eval()
