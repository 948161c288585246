"""One step of the engine that samples: compute, draw a token at each place, keep the drafts that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignlab.rollout.embedded.places import places_of
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.sampler import Draw, Sampler
from alignlab.rollout.embedded.scheduler import Step
from alignlab.rollout.embedded.sequence import TokenSequence


def sample_outputs(
    step: Step, outputs: Sequence[tuple[TokenSequence, slice]], runner: Runner, sampler: Sampler, version: int
) -> int:
    """Compute a step, and append the tokens that are sampled from it; return how many of them were drafted.

    Args:
        outputs: the sequences that get logits, each with its rows among all logits of the step.
        version: of the weights.

    Raises:
        RolloutError: as `Sampler.draw`.
    """
    if not outputs:
        runner.hidden(step)
        return 0
    # Forks sample from the logits of one prompt, and a sequence with drafts from those after each.
    chosen = [rows.start + number for sequence, rows in outputs for number in range(1 + sequence.num_drafts)]
    places = [place for sequence, _ in outputs for place in places_of(sequence)]
    inputs = sampler.inputs(places, runner.vocab_size)
    hidden, (rows, *inputs) = runner.hidden(step, [torch.tensor(chosen), *inputs])
    logits = runner.logits(hidden)
    if len(rows) > logits.shape[0]:
        logits = logits.index_select(0, rows)
    draws = iter(sampler.draw(logits, places, inputs))
    num_kept = 0
    for sequence, _ in outputs:
        num_kept += keep(sequence, [next(draws) for _ in range(1 + sequence.num_drafts)], version)
    return num_kept


def keep(sequence: TokenSequence, draws: Sequence[Draw], version: int) -> int:
    """Append the draws of a sequence up to the first that is not its draft; return how many drafts were kept.

    Args:
        sequence: its drafts are computed, and are taken off.
        draws: of the place of each draft, and of the one after them.
        version: of the weights.
    """
    drafts = sequence.take_drafts()
    for number, draw in enumerate(draws):
        sequence.append(*draw, version)
        is_kept = number < len(drafts) and draw.token == drafts[number]
        if sequence.finish_reason is not None or not is_kept:
            break
    sequence.num_computed = len(sequence.token_ids) - 1  # the entries of other drafts are overwritten
    return number + is_kept
