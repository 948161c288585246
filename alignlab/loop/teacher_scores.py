"""Log-probs of a student's tokens under a teacher, with the same tokenizer or with another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from alignlab.data.packing import pack_rollouts
from alignlab.data.token_alignment import AlignedCompletion, TextAligner
from alignlab.functional.reverse_kl import spread_over_spans
from alignlab.loop.learner import Learner
from alignlab.loop.teacher import readable_tokens
from alignlab.models.decoder import causal_lm, num_embeddings
from alignlab.models.policy import Policy
from alignlab.types import Completion, Experience, Prompt, Rollout


class TeacherScores(Protocol):
    """Log-probs of a student's packs under a teacher."""

    def of(self, rollouts: Sequence[Rollout], packs: Sequence[Experience]) -> tuple[list[Tensor], Tensor]:
        """Return the teacher's log-probs [N] of each pack's completion tokens, and a mask [B] of judged completions.

        Args:
            rollouts: the rollouts of the packs.
            packs: with `old_logprobs`, on the learner's device.
        """
        ...


class TokenScores:
    """`TeacherScores` of a teacher with the student's tokenizer. A teacher with MoE layers routes by itself."""

    def __init__(self, learner: Learner, teacher: Policy) -> None:
        self._learner, self._teacher = learner, teacher

    def of(self, rollouts: Sequence[Rollout], packs: Sequence[Experience]) -> tuple[list[Tensor], Tensor]:
        """Return log-probs as `TeacherScores.of`; all completions are judged."""
        count = sum(len(rollout.completions) for rollout in rollouts)
        rows = num_embeddings(self._teacher.model)
        readable = [replace(pack, routing=None, tokens=readable_tokens(pack.tokens, rows)) for pack in packs]
        logprobs = self._learner.logprobs(readable, self._teacher, frozen_as="the teacher")
        return logprobs, torch.ones(count, dtype=torch.bool, device=self._learner.device)


class TextScores:
    """`TeacherScores` of a teacher with another tokenizer. The log-prob of a span is spread over the student's tokens.

    Args:
        budget: tokens of a pack of the teacher's tokens.
    """

    def __init__(self, learner: Learner, teacher: Policy, aligner: TextAligner, *, budget: int) -> None:
        self._learner, self._teacher, self._aligner, self._budget = learner, teacher, aligner, budget
        text_config = causal_lm(teacher.model).config.get_text_config()
        self._positions: int | None = getattr(text_config, "max_position_embeddings", None)

    def of(self, rollouts: Sequence[Rollout], packs: Sequence[Experience]) -> tuple[list[Tensor], Tensor]:
        """Return log-probs as `TeacherScores.of`; aligned completions are judged."""
        prompts = self._aligner.prompt_ids([rollout.prompt for rollout in rollouts])
        aligned = [
            self._aligner.completion(c, room=None if self._positions is None else self._positions - len(prompt))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
            for c in rollout.completions
        ]
        teacher_logprobs = self._teacher_logprobs(prompts, rollouts, aligned)
        is_judged = torch.tensor([alignment is not None for alignment in aligned], device=self._learner.device)
        return [self._on_students_tokens(pack, aligned, teacher_logprobs) for pack in packs], is_judged

    def _teacher_logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        rollouts: Sequence[Rollout],
        aligned: Sequence[AlignedCompletion | None],
    ) -> dict[int, Tensor]:
        """Return the log-probs of the teacher's tokens, by number of the completion."""
        starts = itertools.accumulate((len(rollout.completions) for rollout in rollouts), initial=0)
        teacher_rollouts = [
            Rollout(Prompt(prompt, ""), tuple(map(_as_completion, aligned[start : start + len(rollout.completions)])))
            for prompt, rollout, start in zip(prompts, rollouts, starts, strict=False)  # starts has one more: the end
        ]
        packs = [pack.to(self._learner.device) for pack in pack_rollouts(teacher_rollouts, budget=self._budget)]
        by_completion: dict[int, Tensor] = {}
        for pack, logprobs in zip(
            packs, self._learner.logprobs(packs, self._teacher, frozen_as="the teacher"), strict=True
        ):
            segments = zip(pack.segments.sequence_ids, logprobs.split(pack.segments.lengths), strict=True)
            by_completion |= {number: values for number, values in segments if number >= 0}  # -1: a shared prompt
        return by_completion

    def _on_students_tokens(
        self, pack: Experience, aligned: Sequence[AlignedCompletion | None], teacher_logprobs: dict[int, Tensor]
    ) -> Tensor:
        """Return a pack's log-probs [N]: the teacher's, and the student's where the completion is not judged."""
        assert pack.old_logprobs is not None
        segments = list(pack.old_logprobs.split(pack.segments.lengths))
        for number, sequence in enumerate(pack.segments.sequence_ids):
            alignment = aligned[sequence] if sequence >= 0 else None
            if alignment is not None:
                spans, teacher_spans = (
                    torch.tensor(s, device=pack.tokens.device) for s in (alignment.spans, alignment.teacher_spans)
                )
                segments[number] = spread_over_spans(
                    segments[number], spans, teacher_logprobs[sequence], teacher_spans, num_spans=alignment.num_spans
                )
        return torch.cat(segments)


def _as_completion(aligned: AlignedCompletion | None) -> Completion:
    """Return the teacher's tokens of a completion; none where it is not aligned."""
    return Completion.of(aligned.teacher_ids if aligned else ())
