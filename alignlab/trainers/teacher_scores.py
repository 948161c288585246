"""What a teacher says of a student's rollouts: log-probs on the student's tokens, whatever the teacher's own are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from alignlab.data.alignment import AlignedCompletion, TextAligner
from alignlab.data.packing import pack_rollouts
from alignlab.functional.reverse_kl import spread_over_spans
from alignlab.models.attention import causal_lm, num_embeddings
from alignlab.models.policy import Policy
from alignlab.trainers.learner import Learner
from alignlab.trainers.teacher import readable_tokens
from alignlab.types import Completion, Experience, Prompt, Rollout


class TeacherScores(Protocol):
    """What a teacher says of a student's packs."""

    def of(self, rollouts: Sequence[Rollout], packs: Sequence[Experience]) -> tuple[list[Tensor], Tensor]:
        """Log-probs [N] of each pack's completion tokens under the teacher; and which completions [B] it can judge.

        Args:
            rollouts: that the packs were made of.
            packs: with `old_logprobs`, on the learner's device.
        """
        ...


class TokenScores:
    """A teacher with the student's tokenizer; `TeacherScores`. It chooses its own experts."""

    def __init__(self, learner: Learner, teacher: Policy) -> None:
        self._learner, self._teacher = learner, teacher

    def of(self, rollouts: Sequence[Rollout], packs: Sequence[Experience]) -> tuple[list[Tensor], Tensor]:
        """See `TeacherScores`; it can judge all."""
        count = sum(len(rollout.completions) for rollout in rollouts)
        rows = num_embeddings(self._teacher.model)
        asked = [replace(pack, routing=None, tokens=readable_tokens(pack.tokens, rows)) for pack in packs]
        found = self._learner.score(asked, self._teacher, of="the teacher")
        return found, torch.ones(count, dtype=torch.bool, device=self._learner.device)


class TextScores:
    """A teacher with a tokenizer of its own; `TeacherScores`. A span's score is spread over the student's tokens.

    Args:
        budget: tokens of a pack of its own.
    """

    def __init__(self, learner: Learner, teacher: Policy, aligner: TextAligner, *, budget: int) -> None:
        self._learner, self._teacher, self._aligner, self._budget = learner, teacher, aligner, budget
        text_config = causal_lm(teacher.model).config.get_text_config()
        self._positions: int | None = getattr(text_config, "max_position_embeddings", None)

    def of(self, rollouts: Sequence[Rollout], packs: Sequence[Experience]) -> tuple[list[Tensor], Tensor]:
        """See `TeacherScores`; it can judge completions that are aligned."""
        prompts = self._aligner.prompt_ids([rollout.prompt for rollout in rollouts])
        aligned = [
            self._aligner.completion(c, room=None if self._positions is None else self._positions - len(prompt))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
            for c in rollout.completions
        ]
        judged = self._judge(prompts, rollouts, aligned)
        can = torch.tensor([each is not None for each in aligned], device=self._learner.device)
        return [self._on_students_tokens(pack, aligned, judged) for pack in packs], can

    def _judge(
        self,
        prompts: Sequence[tuple[int, ...]],
        rollouts: Sequence[Rollout],
        aligned: Sequence[AlignedCompletion | None],
    ) -> dict[int, Tensor]:
        """Log-probs of the teacher's tokens, by completion."""
        rest = iter(aligned)
        theirs = [
            Rollout(Prompt(prompt, ""), tuple(_as_completion(next(rest)) for _ in rollout.completions))
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        packs = [pack.to(self._learner.device) for pack in pack_rollouts(theirs, budget=self._budget)]
        found: dict[int, Tensor] = {}
        for pack, scores in zip(packs, self._learner.score(packs, self._teacher, of="the teacher"), strict=True):
            parts = scores.split(pack.segments.lengths)
            found |= {i: part for i, part in zip(pack.segments.sequence_ids, parts, strict=True) if i >= 0}
        return found

    def _on_students_tokens(
        self, pack: Experience, aligned: Sequence[AlignedCompletion | None], judged: dict[int, Tensor]
    ) -> Tensor:
        assert pack.old_logprobs is not None
        parts = list(pack.old_logprobs.split(pack.segments.lengths))
        for number, sequence in enumerate(pack.segments.sequence_ids):
            each = aligned[sequence] if sequence >= 0 else None
            if each is not None:
                own, theirs = (torch.tensor(s, device=pack.tokens.device) for s in (each.spans, each.teacher_spans))
                parts[number] = spread_over_spans(
                    parts[number], own, judged[sequence], theirs, num_spans=each.num_spans
                )
        return torch.cat(parts)


def _as_completion(aligned: AlignedCompletion | None) -> Completion:
    """The teacher's tokens of a completion; none where it is not aligned."""
    ids = aligned.teacher_ids if aligned else ()
    zeros = (0.0,) * len(ids)
    return Completion(ids, "", zeros, None, "stop", (0,) * len(ids))
