"""Requests to any engine: their checks before work begins, keys of random numbers, and end tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.errors import RolloutError
from alignlab.rollout.decoding_rules import check_controls
from alignlab.rollout.embedded.sampling import check_sampling, stream_key
from alignlab.types import Prompt, Rollout, SamplingParams


def sampling_of_prompts(
    prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams]
) -> list[SamplingParams]:
    """Return the checked parameters of each prompt; `sampling` is one for all, or one for each.

    Raises:
        RolloutError: their number differs from that of the prompts, or one is out of range.
    """
    params_of_prompts = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params_of_prompts) != len(prompts):
        raise RolloutError(
            f"sampling has {len(params_of_prompts)} parameters, and must have one for each of {len(prompts)} prompts; "
            "give one for all, or as many as prompts"
        )
    for params in set(params_of_prompts):
        check_sampling(params)
    return params_of_prompts


@dataclass(frozen=True)
class LengthLimit:
    """Most tokens of a prompt and its completion together; None is no limit."""

    max_tokens: int | None
    name: str
    fix: str


def length_limits(lm: PreTrainedModel, max_tokens: int | None, setting: str, *, shorten: str) -> list[LengthLimit]:
    """Return the limits of a model and of an engine's setting.

    Args:
        lm: the model.
        max_tokens: value of the setting.
        setting: name of the setting, with its section.
        shorten: advice to somebody who cannot raise a limit.
    """
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return [
        LengthLimit(positions, "the model's max_position_embeddings", shorten),
        LengthLimit(max_tokens, setting, f"raise {setting.rpartition('.')[2]}, {shorten}"),
    ]


def check_prompts(
    prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], vocab_size: int, limits: Sequence[LengthLimit]
) -> None:
    """Raise if a prompt is empty, holds an unknown token, or leaves no room for its completion, or its parameters
    contradict the vocabulary or each other.

    Args:
        prompts: the prompts.
        sampling: parameters of each prompt.
        vocab_size: token ids are below it.
        limits: limits of prompt and completion together.

    Raises:
        RolloutError: with the prompt's number, or the parameter's name.
    """
    for params in set(sampling):
        check_controls(params, vocab_size)
    for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        check_token_ids(f"prompt {number}", prompt.token_ids, vocab_size)
        length = len(prompt.token_ids)
        for limit in limits:
            if limit.max_tokens is not None and length + params.max_new_tokens > limit.max_tokens:
                raise RolloutError(
                    f"prompt {number} has {length} tokens, and with max_new_tokens ({params.max_new_tokens}) must not "
                    f"exceed {limit.name} ({limit.max_tokens}); {limit.fix}"
                )


def check_completions(rollouts: Sequence[Rollout], vocab_size: int, limits: Sequence[LengthLimit]) -> None:
    """Raise if the log-probs of given completions cannot be computed. Arguments as in `check_prompts`.

    Raises:
        RolloutError: with the numbers of prompt and completion.
    """
    for number, rollout in enumerate(rollouts):
        check_token_ids(f"prompt {number}", rollout.prompt.token_ids, vocab_size)
        for index, completion in enumerate(rollout.completions):
            name = f"completion {index} of prompt {number}"
            if completion.token_ids:
                check_token_ids(name, completion.token_ids, vocab_size)
            length = len(rollout.prompt.token_ids) + len(completion.token_ids)
            for limit in limits:
                if limit.max_tokens is not None and length > limit.max_tokens:
                    raise RolloutError(
                        f"{name} has {length} tokens with its prompt, and must not exceed {limit.name} "
                        f"({limit.max_tokens}); {limit.fix}"
                    )


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises:
    RolloutError: there are no tokens, or one is outside the vocabulary.
    """
    if not token_ids:
        raise RolloutError(f"{name} has 0 tokens, and must have at least one; give it a beginning-of-text token")
    outside = [token for token in (min(token_ids), max(token_ids)) if not 0 <= token < vocab_size]
    if outside:
        raise RolloutError(
            f"{name} holds token {outside[0]}, and each must be from 0 to {vocab_size - 1}; use the model's own "
            "tokenizer"
        )


def completion_keys(prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[list[int]]:
    """Return a key of random numbers for each completion of each prompt.

    If a prompt stands twice with the same seed, the keys of the second continue those of the first.
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
    """Return the tokens that end a completion: the model's own and those of the parameters."""
    if sampling.ignore_eos:
        return frozenset()
    ids = {tokenizer.eos_token_id, *sampling.stop_token_ids}
    for config in (lm.config, lm.generation_config):
        end = getattr(config, "eos_token_id", None)
        ids |= set(end) if isinstance(end, list | tuple) else {end}
    # Some configs name a token beyond the vocabulary, which can never be sampled.
    return frozenset(int(t) for t in ids if t is not None and t < lm.config.get_text_config().vocab_size)


def abandoned() -> RolloutError:
    """Return the error of a call that `abandon` interrupted."""
    return RolloutError("generation was abandoned, because the run ends")
