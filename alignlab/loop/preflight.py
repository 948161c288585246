"""Checks before a training: prompts that fit the model and the engine, sampling settings; and their report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.rollout import EngineSettings, RolloutSettings, SamplingSettings
from alignlab.data.dataset import keep
from alignlab.data.vocabulary import check_ids
from alignlab.errors import ConfigError
from alignlab.models.decoder import num_embeddings, num_positions
from alignlab.scoring.loading import LoadedReward
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
TRUNCATES = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "min_new_tokens": 0,
}  # fmt: skip
"""Sampling settings that truncate or change the policy's distribution, with the values that leave it unchanged."""


@dataclass(frozen=True)
class Preflight:
    """What a trainer has read and would begin with, once all its checks have passed; `alignlab check` shows it.

    Attributes:
        train, held_out: prompts, or the examples that are learnt from and measured on; empty without held-out data.
        scorer: decides which answers to held-out prompts are right; None where nothing does.
        beside: description of each model beside the policy, by its part, such as "teacher".
        memory: predicted bytes on the device of each rank, by part; empty where they are not known.
        engine: name of the engine that samples; empty where nothing samples.
        weight_decay: description of what decays, of each model in training.
    """

    train: Sequence[Any]
    held_out: Sequence[Any] = ()
    scorer: LoadedReward | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    engine: str = ""
    weight_decay: Sequence[str] = ()


class Samples(Protocol):
    """Settings of a trainer, or of a stage, that samples completions."""

    @property
    def sampling(self) -> SamplingSettings:
        """Settings of sampling."""
        ...

    @property
    def rollout(self) -> EngineSettings:
        """Settings of the engine."""
        ...


class SampledBy(NamedTuple):
    """Settings of sampling outside of a trainer."""

    sampling: SamplingSettings
    rollout: EngineSettings


class _Limit(NamedTuple):
    """Limit on the tokens of a prompt with its completion, and its name for messages."""

    tokens: float
    name: str


def with_room(
    prompts: Sequence[Prompt], model: Any, config: Samples, settings: RenderSettings, *,
    whose: str = "the model", tokenizer: PreTrainedTokenizerBase | None = None, what: str = "prompt",
    read_as: Sequence[Sequence[int]] | None = None,
) -> Sequence[Prompt]:
    """Return the prompts that fit, with a completion behind them, the positions of a model and the engine's limit.

    Args:
        settings: settings that rendered the prompts; `on_bad_row: skip` leaves out and counts those that do not fit.
        whose: the model, for messages.
        tokenizer: names a token that the model has no embedding for.
        what: the prompts, for messages.
        read_as: token ids of each prompt as the model reads it; default: the prompt's own.

    Raises:
        ConfigError: with the value that fits; a prompt does not fit and is not to be left out, or none fits.
    """
    ids = [prompt.token_ids for prompt in prompts] if read_as is None else read_as
    check_ids(((row,) for row in ids), {whose: num_embeddings(model)}, tokenizer, what=what)
    lengths: Mapping[int, int] = {number: len(row) for number, row in enumerate(ids)}
    for limit in _limits(model, config, whose):
        lengths = _within(limit, lengths, config.sampling.max_new_tokens, settings, what)
    has_room = [number in lengths for number in range(len(prompts))]
    return prompts if all(has_room) else keep(prompts, has_room, "no_room")


def _within(
    limit: _Limit, lengths: Mapping[int, int], max_new_tokens: int, settings: RenderSettings, what: str
) -> Mapping[int, int]:
    """Return the lengths, by the number of their prompt, that fit a limit with a completion; log how many do not.

    Raises:
        ConfigError: one does not fit and is not to be left out, or none fits.
    """
    fitting = {number: length for number, length in lengths.items() if length + max_new_tokens <= limit.tokens}
    num_skipped = len(lengths) - len(fitting)
    if num_skipped and (settings.on_bad_row == "error" or not fitting):
        raise ConfigError(_no_room(max(lengths.values()), max_new_tokens, limit, what, settings))
    if num_skipped:
        logger.warning(
            "%s: skipped %d of %d %ss, whose tokens and sampling.max_new_tokens (%d) do not fit %s",
            settings.source, num_skipped, len(lengths), what, max_new_tokens, limit.name,
        )  # fmt: skip
    return fitting


def _limits(model: Any, config: Samples, whose: str) -> list[_Limit]:
    """Return the limits of the model and of the engine, those that exist."""
    engine_limit = "cache_tokens" if isinstance(config.rollout, RolloutSettings) else "context_tokens"
    positions, engine_tokens = num_positions(model), getattr(config.rollout, engine_limit, None)
    limits = [] if positions is None else [_Limit(positions, f"{whose}'s {positions:g} positions")]
    if engine_tokens is not None:
        limits.append(_Limit(engine_tokens, f"rollout.{engine_limit} ({engine_tokens})"))
    return limits


def _no_room(longest: int, max_new_tokens: int, limit: _Limit, what: str, settings: RenderSettings) -> str:
    room = limit.tokens - longest
    fix = f"use {room:g} or less, or lower" if room > 0 else "lower"
    skip = "" if settings.on_bad_row == "skip" else f", or set {settings.setting('on_bad_row', 'skip')}"
    return (
        f"sampling.max_new_tokens is {max_new_tokens}, and with the longest {what} ({longest} tokens) must fit "
        f"{limit.name}; {fix} {settings.setting('max_prompt_tokens')}{skip}"
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
    """Warn of sampling settings under which completions are not drawn from the policy's distribution."""
    truncating = [name for name, neutral in TRUNCATES.items() if getattr(sampling, name) != neutral]
    if truncating:
        logger.warning(
            "sampling.%s changes the distribution that rollouts are drawn from, and the loss is of the full one: "
            "the gradient is biased and rollout_gap is large by construction; leave it out, unless that is meant",
            ", sampling.".join(truncating),
        )
