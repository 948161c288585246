"""Drafts by a smaller model of the same tokenizer, which follows the policy's sequences with a cache of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import DraftModelSettings, RolloutSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm, num_positions, require_paging
from alignlab.models.exact_weights import model_dtype
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.rollout.embedded.block_manager import block_size_for
from alignlab.rollout.embedded.cache_space import CacheSpace
from alignlab.rollout.embedded.places import Place
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.sampler import Sampler
from alignlab.rollout.embedded.scheduler import Scheduler
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.weights import EngineWeights


class DraftModel:
    """Samples drafts from a model, by the random numbers of the policy's own draws.

    Each sequence has a twin, which has the sequence's tokens, and then the drafts.

    Args:
        model: of the policy's tokenizer.
        settings: of the engine.
        num_drafts: tokens of a draft.
        vocab_size: logits of the policy.
    """

    is_free = False

    def __init__(self, model: nn.Module, settings: RolloutSettings, num_drafts: int, vocab_size: int) -> None:
        require_paging(model)
        self.num_drafts = num_drafts
        self._settings = settings
        self._vocab_size = vocab_size
        self._model = model
        self._weights = EngineWeights(model, merge=None, pack=settings.pack_weights)
        block_size = block_size_for(settings.block_size, causal_lm(model).device)
        self._runner = Runner(model, self._weights, block_size, max_running=settings.max_running, replay=False)
        self._space = CacheSpace(self._runner, settings, block_size, share=True)
        self._sampler = Sampler()
        self._scheduler: Scheduler | None = None
        self._twins: dict[TokenSequence, TokenSequence] = {}

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Make room for the twins of all sequences that run together.

        Raises:
            RolloutError: the memory does not suffice, or a sequence is longer than the draft model reads.
        """
        longest = sorted(sequences, key=lambda sequence: sequence.max_tokens)[-self._settings.max_running :]
        if not self._space.holds(longest):
            raise RolloutError(
                f"rollout.speculation needs a cache of the draft model for {len(longest)} sequences that run together, "
                "and there is no room; lower rollout.max_running, raise cache_tokens, or remove speculation"
            )
        positions, most = num_positions(self._model), max((sequence.max_tokens for sequence in sequences), default=0)
        if most > positions:
            raise RolloutError(
                f"the draft model has {positions} positions, and a prompt with its completion {most} tokens; lower "
                "max_new_tokens, or use another rollout.speculation"
            )
        self._space.reserve(list(sequences))
        self._scheduler = Scheduler(
            self._space.blocks, root=b"draft", max_running=self._settings.max_running,
            prefill_tokens=self._settings.prefill_tokens,
        )

    def end(self) -> None:
        """Free the twins."""
        self._space.blocks.reset()
        self._sampler, self._scheduler, self._twins = Sampler(), None, {}

    @torch.inference_mode()
    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Return `num_drafts` tokens for each sequence, fewer where a twin's prompt took steps of its own."""
        twins = self._followed(sequences)
        with self._weights.in_use():
            self._runner.begin()
            for _ in range(self.num_drafts):
                self._draft_one(twins)
        return [twin.token_ids[len(twin.token_ids) - twin.num_drafts :] for twin in twins]

    def _followed(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Return the twins of sequences, with their tokens; others give their blocks back."""
        assert self._scheduler is not None
        chosen = set(sequences)
        for sequence in [sequence for sequence in self._twins if sequence not in chosen]:
            self._scheduler.drop(self._twins.pop(sequence))
        twins = []
        for sequence in sequences:
            twin = self._twins.get(sequence)
            if twin is None:
                twin = self._twins[sequence] = TokenSequence(sequence.request, sequence.key, [])
                self._scheduler.add([twin])
            follow(twin, sequence)
            twins.append(twin)
        return twins

    def _draft_one(self, twins: Sequence[TokenSequence]) -> None:
        """Compute the tokens of twins that are not computed, as many as a step takes, and draft the next of each."""
        assert self._scheduler is not None
        if not any(twin.num_pending for twin in twins):
            return
        step = self._scheduler.schedule()
        outputs = self._scheduler.commit(step)
        places = [Place(twin, len(twin.token_ids)) for twin, _ in outputs]
        inputs = self._sampler.inputs(places, self._vocab_size) if places else []
        hidden, inputs = self._runner.hidden(step, inputs)
        if not places:
            return
        logits = self._resized(self._runner.logits(hidden))
        for (twin, _), draw in zip(outputs, self._sampler.draw(logits, places, inputs), strict=True):
            if twin.num_drafts < twin.num_left - 1:
                twin.token_ids.append(draw.token)
                twin.num_drafts += 1

    def _resized(self, logits: Tensor) -> Tensor:
        """Return logits of the policy's number: models pad one vocabulary to different sizes."""
        return pad(logits, (0, self._vocab_size - logits.shape[1]), value=-torch.inf)


def follow(twin: TokenSequence, sequence: TokenSequence) -> None:
    """Give a twin the tokens of its sequence, without drafts; entries of tokens that it does not have are forgotten."""
    ids, old = sequence.token_ids, twin.token_ids
    common = len(old) - twin.num_drafts
    while common < min(len(ids), len(old)) and ids[common] == old[common]:
        common += 1
    twin.token_ids, twin.num_drafts = list(ids), 0
    twin.num_computed = min(twin.num_computed, common, len(ids) - 1)
    twin.logprobs = [0.0] * sequence.num_sampled


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
