"""Tiny random models and a tokenizer of single bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import new_model
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Completion, Prompt

VOCAB = 260
END = 256  # the model's end token; ids below it are bytes, ids above it have no text
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}

MakeEngine = Callable[..., EmbeddedEngine]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Id b is byte b, for every byte."""
    characters = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [b for b in range(256) if b not in characters.values()]
    vocabulary = characters | {chr(256 + number): b for number, b in enumerate(others)}  # GPT-2's names of the bytes
    bare = Tokenizer(models.BPE(vocab=vocabulary | {"<end>": END}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def llama() -> PreTrainedModel:
    """`transformers`' own class."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=VOCAB, eos_token_id=None, attn_implementation="alignlab")
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def dense() -> PreTrainedModel:
    """Ours, with every branch of attention: a sliding window in one layer, soft-caps, norms of queries and keys."""
    torch.manual_seed(1)
    architecture = {
        **SIZES, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "use_qk_norm": True,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0,
    }
    return new_model(architecture, vocab_size=VOCAB)


@pytest.fixture
def sparse() -> PreTrainedModel:
    torch.manual_seed(2)
    architecture = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return new_model(architecture, vocab_size=VOCAB)


@pytest.fixture
def make_engine(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> MakeEngine:
    """An engine over the Llama, or over `model`; other keywords are the settings'."""

    def make(model: PreTrainedModel | None = None, *, share_prefixes: bool = True, **settings: int) -> EmbeddedEngine:
        return EmbeddedEngine(
            model or llama, tokenizer, RolloutSettings.model_validate(settings), share_prefixes=share_prefixes
        )

    return make


def make_prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(tuple(torch.randint(0, 256, (n,), generator=generator).tolist()), "") for n in lengths]


def full_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """log p of every next token [N,V] by one pass over the whole sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)])).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def flat(rollouts: Sequence) -> list[Completion]:
    return [completion for rollout in rollouts for completion in rollout.completions]
