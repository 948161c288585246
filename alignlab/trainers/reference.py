"""The reference of a run on fixed examples: scored batch by batch, or once and kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from alignlab.data.packing import pack_groups
from alignlab.data.preferences import CompletionGroup
from alignlab.trainers.assemble import make_reference
from alignlab.trainers.learner import Learner
from alignlab.training.checkpoint import fingerprint
from alignlab.training.reference_cache import ReferenceCache
from alignlab.types import Experience, Rollout

_SCORED_TOGETHER = 512


class Reference:
    """Knows the reference's log-probs of groups of completions.

    Args:
        learner: whose policy is measured against what it was in the beginning.
        budget: tokens of a pack.

    Attributes:
        policy: a frozen copy; None for an adapter, whose reference is the base with the adapter off, and once all is
            known that it is to be asked.
        frozen: see `TrainingLoop.frozen`.
    """

    def __init__(self, learner: Learner, *, budget: int) -> None:
        self.learner, self.budget = learner, budget
        self.policy = make_reference(learner.policy)
        self.frozen = fingerprint_of(self.policy)
        self._known: dict[str, list[tuple[float, ...]]] = {}

    def precompute(self, data: Mapping[str, Sequence[CompletionGroup]]) -> None:
        """Score all examples of each name, or read what an earlier run has scored; then let a copy go."""
        if self._known:
            return
        cache = ReferenceCache((self.policy or self.learner.policy).model)
        known = {name: cache.get_or_make(examples, self._score) for name, examples in data.items() if examples}
        self._known, self.policy = known, None  # all or nothing: it may have been interrupted

    def groups(self, name: str, examples: Sequence[CompletionGroup], rows: Sequence[int]) -> list[Rollout]:
        """Some of the examples of a name, with the reference's log-probs where they are known."""
        known = self._known.get(name)
        return [examples[i].as_group(None if known is None else known[i]) for i in rows]

    def packs(self, name: str, groups: Sequence[Rollout]) -> list[Experience]:
        """Groups, or parts of them, that `groups` has made, packed with the reference's log-probs; none is divided."""
        packs = pack_groups(groups, budget=self.budget)
        if not self._known:
            return self._scored(packs)
        return [replace(pack, ref_logprobs=pack.rollout_logprobs, rollout_logprobs=None) for pack in packs]

    def _score(self, examples: Sequence[CompletionGroup]) -> list[tuple[float, ...]]:
        """Log-probs of all completions, end to end, of each example."""
        found: list[tuple[float, ...]] = []
        for start in range(0, len(examples), _SCORED_TOGETHER):
            groups = [example.as_group() for example in examples[start : start + _SCORED_TOGETHER]]
            scores: list[tuple[float, ...]] = [()] * len(groups)
            for pack in self._scored(pack_groups(groups, budget=self.budget)):
                assert pack.ref_logprobs is not None
                segments, parts = pack.segments, pack.ref_logprobs.cpu().split(pack.segments.lengths)
                for part, sequence, group in zip(parts, segments.sequence_ids, segments.group_ids, strict=True):
                    if sequence >= 0:  # the completions of a group are in their order
                        scores[group] += tuple(part.tolist())
            found += scores
        return found

    def _scored(self, packs: Sequence[Experience]) -> list[Experience]:
        moved = [replace(pack, rollout_logprobs=None).to(self.learner.device) for pack in packs]
        scores = self.learner.score_reference(moved, self.policy)
        return [replace(pack, ref_logprobs=score) for pack, score in zip(moved, scores, strict=True)]


def fingerprint_of(reference: nn.Module | None) -> dict[str, str]:
    """Of a frozen copy's weights, by what it is; empty where there is no copy. See `TrainingLoop.frozen`."""
    return {} if reference is None else {"reference": fingerprint(reference.named_parameters())}
