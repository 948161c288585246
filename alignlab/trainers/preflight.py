"""What is looked at before a training from rollouts begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from alignlab.config.render import RenderSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings, VLLMServerSettings, VLLMSettings
from alignlab.data.vocabulary import check_ids
from alignlab.errors import ConfigError
from alignlab.models.attention import num_embeddings, num_positions
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
TRUNCATES = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
"""Settings that change the distribution sampled from, and where they do not."""


class Samples(Protocol):
    """Settings of a trainer, or of a stage, that samples completions."""

    @property
    def sampling(self) -> SamplingSettings:
        """How completions are drawn."""
        ...

    @property
    def rollout(self) -> RolloutSettings | VLLMSettings | VLLMServerSettings:
        """The engine."""
        ...


class SampledBy(NamedTuple):
    """Settings of samples that no trainer draws."""

    sampling: SamplingSettings
    rollout: RolloutSettings | VLLMSettings | VLLMServerSettings


def with_room(
    prompts: Sequence[Prompt], model: Any, config: Samples, settings: RenderSettings, *,
    whose: str = "the model", tokenizer: PreTrainedTokenizerBase | None = None, what: str = "prompt",
    read_as: Sequence[Sequence[int]] | None = None,
) -> Sequence[Prompt]:
    """Return the prompts that a model can read with a completion behind them, in its positions and in the engine's.

    Args:
        settings: how rows are read; those that do not fit are left out, and counted, under `on_bad_row: skip`.
        whose: the model, for messages.
        tokenizer: names a token that the model has no embedding for.
        what: the prompts, for messages.
        read_as: token ids of each prompt as the model reads it; default: the prompt's own.

    Raises:
        ConfigError: with the value that fits; one does not fit and is not to be left out, or none fits.
    """
    ids = [prompt.token_ids for prompt in prompts] if read_as is None else read_as
    check_ids(((row,) for row in ids), {whose: num_embeddings(model)}, tokenizer, what=what)
    engine_limit = "cache_tokens" if isinstance(config.rollout, RolloutSettings) else "context_tokens"
    served = getattr(config.rollout, engine_limit)
    limits = {f"{whose}'s {{:g}} positions": num_positions(model), f"rollout.{engine_limit} ({{}})": served}
    wanted = config.sampling.max_new_tokens
    for named, limit in limits.items():
        lengths = list(map(len, ids))
        fits = [limit is None or length + wanted <= limit for length in lengths]
        if all(fits):
            continue
        assert limit is not None
        if settings.on_bad_row == "error" or not any(fits):
            raise ConfigError(_no_room(max(lengths), wanted, limit, named.format(limit), what, settings))
        logger.warning(
            "%s: skipped %d of %d %ss, whose tokens and sampling.max_new_tokens (%d) do not fit %s",
            settings.source, fits.count(False), len(prompts), what, wanted, named.format(limit),
        )  # fmt: skip
        prompts = [prompt for prompt, is_fit in zip(prompts, fits, strict=True) if is_fit]
        ids = [row for row, is_fit in zip(ids, fits, strict=True) if is_fit]
    return prompts


def _no_room(
    longest: int, wanted: int, limit: float, limit_name: str, what: str, settings: RenderSettings
) -> str:
    room = limit - longest
    fix = f"use {room:g} or less, or lower" if room > 0 else "lower"
    skip = "" if settings.on_bad_row == "skip" else f", or set {settings.setting('on_bad_row', 'skip')}"
    return (
        f"sampling.max_new_tokens is {wanted}, and with the longest {what} ({longest} tokens) must fit {limit_name}; "
        f"{fix} {settings.setting('max_prompt_tokens')}{skip}"
    )


def check_prompt_ids(
    model: Any, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None, *, whose: str = "the model"
) -> None:
    """Raise if a prompt holds a token that the model has no embedding for.

    Raises:
        ConfigError: with the prompt's number and the token.
    """
    check_ids(((prompt.token_ids,) for prompt in prompts), {whose: num_embeddings(model)}, tokenizer, what="prompt")


def warn_of_truncation(sampling: SamplingSettings) -> None:
    """Say so where completions are not drawn from the distribution that is trained."""
    truncating = [
        name
        for name, off in TRUNCATES.items()
        if getattr(sampling, name) != off
    ]
    if truncating:
        logger.warning(
            "sampling.%s changes the distribution that rollouts are drawn from, and the loss is of the whole one: "
            "the gradient is biased and rollout_gap is large by construction; leave it out, unless that is meant",
            ", sampling.".join(truncating),
        )
