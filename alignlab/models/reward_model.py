"""The reward model: one number for a whole sequence, read from the hidden state of its last token.

It trains all weights of a model of its own, or is an adapter with a head on a frozen base. As such it is one more role
on a policy's base: policy, reference, critic and reward model then share one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear

from alignlab.errors import ConfigError, NumericsError
from alignlab.models.adapters import has_adapters, in_role
from alignlab.models.decoder import causal_lm
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.policy import PackedModel, masked_router_loss
from alignlab.transfer import to_device
from alignlab.types import Experience, Segments


class RewardOutput(NamedTuple):
    """Rewards of sequences that lie in N tokens.

    Attributes:
        rewards: [N] float32, on the last token of each sequence; 0 elsewhere.
        router_loss: [N] float32, see `PolicyOutput`; None without it.
    """

    rewards: Tensor
    router_loss: Tensor | None = None


class RewardModel(PackedModel):
    """A linear head without a bias, float32, on the hidden state of each sequence's last token.

    The head's name and shape, `score.weight` [1, D], are those of `transformers`' sequence-classification models. It
    starts at random, with variance 1 / (D + 1), so that the decoder under it has a gradient from the first step on:
    Stiennon et al. (2020), arXiv:2009.01325.

    Args:
        model: a causal language model, whose own head is not used, or a PeftModel around one.
        role: the adapter of a shared PeftModel that is the reward model's; None where the model is its own.

    Raises:
        ConfigError: the adapter is on the model's own head, of which no reward is made.
    """

    def __init__(self, model: nn.Module, *, role: str | None = None) -> None:
        super().__init__(model)
        self.role = role
        lm = causal_lm(model)
        size = lm.config.get_text_config().hidden_size
        self.score = nn.Linear(size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(size + 1) ** -0.5)
        self.score.to(next(model.parameters()).device)
        head = lm.get_output_embeddings()
        if role is None and any("lora" in name for name, _ in head.named_parameters()):
            raise ConfigError(
                "target_modules names the language-model head, and a reward model does not use it; use all-linear, or "
                "leave the head out"
            )
        if role is None and not has_adapters(model) and not lm.config.get_text_config().tie_word_embeddings:
            head.requires_grad_(False)

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context in which a shared model is the reward model's; see `PackedModel.in_use`."""
        if self.role is None:
            return nullcontext()
        assert isinstance(self.model, PeftModel)
        return in_role(self.model, self.role)

    def forward(self, tokens: Tensor, segments: Segments, mask: Tensor) -> RewardOutput:
        """Return rewards of whole sequences; to be called in `in_use`.

        Args:
            tokens: [N] ids.
            segments: how they divide into sequences.
            mask: [N] bool, tokens whose expert choices count and are balanced.
        """
        hidden, record = self.states(tokens, segments, counted=mask)
        ends = last_tokens(segments)
        rewards = linear(hidden[ends].float(), self.score.weight.float())[:, 0]
        return RewardOutput(
            rewards.new_zeros(len(tokens)).index_put((ends,), rewards), masked_router_loss(record, mask)
        )

    @torch.no_grad()
    def rewards(self, packs: Sequence[Experience], num_sequences: int) -> Tensor:
        """Return rewards [num_sequences] float32, by sequence id, without dropout or gradient; nan where in no pack.

        Raises:
            NumericsError: a reward is not finite.
        """
        device = self.score.weight.device
        result = torch.full((num_sequences,), torch.nan, device=device)
        with evaluation_mode(self.model.modules()), self.in_use():
            for pack in (pack.to(device) for pack in packs):
                ends = last_tokens(pack.segments)
                rewards = self(pack.tokens, pack.segments, pack.completion_mask).rewards[ends]
                if not rewards.isfinite().all():
                    raise NumericsError(
                        f"the rewards of a reward model must be finite, and {int((~rewards.isfinite()).sum())} of "
                        f"{len(rewards)} are not; load it in float32, or take another one"
                    )
                result[pack.segments.sequence_of_token[ends]] = rewards
        return result


def last_tokens(segments: Segments) -> Tensor:
    """Return the index of each sequence's last token, in the order of the segments."""
    rows = zip(segments.starts, segments.lengths, segments.sequence_ids, strict=True)
    ends = [start + length - 1 for start, length, sequence in rows if sequence >= 0]
    return to_device([torch.tensor(ends, dtype=torch.long)], segments.device)[0]
