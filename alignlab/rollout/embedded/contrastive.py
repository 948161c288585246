"""Contrastive search: of the likeliest tokens, the one whose state is least like those of the tokens before it.

    value(v) = (1 - penalty) * p(v) - penalty * max over tokens j before v of cos(state(v), state(j))

The states are the final ones of the model, before its head. Each candidate is computed as a fork, and the forks of all
but the best one are dropped.

Reference: Su et al. (2022), arXiv:2202.06417, Eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.runner import Records
from alignlab.rollout.embedded.search import Computed, Row, copy_of
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.transfer import to_device
from alignlab.types import Completion, Rollout, SamplingParams


@dataclass(frozen=True)
class ContrastiveParams:
    """Parameters of a contrastive search.

    Attributes:
        num_candidates: likeliest tokens that are compared, >= 1; 1 is greedy.
        penalty: weight of the likeness to earlier tokens, from 0, which is greedy, to under 1.
        max_new_tokens: largest number of tokens of a completion, >= 1.
        stop_token_ids: tokens that end a completion, in addition to the model's end tokens.
    """

    num_candidates: int = 4
    penalty: float = 0.6
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()

    reads_prompt = True

    @property
    def num_forks(self) -> int:
        """Continuations of a prompt that are followed at once."""
        return self.num_candidates

    def sampling(self, max_running: int) -> SamplingParams:
        """Return the limits of completions as an engine takes them; nothing is sampled.

        Raises:
            RolloutError: a parameter is out of range, with the rule, the value and the fix.
        """
        rules = {
            "num_candidates": (
                1 <= self.num_candidates <= max_running, f"be from 1 to rollout.max_running ({max_running})"
            ),
            "penalty": (0 <= self.penalty < 1, "be at least 0 and under 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise RolloutError(f"contrastive.{name} is {getattr(self, name)}, and must {rule}")
        return SamplingParams(
            temperature=0.0, max_new_tokens=self.max_new_tokens, stop_token_ids=self.stop_token_ids, seed=0
        )


def best_candidate(probs: Tensor, states: Tensor, earlier: Tensor, *, penalty: float) -> Tensor:
    """Return the index of the best of K candidates, a scalar.

    Args:
        probs: [K].
        states: [K,D], of the candidates.
        earlier: [N,D], of the tokens before them, of length 1.
        penalty: weight of the likeness.
    """
    likeness = (_unit(states) @ earlier.T).amax(-1)
    return ((1 - penalty) * probs - penalty * likeness).argmax()


class ContrastiveSearch:
    """The candidates of one prompt.

    Args:
        root: the prompt.
        params: of the search.
        engine: computes the candidates.
    """

    def __init__(self, root: TokenSequence, params: ContrastiveParams, engine: Computed) -> None:
        root.reads_prompt = True
        self._params, self._engine = params, engine
        self._prompt, self._ends = root.request.prompt, root.request.end_token_ids
        self._earlier: list[Tensor] = []
        self._candidates = [root]
        self._states: dict[TokenSequence, Tensor] = {}
        self._found: tuple[TokenSequence, Records] | None = None

    @property
    def sequences(self) -> list[TokenSequence]:
        """The candidates; the prompt alone at first; none once the search has ended."""
        return [] if self._found else self._candidates

    @property
    def num_likeliest(self) -> int:
        """Candidates of a step."""
        return self._params.num_candidates

    def choose(self, states: dict[TokenSequence, Tensor]) -> Tensor | None:
        """Return which of the computed candidates is the best, a scalar; None for the prompt, which is alone."""
        self._states = states
        if not self._candidates[0].num_sampled:
            return None
        of_candidates = torch.cat([states[candidate] for candidate in self._candidates])
        probs = torch.tensor([candidate.raw_logprobs[-1] for candidate in self._candidates]).exp()
        [probs] = to_device([probs], of_candidates.device)
        return best_candidate(probs, of_candidates, torch.cat(self._earlier), penalty=self._params.penalty)

    def step(self, rows: dict[TokenSequence, Row], choice: int | None) -> None:
        """Fork the best of the computed candidates, and drop the others."""
        best = self._candidates[choice or 0]
        for candidate in self._candidates:
            if candidate is not best:
                self._engine.scheduler.finish(candidate)
        self._earlier.append(_unit(self._states[best]))
        if best.num_pending:  # the rest of the prompt is computed in further steps
            return
        if best.num_sampled and (best.token_ids[-1] in self._ends or not best.num_left):
            best.finish_reason = "stop" if best.token_ids[-1] in self._ends else "length"
            self._found = best, self._engine.records(best)
            self._engine.scheduler.finish(best)
        else:
            self._fork(best, rows[best])

    def result(self, completion: Callable[[TokenSequence, Records], Completion]) -> Rollout:
        """Return the completion that was found; both log-probs of a token are the model's own."""
        assert self._found is not None
        return Rollout(self._prompt, (completion(*self._found),))

    def _fork(self, parent: TokenSequence, likeliest: Row) -> None:
        """Make a candidate of each of the likeliest tokens after a sequence; the last one is the sequence itself."""
        self._candidates = [copy_of(parent) for _ in range(len(likeliest.tokens) - 1)]
        for fork in self._candidates:
            self._engine.scheduler.fork(parent, fork)
        self._candidates.append(parent)
        for candidate, token, value in zip(self._candidates, likeliest.tokens, likeliest.logprobs, strict=True):
            candidate.append(token, value, value, self._engine.policy_version)
            candidate.finish_reason = None


def _unit(states: Tensor) -> Tensor:
    """Return states [N,D] in float32, of length 1."""
    return torch.nn.functional.normalize(states.float(), dim=-1)
