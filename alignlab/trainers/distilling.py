"""A student beside its teacher: the policy that also says how far it is from it, and the learner that asks the teacher.

Both are compared over the ids that the student's tokenizer can produce. Logits beyond those, with which models pad
their vocabulary, are left out of both softmaxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.trainers.base import TrainerConfig
from alignlab.data.vocabulary import num_token_ids
from alignlab.functional.distillation import Head, TopTokens, chunked_coarse_divergence, chunked_divergence
from alignlab.functional.logprobs import chunked_logprobs
from alignlab.models.attention import causal_lm, num_embeddings, output_head
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.learner import Learner
from alignlab.trainers.teacher import check_same_tokens, check_width, readable_tokens
from alignlab.types import Experience, Segments


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        beta: see `functional.distillation.divergence`.
        temperature: of both distributions.
        width: ids that are compared, from 0 on.
        labels: whether the log-probs of the tokens themselves are learnt from too.
    """

    beta: float
    temperature: float
    width: int
    labels: bool = False


@dataclass(frozen=True)
class TaughtExperience(Experience):
    """A pack with what is kept of the teacher for its M masked tokens, in their order; see `TopTokens`."""

    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    teacher_rest: Tensor | None = None


class StudentOutput(NamedTuple):
    """What `PolicyOutput` has, and `divergence`: [N] float32, from the teacher, nats; 0 where the mask is False."""

    logprobs: Tensor
    entropy: Tensor
    router_loss: Tensor | None
    routing: Tensor | None
    divergence: Tensor


class StudentPolicy(Policy):
    """A policy that is told of its teacher with each pack.

    Args:
        model, chunk_tokens: see `Policy`.
        comparison: what is compared.
    """

    def __init__(self, model: nn.Module, comparison: Comparison, *, chunk_tokens: int) -> None:
        super().__init__(model, chunk_tokens=chunk_tokens)
        self.comparison = comparison

    def forward(  # type: ignore[override]  # it is told more
        self, tokens: Tensor, segments: Segments, mask: Tensor,
        *, told: TopTokens | tuple[Tensor, Head], temperature: float = 1.0, routing: Tensor | None = None,
    ) -> StudentOutput:
        """As `Policy.forward`, at the cost of another pass over the logits.

        Args:
            told: what is kept of the teacher for the masked tokens; or its hidden states [M, D_t] and its head.
        """
        hidden, record = self.predicting_states(tokens, segments, mask, routing=routing)
        head, asked = Head(*output_head(self.model)), mask.nonzero()[:, 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.comparison.labels):
            logprobs, entropy = chunked_logprobs(
                hidden, head.weight, tokens[asked], bias=head.bias, temperature=temperature, softcap=head.softcap,
                chunk_tokens=self.chunk_tokens,
            )
        known: PolicyOutput = self._output(logprobs, entropy, mask, record)
        divergence = known.logprobs.new_zeros(len(tokens)).index_put((asked,), self._divergence(hidden, head, told))
        return StudentOutput(known.logprobs, known.entropy, known.router_loss, known.routing, divergence)

    def _divergence(self, hidden: Tensor, head: Head, told: TopTokens | tuple[Tensor, Head]) -> Tensor:
        how = self.comparison
        options: dict[str, Any] = {
            "beta": how.beta, "width": how.width, "temperature": how.temperature, "chunk_tokens": self.chunk_tokens,
        }
        if isinstance(told, TopTokens):
            return chunked_coarse_divergence(hidden, head, told, **options)
        return chunked_divergence(hidden, head, *told, **options)


class StudentLearner(Learner):
    """Owns a student and its optimizer; asks the teacher where a pack does not say what it would answer.

    Args:
        teacher: frozen, on the student's device; a mixture among them chooses its own experts. None later on where
            every pack says what it would answer.
        others: see `Learner`.
    """

    policy: StudentPolicy

    def __init__(
        self, policy: StudentPolicy, config: TrainerConfig, accelerator: Accelerator, *, teacher: Policy, **others: Any
    ) -> None:
        super().__init__(policy, config, accelerator, **others)
        self.teacher: Policy | None = teacher

    def _forward(self, policy: nn.Module, pack: Experience) -> Any:
        return policy(
            pack.tokens, pack.segments, pack.completion_mask, told=self._told(pack), temperature=self.temperature,
            routing=pack.routing,
        )

    def _told(self, pack: Experience) -> TopTokens | tuple[Tensor, Head]:
        if isinstance(pack, TaughtExperience) and pack.teacher_ids is not None:
            assert pack.teacher_logprobs is not None and pack.teacher_rest is not None
            return TopTokens(pack.teacher_ids, pack.teacher_logprobs, pack.teacher_rest)
        assert self.teacher is not None, "packs without its answers need the teacher"
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
    rows = output_head(student)[0].shape[0]
    check_width(causal_lm(teacher), tokenizer, rows=rows)
    check_same_tokens(teacher_tokenizer, tokenizer)
    return min(rows, num_token_ids(tokenizer))
