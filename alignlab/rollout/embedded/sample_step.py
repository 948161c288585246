"""One step of the engine that samples: compute, draw a token at each place, keep the drafts that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignlab.rollout.embedded.places import places_of
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.sampler import Draw, Sampler, require_choice
from alignlab.rollout.embedded.scheduler import Step
from alignlab.rollout.embedded.sequence import TokenSequence


def sample_outputs(
    step: Step, outputs: Sequence[tuple[TokenSequence, slice]], runner: Runner, sampler: Sampler, version: int,
    observe: Callable[[Sequence[tuple[TokenSequence, slice]], Tensor], None],
) -> tuple[int, int]:
    """Compute a step, and append the tokens that are sampled from it.

    Args:
        outputs: the sequences that get logits, each with its rows among all logits of the step.
        version: of the weights.
        observe: is told `outputs` with the final states of their rows [M,D].

    Returns:
        The number of tokens that were appended, and of those that were drafted.

    Raises:
        RolloutError: as `Sampler.draw`.
    """
    # A sequence that reads its prompt has rows before its prompt is computed.
    sampled = [(sequence, rows) for sequence, rows in outputs if not sequence.num_pending]
    # Forks sample from the logits of one prompt, and a sequence with drafts from those after each.
    chosen = [row for sequence, rows in sampled for row in range(rows.stop - 1 - sequence.num_drafts, rows.stop)]
    places = [place for sequence, _ in sampled for place in places_of(sequence)]
    inputs = sampler.inputs(places, runner.vocab_size) if places else []
    hidden, (rows, *inputs) = runner.hidden(step, [torch.tensor(chosen, dtype=torch.int64), *inputs])
    observe(outputs, hidden)
    if not places:
        return 0, 0
    is_every_row = chosen == list(range(hidden.shape[0]))
    logits = runner.logits(hidden) if is_every_row else _logits_of(hidden, rows, runner)
    draws = iter(sampler.draw(logits, places, inputs))
    num_kept = 0
    for sequence, _ in sampled:
        num_kept += keep(sequence, [next(draws) for _ in range(1 + sequence.num_drafts)], version)
    return len(sampled) + num_kept, num_kept


def _logits_of(hidden: Tensor, rows: Tensor, runner: Runner) -> Tensor:
    """Return the logits [R,V] after some rows [R] of `hidden` [M,D], computed once for rows that come several times."""
    if len(rows) > hidden.shape[0]:
        return runner.logits(hidden).index_select(0, rows)
    return runner.logits(hidden.index_select(0, rows))


def keep(sequence: TokenSequence, draws: Sequence[Draw], version: int) -> int:
    """Append the draws of a sequence up to the first that is not its draft; return how many drafts were kept.

    Args:
        sequence: its drafts are computed, and are taken off.
        draws: of the place of each draft, and of the one after them.
        version: of the weights.

    Raises:
        RolloutError: nothing that its request allows could be drawn at a place that counts.
    """
    drafts = sequence.take_drafts()
    for number, draw in enumerate(draws):
        require_choice(draw.logprob, sequence.num_sampled)
        sequence.append(*draw, version)
        is_kept = number < len(drafts) and draw.token == drafts[number]
        if sequence.finish_reason is not None or not is_kept:
            break
    sequence.num_computed = len(sequence.token_ids) - 1  # the entries of other drafts are overwritten
    return number + is_kept
