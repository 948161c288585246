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
from alignlab.rollout.requests import completion_keys, end_token_ids
from alignlab.types import Completion, FinishReason, Prompt, SamplingParams

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "aborted"}
_SEED_BITS = 2**63 - 1


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
        RolloutError: a temperature is higher than vLLM takes.
    """
    # Stop strings may contain tags that are special tokens, so these belong to the text.
    text_params = {"skip_special_tokens": not special_ids(tokenizer).tags}
    requests = []
    for prompt, params, keys in zip(prompts, sampling, completion_keys(prompts, sampling), strict=True):
        ends = sorted(end_token_ids(lm, tokenizer, params))
        requests += [Request(prompt.token_ids, _vllm_params(params, key, ends) | text_params) for key in keys]
    return requests


def make_completion(
    answer: Answer, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams, lm: PreTrainedModel
) -> Completion:
    """Return the answer as a completion, with its text."""
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
    shaping = (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    return sampling.temperature in (0, 1) and shaping == (0, 1.0, 0.0, 1.0) and sampling.min_new_tokens == 0


def _vllm_params(sampling: SamplingParams, key: int, ends: list[int]) -> dict[str, Any]:
    if sampling.temperature > MAX_VLLM_TEMPERATURE:
        raise RolloutError(
            f"sampling.temperature is {sampling.temperature}, and vLLM takes at most {MAX_VLLM_TEMPERATURE:g}; lower "
            "it, or use rollout.engine: embedded"
        )
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
    }
