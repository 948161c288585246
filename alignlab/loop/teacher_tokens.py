"""The likeliest tokens of a teacher on fixed examples, which stand in for its whole distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignlab.config.trainer import MemorySettings
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.functional.distillation import Head, TopTokens, chunked_top_tokens
from alignlab.loop.student import Comparison, TaughtExperience
from alignlab.models.decoder import output_head
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.policy import Policy
from alignlab.runs.teacher_cache import CachedTeacher
from alignlab.types import Experience


def top_tokens(
    teacher: Policy, examples: Sequence[Example], comparison: Comparison, k: int, memory: MemorySettings
) -> TopTokens:
    """Return the teacher's `k` likeliest tokens where each trained token of `examples` is predicted, in order.

    Raises:
        NumericsError: a log-prob of the teacher is not finite.
    """
    device = next(teacher.parameters()).device
    by_example: dict[int, TopTokens] = {}
    for pack in pack_examples(examples, budget=memory.tokens_per_microbatch):
        moved = pack.to(device)
        hidden, _ = teacher.predicting_states(moved.tokens, moved.segments, moved.completion_mask)
        top = chunked_top_tokens(
            hidden, Head(*output_head(teacher.model)), k=k, width=comparison.width, temperature=comparison.temperature,
            chunk_tokens=memory.logprob_chunk_tokens,
        )
        check_finite([("pack", top.logprobs)], "the log-probs of the teacher", fix=TAKE_ANOTHER)
        counts = [int(part.sum()) for part in pack.completion_mask.split(pack.segments.lengths)]
        parts = zip(*(tensor.cpu().split(counts) for tensor in top), strict=True)
        by_example |= {i: TopTokens(*part) for i, part in zip(pack.segments.sequence_ids, parts, strict=True)}
    return join([by_example[i] for i in range(len(examples))])


def taught_pack(pack: Experience, rows: Sequence[int], cached: CachedTeacher) -> TaughtExperience:
    """Return a pack with the teacher's likeliest tokens.

    Args:
        rows: index of each of the pack's examples, in the pack's order.
        cached: the tokens of all examples.
    """
    ids, logprobs, rest = join([cached.get(row) for row in rows])
    return TaughtExperience(
        pack.tokens, pack.segments, pack.completion_mask,
        teacher_ids=ids, teacher_logprobs=logprobs, teacher_rest=rest,
    )


def join(parts: Sequence[TopTokens]) -> TopTokens:
    """Return the tokens of several parts, one after another."""
    return TopTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
