"""Searches over continuations that are computed, compared and dropped: what beam and contrastive search share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.runner import Records
from alignlab.rollout.embedded.sampler import require_number
from alignlab.rollout.embedded.scheduler import Scheduler
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.types import Completion, SamplingParams


class SearchParams(Protocol):
    """Parameters of a search.

    Attributes:
        max_new_tokens: largest number of tokens of a completion.
        reads_prompt: the states of all tokens of a prompt are needed, and not that of the last alone.
    """

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def reads_prompt(self) -> bool: ...

    @property
    def num_forks(self) -> int:
        """Most continuations of a prompt at once."""
        ...

    def sampling(self, max_running: int) -> SamplingParams:
        """Return the limits of completions as an engine takes them; nothing is sampled.

        Raises:
            RolloutError: a parameter is out of range.
        """
        ...


class Row(NamedTuple):
    """The likeliest tokens after a computed sequence, the likeliest first, with their log-probs."""

    tokens: list[int]
    logprobs: list[float]


class Computed(NamedTuple):
    """The engine's part of a search.

    Attributes:
        scheduler: runs the prompts and their forks.
        records: returns what the engine chose for a sequence's tokens.
        policy_version: of the weights.
    """

    scheduler: Scheduler
    records: Callable[[TokenSequence], Records]
    policy_version: int


class Search(Protocol):
    """The continuations of one prompt."""

    def __init__(self, root: TokenSequence, params: Any, engine: Computed) -> None: ...

    @property
    def sequences(self) -> list[TokenSequence]:
        """The sequences that are computed next, all in one step; none once the search has ended."""
        ...

    @property
    def num_likeliest(self) -> int:
        """Tokens of a `Row` that a step looks at."""
        ...

    def choose(self, states: dict[TokenSequence, Tensor]) -> Tensor | None:
        """Return which of the computed sequences the search goes on from, a scalar on their device.

        None where states have no part in it.

        Args:
            states: the final states of each sequence's new tokens [n,D].
        """
        ...

    def step(self, rows: dict[TokenSequence, Row], choice: int | None) -> None:
        """Go on from the computed sequences: fork, append and finish.

        Args:
            choice: of `choose`.
        """
        ...

    def result(self, completion: Callable[[TokenSequence, Records], Completion]) -> Any:
        """Return what was found.

        Args:
            completion: makes one of a sequence and the experts of its tokens.
        """
        ...


def last_rows(outputs: Sequence[tuple[TokenSequence, slice]]) -> Tensor:
    """Return the last row of each sequence, [B] int64, on the host; arguments as in `advance`."""
    return torch.tensor([rows.stop - 1 for _, rows in outputs], dtype=torch.int64)


def advance(
    searches: Sequence[Search], hidden: Tensor, last: Tensor, head: Callable[[Tensor], Tensor],
    outputs: Sequence[tuple[TokenSequence, slice]],
) -> None:
    """Let the searches whose sequences were computed go on. All that they look at on the host comes in one transfer.

    Args:
        hidden: [M,D], final states of one step.
        last: of `last_rows`, on the same device.
        head: computes logits [B,V] from states [B,D].
        outputs: each sequence with its rows of `hidden`.

    Raises:
        RolloutError: the logits of a sequence are not finite.
    """
    if not outputs:
        return
    states = {sequence: hidden[rows] for sequence, rows in outputs}
    going_on = [search for search in searches if search.sequences and search.sequences[0] in states]
    logprobs = head(hidden.index_select(0, last)).float().log_softmax(-1)
    count = min(max(search.num_likeliest for search in searches), logprobs.shape[1])
    choices = [search.choose({sequence: states[sequence] for sequence in search.sequences}) for search in going_on]
    rows, chosen = _on_host(logprobs.topk(count), choices)
    computed = dict(zip(states, rows, strict=True))
    for sequence, row in computed.items():
        require_number(row.logprobs[0], len(sequence.token_ids))
    for search, choice in zip(going_on, chosen, strict=True):
        search.step({sequence: computed[sequence] for sequence in search.sequences}, choice)


def _on_host(likeliest: Any, choices: Sequence[Tensor | None]) -> tuple[list[Row], list[int | None]]:
    """Return the likeliest tokens of each row, and the choices, by one transfer: float64 holds token ids."""
    (num_rows, count), known = likeliest.values.shape, [choice for choice in choices if choice is not None]
    columns = [part.double().flatten() for part in (likeliest.indices, likeliest.values, *known)]
    numbers: list[float] = torch.cat(columns).tolist()
    size = num_rows * count
    rows = [
        Row([int(token) for token in numbers[start : start + count]], numbers[size + start : size + start + count])
        for start in range(0, size, count)
    ]
    rest = iter(numbers[2 * size :])
    return rows, [None if choice is None else int(next(rest)) for choice in choices]


def copy_of(parent: TokenSequence) -> TokenSequence:
    """Return a sequence of the same tokens, without blocks."""
    return TokenSequence(
        parent.request, parent.key, list(parent.token_ids), num_computed=parent.num_computed,
        digests=list(parent.digests), logprobs=list(parent.logprobs), raw_logprobs=list(parent.raw_logprobs),
        versions=list(parent.versions), evictions=dict(parent.evictions),
    )


def in_batches(
    roots: Sequence[TokenSequence], params: SearchParams, max_running: int,
    holds: Callable[[Sequence[TokenSequence]], bool],
) -> Iterator[Sequence[TokenSequence]]:
    """Yield prompts, as many at once as run together with all their continuations.

    Args:
        max_running: sequences that run together.
        holds: whether the cache has room for sequences at once.

    Raises:
        RolloutError: the cache does not hold the continuations of one prompt.
    """
    start = 0
    while start < len(roots):
        chosen = roots[start : start + max_running // params.num_forks]
        while not holds([*chosen] * params.num_forks):
            if len(chosen) == 1:
                raise RolloutError(
                    f"the search follows {params.num_forks} continuations at once, and the cache must hold that many "
                    f"completions of {params.max_new_tokens} tokens after a prompt of {len(chosen[0].token_ids)}; "
                    "follow fewer, lower max_new_tokens, raise rollout.cache_tokens, or free memory"
                )
            chosen = chosen[: len(chosen) // 2]
        yield chosen
        start += len(chosen)
