"""What every engine asks of a call before any work, and which random numbers each of its completions gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.errors import RolloutError
from alignlab.rollout.sampling import check_sampling, stream_key
from alignlab.types import Prompt, SamplingParams


def for_each(prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams]) -> list[SamplingParams]:
    """The parameters of each prompt, checked.

    Raises:
        RolloutError: there are not as many as prompts, or one is out of range.
    """
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(each) != len(prompts):
        raise RolloutError(
            f"sampling has {len(each)} parameters, and must have one for each of {len(prompts)} prompts; "
            "give one for all, or as many as prompts"
        )
    for params in set(each):
        check_sampling(params)
    return each


def check_prompts(
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
    vocab_size: int,
    limits: Sequence[tuple[int | None, str, str]],
) -> None:
    """Refuse a prompt that is empty, holds what is no token, or leaves no room for its completion.

    Args:
        limits: tokens of prompt and completion together, the limit's name, and how to mend it.

    Raises:
        RolloutError: with the prompt's number.
    """
    for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        length = len(prompt.token_ids)
        named = f"prompt {number} has {length} tokens"
        if length == 0:
            raise RolloutError(f"{named}, and must have at least one; give it a beginning-of-text token")
        if not (min(prompt.token_ids) >= 0 and max(prompt.token_ids) < vocab_size):
            raise RolloutError(
                f"prompt {number} holds token {max(prompt.token_ids)}, and each must be from 0 to {vocab_size - 1}; "
                "use the model's own tokenizer"
            )
        for limit, name, fix in limits:
            if limit is not None and length + params.max_new_tokens > limit:
                raise RolloutError(
                    f"{named}, and with max_new_tokens ({params.max_new_tokens}) must not exceed {name} ({limit}); "
                    f"{fix}"
                )


def completion_keys(prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[list[int]]:
    """A key of random numbers for each completion of each prompt.

    A prompt given twice with one seed goes on with further completions.
    """
    repeats: Counter[tuple[tuple[int, ...], int]] = Counter()
    keys = []
    for prompt, params in zip(prompts, sampling, strict=True):
        seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        first = repeats[prompt.token_ids, seed]
        repeats[prompt.token_ids, seed] += params.n
        keys.append([stream_key(seed, prompt.token_ids, first + index) for index in range(params.n)])
    return keys


def end_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams) -> frozenset[int]:
    """Tokens that end a completion: the model's own and those of the parameters."""
    if sampling.ignore_eos:
        return frozenset()
    ids = {tokenizer.eos_token_id, *sampling.stop_token_ids}
    for config in (lm.config, lm.generation_config):
        end = getattr(config, "eos_token_id", None)
        ids |= set(end) if isinstance(end, list | tuple) else {end}
    # A token beyond the vocabulary, as some configs name, can never be sampled.
    return frozenset(int(t) for t in ids if t is not None and t < lm.config.get_text_config().vocab_size)
