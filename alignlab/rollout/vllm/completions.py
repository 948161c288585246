"""Requests for one completion, and vLLM's answers; the same in this process and over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.rollout import MAX_VLLM_TEMPERATURE
from alignlab.errors import RolloutError
from alignlab.rollout.detokenizer import decode, special_ids
from alignlab.rollout.grammars import grammar_of
from alignlab.rollout.requests import completion_keys, end_token_ids
from alignlab.types import Completion, FinishReason, Prompt, SamplingParams

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "aborted"}
_SEED_BITS = 2**63 - 1
_MAX_BIAS = 100.0  # vLLM clamps to it without a word
_MAX_PENALTY = 2.0
# Parameters under which vLLM's log-probs are not the model's own, with the values that leave them so.
_SHAPING: dict[str, Any] = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logit_bias": (), "banned_words": (), "regex": None, "json_schema": None,
    "min_new_tokens": 0,
}  # fmt: skip
# Parameters that vLLM does not have, with the values that are off.
_UNKNOWN: dict[str, Any] = {"typical_p": 1.0, "banned_token_ids": (), "forced_tokens": ()}


@dataclass(frozen=True)
class Request:
    """A request for one completion.

    Attributes:
        token_ids: tokens of the prompt.
        params: arguments of vLLM's SamplingParams, by name, as JSON has them.
    """

    token_ids: tuple[int, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One completion as vLLM returned it.

    Attributes:
        token_ids: sampled tokens, the end token included.
        logprobs: log-prob of each token under the distribution sampled from; at temperature 0, under the model's own.
        finish_reason: one of vLLM's: stop, length, abort.
        stop_text: stop string that ended the completion; None if none did.
        policy_versions: version of the weights that sampled each token.
        routing: experts of each token, see `Completion`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    stop_text: str | None
    policy_versions: tuple[int, ...]
    routing: Tensor | None


def padded(record: Tensor, num_tokens: int, *, first: int = 0) -> Tensor:
    """Return a record [tokens, L, K] as int16, cut or padded with -1 to `num_tokens`.

    Args:
        first: number of tokens before those of the record.
    """
    result = torch.full((num_tokens, *record.shape[1:]), -1, dtype=torch.int16)
    result[first : first + len(record)] = record[: num_tokens - first].to(torch.int16)
    return result


def make_requests(
    prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Request]:
    """Return one request for each completion of each prompt, in order.

    vLLM takes a seed only with n = 1; requests with the same prompt share its cache anyway.

    Raises:
        RolloutError: vLLM does not know a parameter, or takes no such value of it; or nothing matches a grammar.
    """
    # Stop strings may contain tags that are special tokens, so these belong to the text.
    text_params = {"skip_special_tokens": not special_ids(tokenizer).tags}
    requests = []
    for prompt, params, keys in zip(prompts, sampling, completion_keys(prompts, sampling), strict=True):
        ends = sorted(end_token_ids(lm, tokenizer, params))
        grammar_of(params, tokenizer, lm.config.get_text_config().vocab_size, ends)  # refuses what nothing can match
        requests += [Request(prompt.token_ids, _vllm_params(params, key, ends) | text_params) for key in keys]
    return requests


def make_completion(
    answer: Answer, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams, lm: PreTrainedModel
) -> Completion:
    """Return the answer as a completion, with its text.

    Raises:
        RolloutError: vLLM gave up on the request.
    """
    if answer.finish_reason not in _FINISH:
        raise RolloutError(
            f"vLLM ended a completion with {answer.finish_reason!r} after {len(answer.token_ids)} tokens, and must "
            "complete it; see vLLM's log, and for a regex or json_schema that it cannot compile use rollout.engine: "
            "embedded"
        )
    text = decode(tokenizer, answer.token_ids, end_token_ids(lm, tokenizer, SamplingParams()))
    if answer.stop_text is not None and answer.stop_text in text:  # a stop string with an end token is not in the text
        text = text[: text.rfind(answer.stop_text)]
    greedy = sampling.temperature == 0
    return Completion(
        token_ids=answer.token_ids,
        text=text,
        logprobs=(0.0,) * len(answer.token_ids) if greedy else answer.logprobs,
        raw_logprobs=answer.logprobs if _is_plain(sampling) else None,
        finish_reason=_FINISH[answer.finish_reason],
        policy_versions=answer.policy_versions,
        routing=answer.routing,
    )


def _is_plain(sampling: SamplingParams) -> bool:
    """Return True if vLLM's log-probs are the model's own; at temperature 0 it reports those too."""
    return sampling.temperature in (0, 1) and all(getattr(sampling, name) == off for name, off in _SHAPING.items())


def _vllm_params(sampling: SamplingParams, key: int, ends: list[int]) -> dict[str, Any]:
    _check(sampling)
    return {
        "n": 1,
        "seed": key & _SEED_BITS,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": ends,
        "ignore_eos": True,  # all end tokens are named
        "logprobs": 0,
        "detokenize": bool(sampling.stop),
    } | _controls(sampling)


def _controls(sampling: SamplingParams) -> dict[str, Any]:
    """Return the decoding controls that are on."""
    grammar = {"regex": sampling.regex, "json": sampling.json_schema}
    named = {
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias),
        "bad_words": list(sampling.banned_words),
        "structured_outputs": {name: text for name, text in grammar.items() if text is not None},
    }
    return {name: value for name, value in named.items() if value}


def _check(sampling: SamplingParams) -> None:
    """Raise if vLLM does not know a parameter, or not this value of it.

    Raises:
        RolloutError: with the parameter's name.
    """
    if sampling.temperature > MAX_VLLM_TEMPERATURE:
        raise RolloutError(
            f"sampling.temperature is {sampling.temperature}, and vLLM takes at most {MAX_VLLM_TEMPERATURE:g}; lower "
            "it, or use rollout.engine: embedded"
        )
    largest = max((abs(bias) for _, bias in sampling.logit_bias), default=0.0)
    limits = {
        "logit_bias": (largest, _MAX_BIAS), "presence_penalty": (abs(sampling.presence_penalty), _MAX_PENALTY),
        "frequency_penalty": (abs(sampling.frequency_penalty), _MAX_PENALTY),
    }  # fmt: skip
    for name, (size, limit) in limits.items():
        if size > limit:
            raise RolloutError(
                f"sampling.{name} holds {size:g} (without its sign), and vLLM takes at most {limit:g}; lower it, or "
                "use rollout.engine: embedded"
            )
    for name, off in _UNKNOWN.items():
        if getattr(sampling, name) != off:
            raise RolloutError(
                f"sampling.{name} is {getattr(sampling, name)!r}, and must be {off!r} with vLLM, which does not know "
                "it; remove it, or use rollout.engine: embedded"
            )
