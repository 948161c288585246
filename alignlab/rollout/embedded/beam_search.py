"""Beam search in the embedded engine: beams fork as completions of one prompt do, and share the blocks of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from alignlab.rollout.embedded.beams import (
    BeamParams,
    BeamResult,
    Continuation,
    Finished,
    continuations,
    likeliest_needed,
    split,
)
from alignlab.rollout.embedded.runner import Records
from alignlab.rollout.embedded.search import Computed, Row, copy_of
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.types import Completion, Rollout


class Ended(NamedTuple):
    """A completion that has ended, and what the engine chose for its tokens."""

    sequence: TokenSequence
    records: Records


@dataclass(eq=False)
class BeamGroup:
    """The live beams of a group, with their log-probs, and its completions that have ended."""

    finished: Finished[Ended]
    beams: list[tuple[TokenSequence, float]] = field(default_factory=list)


class PromptBeams:
    """The beams of one prompt.

    Args:
        root: the prompt, of which all beams are forks.
        params: of the search.
        engine: computes the beams.
    """

    def __init__(self, root: TokenSequence, params: BeamParams, engine: Computed) -> None:
        self._params, self._engine = params, engine
        self._prompt = root.request.prompt
        self._ends = root.request.end_token_ids
        self.groups = [
            BeamGroup(Finished(params.group_size, params.length_penalty), [(root, 0.0)])
            for _ in range(params.num_groups)
        ]

    @property
    def sequences(self) -> list[TokenSequence]:
        """The live sequences; the root stands in all groups until it forks."""
        return list(dict.fromkeys(sequence for group in self.groups for sequence, _ in group.beams))

    @property
    def num_likeliest(self) -> int:
        """Tokens after a beam among which the next beams are."""
        others = self._params.num_beams - self._params.group_size
        return likeliest_needed(self._num_continuations, others)

    @property
    def _num_continuations(self) -> int:
        """Continuations of a group that are looked at: as many as there are beams may go on, and as many may end."""
        return self._params.group_size * (1 + len(self._ends))

    def choose(self, states: dict[TokenSequence, Tensor]) -> None:
        """Return nothing: beams go on from log-probs alone."""

    def step(self, rows: dict[TokenSequence, Row], choice: int | None) -> None:
        """Choose the next beams, of the live sequences that were computed."""
        taken: list[int] = []
        children: list[tuple[BeamGroup, TokenSequence, Continuation]] = []
        for group in self.groups:
            if not group.beams:
                continue
            found = continuations(
                [rows[sequence] for sequence, _ in group.beams],
                [total for _, total in group.beams], taken, diversity=self._params.diversity,
                count=self._num_continuations,
            )
            going_on, ends = split(found, self._params.group_size, self._ends, is_last=self._is_last(group))
            for end in ends:
                self._end(group, end)
            if going_on and not self._is_final(group, going_on[0]):
                children += [(group, group.beams[c.beam][0], c) for c in going_on]
                taken += [c.token for c in going_on]
        self._replace(children)

    def result(self, completion: Callable[[TokenSequence, Records], Completion]) -> BeamResult:
        """Return the best completions of all groups that have ended, the best one first.

        Args:
            completion: makes one of a sequence and the experts of its tokens.
        """
        ended = [item for group in self.groups for item in group.finished.items]
        best = sorted(ended, key=lambda item: -item[0])[: self._params.num_best]
        rollout = Rollout(self._prompt, tuple(completion(*finished) for _, finished in best))
        return BeamResult(rollout, tuple(score for score, _ in best))

    def _is_last(self, group: BeamGroup) -> bool:
        return group.beams[0][0].num_sampled + 1 == self._params.max_new_tokens

    def _is_final(self, group: BeamGroup, best: Continuation) -> bool:
        """Return whether the beams of a group, of which `best` is the best, cannot beat those that have ended."""
        length = group.beams[0][0].num_sampled + 1
        return group.finished.is_final(best.logprob, length, self._params.max_new_tokens)

    def _end(self, group: BeamGroup, end: Continuation) -> None:
        parent = group.beams[end.beam][0]
        score = group.finished.score(end.logprob, parent.num_sampled + 1)
        if group.finished.takes(score):
            sequence = copy_of(parent)
            sequence.tables = parent.tables  # which its records are read from, and no longer
            self._append(sequence, end)
            sequence.finish_reason = "stop" if end.token in self._ends else "length"
            group.finished.add(score, Ended(sequence, self._engine.records(sequence)))
            sequence.tables = {}

    def _replace(self, children: Sequence[tuple[BeamGroup, TokenSequence, Continuation]]) -> None:
        """Fork the sequences that have several children, and finish those that have none."""
        old = self.sequences
        last = {parent: number for number, (_, parent, _) in enumerate(children)}
        for group in self.groups:
            group.beams = []
        appended = []
        for number, (group, parent, child) in enumerate(children):
            sequence = parent
            if last[parent] != number:
                sequence = copy_of(parent)
                self._engine.scheduler.fork(parent, sequence)
            appended.append((sequence, child))
            group.beams.append((sequence, child.logprob))
        for sequence, child in appended:  # only now: forks begin as the parent is
            self._append(sequence, child)
        for sequence in old:
            if sequence not in last:
                self._engine.scheduler.finish(sequence)

    def _append(self, sequence: TokenSequence, child: Continuation) -> None:
        sequence.append(child.token, child.token_logprob, child.token_logprob, self._engine.policy_version)
        sequence.finish_reason = None
