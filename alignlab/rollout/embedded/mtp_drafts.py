"""Drafts by the policy's own layer for multi-token prediction, on the states that the policy computes anyway.

The layer predicts the token after t from the policy's state before t and the embedding of t, see `models.mtp`. It runs
over the tokens of a sequence but the first, whose state before it does not exist, with a cache of its own. For a draft
of more than one token it goes on from its own states.

Shapes: N tokens of a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config.rollout import MtpSettings, RolloutSettings
from alignlab.errors import ConfigError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm, output_head
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.layout import Layout
from alignlab.rollout.embedded.block_manager import block_size_for
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.scheduler import Step, Work
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.step_plan import StepTensors
from alignlab.rollout.embedded.tile_plan import TileStep
from alignlab.rollout.embedded.twin_drafter import TwinDrafter, follow
from alignlab.rollout.embedded.weights import EngineWeights


class MtpRunner(Runner):
    """Computes steps of the layer for multi-token prediction alone.

    Attributes:
        states_before: policy's state before each token of the next step [N,D], in the order of its works.
    """

    def __init__(self, model: nn.Module, weights: EngineWeights, block_size: int, *, max_running: int) -> None:
        super().__init__(model, weights, block_size, max_running=max_running, replay=False)
        self._sparse = False
        last, spec = list(cache_specs(model).items())[-1]  # the layer is of the last one's kind, and has its number
        self.cache = PagedCache({last: spec}, block_size)
        self.states = StateCache({}, output_head(model)[0].dtype)
        self.states_before: Tensor | None = None

    def _forward(self, plan: StepTensors | TileStep, layout: Layout) -> Tensor:
        assert self.states_before is not None
        lm: Any = causal_lm(self._model)
        # Every token has logits, so these places are those of all tokens, in the order of the works.
        places = plan.logit_tokens
        before = self.states_before.new_zeros(len(plan.tokens), self.states_before.shape[1])
        before.index_copy_(0, places, self.states_before)
        stream: Any = SimpleNamespace(position_ids=plan.positions, segments=layout)
        hidden: Tensor = lm.mtp(before, lm.model.embedded(plan.tokens), stream, lm.model)
        return hidden


class MtpDrafter(TwinDrafter):
    """Drafts by the policy's layer for multi-token prediction.

    A twin has the tokens of its sequence but the first: attention sees distances alone. The state before the twin's
    token i is the policy's at its own token i.

    Args:
        model: the policy.
        runner: of its layer.
        settings: of the engine.
        num_drafts: tokens of a draft.
        vocab_size: logits of the policy.
    """

    def __init__(
        self, model: nn.Module, runner: MtpRunner, settings: RolloutSettings, num_drafts: int, vocab_size: int
    ) -> None:
        super().__init__(runner, settings, num_drafts, vocab_size)
        self._layer = runner
        self._modules = list(model.modules())
        self._states: dict[TokenSequence, tuple[int, Tensor]] = {}  # states of tokens from a position on
        self._prompts: dict[Request, Tensor] = {}
        self._own: dict[TokenSequence, Tensor] = {}  # the layer's state at a twin's last token

    def begin(self, sequences: Collection[TokenSequence]) -> None:
        """Prepare for a call; the states of all tokens of its sequences are needed."""
        super().begin(sequences)
        for sequence in sequences:
            sequence.reads_prompt = True

    def end(self) -> None:
        """Free what the call needed."""
        super().end()
        self._states, self._prompts, self._own = {}, {}, {}

    def observe(self, outputs: Sequence[tuple[TokenSequence, slice]], hidden: Tensor) -> None:
        """Keep the states of a step's tokens [M,D] until the layer has read them.

        Args:
            outputs: each sequence with its rows of `hidden`, those of its last computed tokens.
        """
        for sequence in [sequence for sequence in self._states if sequence.finish_reason is not None]:
            del self._states[sequence]
        for sequence, rows in outputs:
            base, states = self._states.get(sequence, (0, self._prompts.get(sequence.request, hidden[:0])))
            start = sequence.num_computed - (rows.stop - rows.start)
            if start < base:  # it is computed again from its beginning
                base, states = start, hidden[:0]
            assert start - base <= len(states), "every token was computed"
            self._states[sequence] = base, torch.cat((states[: start - base], hidden[rows]))
            if not sequence.num_sampled and not sequence.num_pending:
                self._prompts.setdefault(sequence.request, self._states[sequence][1])

    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Return `num_drafts` tokens for each sequence, fewer where a twin's prompt took steps of its own."""
        with evaluation_mode(self._modules):  # the native step leaves the model as it is
            return super().propose(sequences)

    def _twin_of(self, sequence: TokenSequence) -> TokenSequence:
        prompt = sequence.request.prompt
        request = replace(sequence.request, prompt=replace(prompt, token_ids=prompt.token_ids[1:]))
        return TokenSequence(request, sequence.key, [], reads_prompt=True)

    def _follow(self, twin: TokenSequence, sequence: TokenSequence) -> None:
        # Entries of drafts come from the layer's own states, and are made again from the policy's.
        twin.num_computed = min(twin.num_computed, len(twin.token_ids) - twin.num_drafts)
        follow(twin, sequence.token_ids[1:])
        twin.logprobs = [0.0] * sequence.num_sampled

    def _hidden(self, step: Step, others: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        owners = {twin: sequence for sequence, twin in self._twins.items()}
        self._layer.states_before = torch.cat([self._before(work, owners[work.sequence]) for work in step.work])
        hidden, moved = super()._hidden(step, others)
        end = 0
        for work in step.work:
            end += work.count
            self._own[work.sequence] = hidden[end - 1 : end]
        return hidden, moved

    def _before(self, work: Work, sequence: TokenSequence) -> Tensor:
        """Return the state before each token of a work, [n,D]: the policy's, and for drafts the layer's own."""
        base, states = self._states[sequence]
        start = work.start - base
        end = min(work.start + work.count, len(sequence.token_ids) - 1)  # beyond it are drafts that were not kept
        known = states[start : end - base]
        self._states[sequence] = base + start + len(known), states[start + len(known) :]
        missing = work.count - len(known)
        assert missing <= 1, "a draft is computed alone"
        return torch.cat((known, self._own[work.sequence])) if missing else known


def make_mtp_drafter(
    chosen: MtpSettings, settings: RolloutSettings, model: nn.Module, weights: EngineWeights, vocab_size: int
) -> MtpDrafter:
    """Return the drafter of a policy.

    Raises:
        ConfigError: the policy has no layer for multi-token prediction.
    """
    lm = causal_lm(model)
    if getattr(lm, "mtp", None) is None:
        raise ConfigError(
            "rollout.speculation.type is mtp, and the model must have a layer for multi-token prediction "
            "(num_mtp_layers: 1); train one, or use type: ngram"
        )
    block_size = block_size_for(settings.block_size, lm.device)
    runner = MtpRunner(model, weights, block_size, max_running=settings.max_running)
    return MtpDrafter(model, runner, settings, chosen.num_drafts, vocab_size)
