"""A student beside its teacher: a language model whose output also holds its divergence from the teacher.

Both are compared over the ids that the student's tokenizer can produce. Logits beyond those, with which models pad
their vocabulary, are left out of both softmaxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.data.vocabulary import num_token_ids
from alignlab.functional.cross_entropy import chunked_cross_entropy
from alignlab.functional.distillation import Head, TopTokens, chunked_coarse_divergence, chunked_divergence
from alignlab.loop.teacher import check_same_tokens, check_width, readable_tokens
from alignlab.masked_tokens import masked_tokens
from alignlab.models.decoder import causal_lm, num_embeddings, output_head
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.models.policy import PackedModel, Policy, at_masked, policy_output
from alignlab.types import Experience, Segments


@dataclass(frozen=True)
class Comparison:
    """Comparison of the distributions of student and teacher.

    Attributes:
        beta: see `functional.distillation.divergence`.
        temperature: of both distributions.
        width: ids that are compared, from 0 on.
        label_weight, label_smoothing, z_loss_coef: of the loss of the tokens themselves, see `chunked_cross_entropy`.
    """

    beta: float
    temperature: float
    width: int
    label_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss_coef: float = 0.0

    @property
    def has_label_loss(self) -> bool:
        """Return whether the tokens themselves are learnt from, or their distributions drawn to log Z = 0."""
        return self.label_weight > 0 or self.z_loss_coef > 0


@dataclass(frozen=True)
class TaughtExperience(Experience):
    """A pack with the teacher's likeliest tokens at its M masked tokens, in their order; see `TopTokens`."""

    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    teacher_rest: Tensor | None = None


class StudentOutput(NamedTuple):
    """`PolicyOutput`, whose log-probs have no gradient, with three fields [N] float32, 0 where the mask is False.

    Attributes:
        divergence: from the teacher, nats.
        label_loss: of the tokens themselves; with a gradient if `Comparison.has_label_loss`.
        log_normalizer: log of the softmax's denominator.
    """

    logprobs: Tensor
    entropy: Tensor
    router_loss: Tensor | None
    routing: Tensor | None
    divergence: Tensor
    label_loss: Tensor
    log_normalizer: Tensor


TeacherSignal = TopTokens | tuple[Tensor, Head]
"""The teacher at M masked tokens: its likeliest tokens, or its hidden states [M, D] and its head."""


class Student(PackedModel):
    """A language model over packed tokens, compared with its teacher at each masked token.

    Args:
        model: see `Policy`.
        comparison: what is compared.
        chunk_tokens: tokens whose logits exist at one time.
        kv_approximation: see `PackedModel`.
    """

    def __init__(
        self, model: nn.Module, comparison: Comparison, *, chunk_tokens: int | None,
        kv_approximation: KVApproximation | None = None,
    ) -> None:
        super().__init__(model, kv_approximation=kv_approximation)
        self.comparison, self.chunk_tokens = comparison, chunk_tokens

    def forward(
        self, tokens: Tensor, segments: Segments, mask: Tensor, teacher_signal: TeacherSignal,
        *, temperature: float = 1.0, routing: Tensor | None = None, kv_record: Tensor | None = None,
    ) -> StudentOutput:
        """Return log-prob, entropy, divergence and loss of the masked tokens; see `Policy.forward`."""
        hidden, record = self.predicting_states(tokens, segments, mask, routing=routing, kv_record=kv_record)
        head = Head(*output_head(self.model))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.comparison.has_label_loss):
            loss, logprobs, entropy, log_normalizer = chunked_cross_entropy(
                hidden, head.weight, tokens[masked_tokens(mask, segments.predecessors).indices], bias=head.bias,
                temperature=temperature, softcap=head.softcap, chunk_tokens=self.chunk_tokens,
                label_weight=self.comparison.label_weight, label_smoothing=self.comparison.label_smoothing,
                z_loss_coef=self.comparison.z_loss_coef,
            )
        of_tokens = policy_output(logprobs, entropy, segments, mask, record)
        divergence = at_masked(self._divergence(hidden, head, teacher_signal), segments, mask)
        return StudentOutput(
            of_tokens.logprobs, of_tokens.entropy, of_tokens.router_loss, of_tokens.routing, divergence,
            at_masked(loss, segments, mask), at_masked(log_normalizer, segments, mask),
        )

    def _divergence(self, hidden: Tensor, head: Head, teacher_signal: TeacherSignal) -> Tensor:
        comparison = self.comparison
        options: dict[str, Any] = {
            "beta": comparison.beta, "width": comparison.width, "temperature": comparison.temperature,
            "chunk_tokens": self.chunk_tokens,
        }
        if isinstance(teacher_signal, TopTokens):
            return chunked_coarse_divergence(hidden, head, teacher_signal, **options)
        return chunked_divergence(hidden, head, *teacher_signal, **options)


class StudentForward:
    """Puts a pack through a student, with the teacher's signal: the pack's own, or the teacher's present answer.

    Args:
        temperature: of the distribution that completions are sampled from.
        teacher: frozen, on the student's device; a mixture chooses its own experts. None where every pack has the
            teacher's likeliest tokens.
    """

    def __init__(self, temperature: float, teacher: Policy) -> None:
        self.temperature = temperature
        self.teacher: Policy | None = teacher

    def __call__(self, student: nn.Module, pack: Experience) -> Any:
        """Return the student's output for a pack."""
        return student(
            pack.tokens, pack.segments, pack.completion_mask, self._teacher_signal(pack),
            temperature=self.temperature, routing=pack.routing, kv_record=pack.kv_record,
        )

    def _teacher_signal(self, pack: Experience) -> TeacherSignal:
        if isinstance(pack, TaughtExperience) and pack.teacher_ids is not None:
            assert pack.teacher_logprobs is not None and pack.teacher_rest is not None
            return TopTokens(pack.teacher_ids, pack.teacher_logprobs, pack.teacher_rest)
        assert self.teacher is not None, "a pack without the teacher's likeliest tokens needs the teacher"
        with torch.no_grad():
            tokens = readable_tokens(pack.tokens, num_embeddings(self.teacher.model))
            hidden, _ = self.teacher.predicting_states(tokens, pack.segments, pack.completion_mask)
        return hidden, Head(*output_head(self.teacher.model))


def shared_width(
    teacher: nn.Module, teacher_tokenizer: PreTrainedTokenizerBase, student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return how many ids are compared: those of the student's tokenizer that the student has a logit for.

    Raises:
        ConfigError: the teacher lacks a logit for one, or an id means another token to the teacher.
    """
    check_same_tokens(teacher_tokenizer, tokenizer)
    rows = output_head(student)[0].shape[0]
    check_width(causal_lm(teacher), tokenizer, rows=rows)
    return min(rows, num_token_ids(tokenizer))
