"""What a server tells, checked before it is believed. Each function raises a `FaultyAnswer` that says what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alignlab.rollout.vllm.completions import Request, padded
from alignlab.rollout.vllm.server.wire import decode_routing

_ROUNDING = 1e-3  # the log-probability of a certain token may be computed as a little more than 0
_MAX_EXPERTS_PER_TOKEN = 1024
_NAME = re.compile(r"[0-9A-Za-z]+-\d+-\d+")
_VERSION = re.compile(r"[0-9A-Za-z]{1,64}-\d{1,18}-\d{1,18}")
_ABOUT: dict[str, type | tuple[type, ...]] = {
    "version": (str, type(None)), "digest": str, "idle_s": (int, float), "identity": dict, "records_routing": bool,
}  # fmt: skip


class FaultyAnswer(Exception):
    """A server tells something that cannot be so."""


def checked_about(about: Any) -> dict[str, Any]:
    """Return what a server tells of itself."""
    if not isinstance(about, dict):
        raise FaultyAnswer("what it tells of itself is no object")
    for name, kinds in _ABOUT.items():
        value = about.get(name, ...)
        if not isinstance(value, kinds) or (kinds == (int, float) and not _is_number(value)):
            raise FaultyAnswer(f"what it tells of itself has no {name} that it could have")
    for name in ("context_tokens", "lora_rank"):  # which only some callers look at
        if name in about and not (_is_count(about[name]) and about[name] < 2**62):
            raise FaultyAnswer(f"what it tells of itself has no {name} that it could have")
    if about["version"] is not None and not _VERSION.fullmatch(about["version"]):
        raise FaultyAnswer("its weights have no version that a run gives")
    return about


def checked_digests(answer: Any) -> dict[str, str]:
    """Return the digest of each tensor that arrived."""
    digests = answer.get("arrived") if isinstance(answer, dict) else None
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise FaultyAnswer("it does not tell what arrived of the weights")
    return digests


def only_choice(answer: Any, name: str) -> dict[str, Any]:
    """Return the completion in the answer to the request called `name`, which is for one."""
    if not isinstance(answer, dict):
        raise FaultyAnswer("its answer is no object")
    named = _NAME.search(str(answer.get("request_id", "")))
    if named is not None and named[0] != name:
        raise FaultyAnswer(f"it answers another request ({named[0]}) than it was asked ({name})")
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise FaultyAnswer(f"it gives {count} completions for a request of one")
    return choices[0]


def token_ids(choice: Mapping[str, Any], request: Request, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens of a completion: of the vocabulary, and not more than were asked for."""
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids:
        raise FaultyAnswer("it gives no tokens")
    for token in ids:
        if not _is_count(token) or token >= vocab_size:
            raise FaultyAnswer(f"it gives the token {token!r:.40}, which is none of the {vocab_size} of the vocabulary")
    longest = request.params.get("max_tokens")
    if longest is not None and len(ids) > longest:
        raise FaultyAnswer(f"it gives {len(ids)} tokens, and at most {longest} were asked for")
    return tuple(ids)


def logprobs(choice: Mapping[str, Any], num_tokens: int) -> tuple[float, ...]:
    """Return the log-probability of each token, finite and at most 0."""
    recorded = choice.get("logprobs")
    steps = recorded.get("content") if isinstance(recorded, dict) else None
    if not isinstance(steps, list) or len(steps) != num_tokens:
        count = len(steps) if isinstance(steps, list) else "no"
        raise FaultyAnswer(f"it gives {count} log-probabilities for {num_tokens} tokens")
    values: list[Any] = [step.get("logprob") if isinstance(step, dict) else None for step in steps]
    for value in values:
        if not _is_number(value) or value > _ROUNDING:
            raise FaultyAnswer(f"it gives the log-probability {value!r:.40}, and none is so")
    return tuple(float(value) for value in values)


def stop_text(choice: Mapping[str, Any], request: Request) -> str | None:
    """Return the stop string that ended a completion, which is one of those asked for; None where none did."""
    why = choice.get("stop_reason")
    if isinstance(why, str):
        if "stop" in request.params and why not in request.params["stop"]:
            raise FaultyAnswer(f"it stopped at {why!r:.80}, which is no stop string of the request")
        return why
    if why is not None and not _is_count(why):
        raise FaultyAnswer("its reason for stopping is neither a text nor a token")
    return None


def token_versions(choice: Mapping[str, Any], num_tokens: int) -> list[str]:
    """Return the version of each token's weights, from vLLM's spans of tokens, which leave no token out."""
    versions: list[str] = []
    spans = choice.get("weight_versions") or ()
    if not isinstance(spans, Sequence) or len(spans) > num_tokens:
        raise FaultyAnswer("it does not tell the version of the weights")
    version: Any
    start: Any
    end: Any
    for span in spans:
        version, start, end = (span.get(key) if isinstance(span, dict) else None for key in ("version", "start", "end"))
        follows = _is_count(start) and _is_count(end) and start == len(versions) and start < end <= num_tokens
        if not follows or not isinstance(version, str) or not _VERSION.fullmatch(version):
            raise FaultyAnswer("it does not tell the version of each token's weights")
        versions += [version] * (end - start)
    if len(versions) != num_tokens:
        raise FaultyAnswer(f"it tells the weights' version of {len(versions)} tokens of {num_tokens}")
    return versions


def expert_choices(text: Any, num_tokens: int, *, layers: list[int], of_all_layers: bool) -> Tensor:
    """Return the experts of each token, [num_tokens, len(layers), K] int16, -1 where none are told.

    Args:
        text: of `encode_routing`.
        of_all_layers: whether it holds every layer of the model, or those of `layers` alone.
    """
    try:
        record = decode_routing(text)
        record = record[:, layers] if of_all_layers else record
    except (ValueError, LookupError) as error:
        raise FaultyAnswer(f"it does not tell which experts it chose: {error}") from error
    if record.shape[1] != len(layers) or record.shape[2] > _MAX_EXPERTS_PER_TOKEN:
        raise FaultyAnswer(f"it tells experts of the shape {tuple(record.shape)} for {len(layers)} layers")
    return padded(record, num_tokens)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -1e300 < value < 1e300 and math.isfinite(value)
