"""Drafts by a smaller model of the same tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.kv_cache import ExactCache
from alignlab.config.rollout import DraftModelSettings, RolloutSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm, num_positions, require_paging
from alignlab.models.exact_weights import model_dtype
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.embedded.block_manager import block_size_for
from alignlab.rollout.embedded.native.choice import make_runner
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.twin_drafter import TwinDrafter


class DraftModel(TwinDrafter):
    """Samples drafts from a model.

    Args:
        model: of the policy's tokenizer.
        settings: of the engine.
        num_drafts: tokens of a draft.
        vocab_size: logits of the policy.

    Raises:
        ConfigError: the settings require the native step, and the model is not covered by it.
    """

    def __init__(self, model: nn.Module, settings: RolloutSettings, num_drafts: int, vocab_size: int) -> None:
        require_paging(model)
        self._model = model
        block_size = block_size_for(settings.block_size, causal_lm(model).device)
        # Its steps are native ones wherever an engine's of its own would be.
        alone = {
            "speculation": None, "kv_cache": ExactCache(), "quantization": None, "cuda_graphs": False,
            "merge_lora": None,
        }
        self._weights, runner = make_runner(model, settings.model_copy(update=alone), block_size)
        super().__init__(runner, settings, num_drafts, vocab_size)

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Make room for the twins of all sequences that run together.

        Raises:
            RolloutError: the memory does not suffice, or a sequence is longer than the draft model reads.
        """
        positions, most = num_positions(self._model), max((sequence.max_tokens for sequence in sequences), default=0)
        if most > positions:
            raise RolloutError(
                f"the draft model has {positions} positions, and a prompt with its completion {most} tokens; lower "
                "max_new_tokens, or use another rollout.speculation"
            )
        super().begin(sequences)

    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Return `num_drafts` tokens for each sequence, fewer where a twin's prompt took steps of its own."""
        with self._weights.in_use():
            self._runner.begin()
            return super().propose(sequences)

    def rest(self) -> None:
        """Free the cache and packed weights until the next call."""
        super().rest()
        self._weights.rest()


def make_draft_model(
    chosen: DraftModelSettings, settings: RolloutSettings, model: nn.Module, tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> DraftModel:
    """Load a draft model beside the policy.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: its tokenizer is another, or it has recurrent layers.
    """
    name, lm = chosen.model, causal_lm(model)
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"rollout.speculation.model is {name}, and must have the policy's tokenizer: its tokens are others; use a "
            "smaller model of the same family, or type: ngram"
        )
    draft = load_model(name, dtype=model_dtype(lm), device=lm.device)
    if StateCache(cache_specs(draft), torch.float32):
        raise ConfigError(
            f"rollout.speculation.model is {name}, which has recurrent layers, whose states cannot be taken back when "
            "a draft is not kept; use another model, or type: ngram"
        )
    return DraftModel(draft, settings, chosen.num_drafts, vocab_size)
