"""Checks of what a server answers. Each function raises a `FaultyAnswer` that says what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from alignlab.rollout.vllm.completions import Request, padded
from alignlab.rollout.vllm.protocol import is_weights_version
from alignlab.rollout.vllm.serialization import decode_routing, decode_vllms_routing

_ROUNDING = 1e-3  # the log-prob of a certain token may be computed as a little more than 0
_MAX_EXPERTS_PER_TOKEN = 1024
_NAME = re.compile(r"[0-9A-Za-z]+-\d+-\d+")


class FaultyAnswer(Exception):
    """A server's answer cannot be true."""


def checked_description(about: Any) -> dict[str, Any]:
    """Return a server's description of itself."""
    if not isinstance(about, dict):
        raise FaultyAnswer("its description of itself is not an object")
    for name, is_valid in _DESCRIPTION.items():
        if not is_valid(about.get(name, ...)):
            raise FaultyAnswer(f"its description of itself has no valid {name}")
    for name in ("context_tokens", "lora_rank"):  # `ServerRequirements` names them if they are missing
        if name in about and not (_is_count(about[name]) and about[name] < 2**62):
            raise FaultyAnswer(f"its description of itself has no valid {name}")
    return about


def checked_digests(answer: Any) -> dict[str, str]:
    """Return the digest of each tensor that a server received."""
    digests = answer.get("arrived") if isinstance(answer, dict) else None
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise FaultyAnswer("it does not tell the digests of the weights that arrived")
    return digests


def only_choice(answer: Any, name: str) -> dict[str, Any]:
    """Return the only completion in the answer to the request called `name`."""
    if not isinstance(answer, dict):
        raise FaultyAnswer("its answer is not an object")
    answered = str(answer.get("request_id", ""))  # the name, after a word of vLLM's own
    answered_name = _NAME.search(answered)
    if answered_name is not None and re.search(rf"(?<![0-9A-Za-z]){re.escape(name)}(?!\d)", answered) is None:
        raise FaultyAnswer(f"it answers another request ({answered_name[0]}) than it was asked ({name})")
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise FaultyAnswer(f"it gives {count} completions for a request of one")
    return choices[0]


def token_ids(choice: Mapping[str, Any], request: Request, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens of a completion: in the vocabulary, and no more than the request allows."""
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids:
        raise FaultyAnswer("it gives no tokens")
    for token in ids:
        if not _is_count(token) or token >= vocab_size:
            raise FaultyAnswer(f"it gives the token {token!r:.40}, which is none of the {vocab_size} of the vocabulary")
    max_tokens = request.params.get("max_tokens")
    if max_tokens is not None and len(ids) > max_tokens:
        raise FaultyAnswer(f"it gives {len(ids)} tokens, and at most {max_tokens} were asked for")
    return tuple(ids)


def logprobs(choice: Mapping[str, Any], num_tokens: int) -> tuple[float, ...]:
    """Return the log-prob of each token, finite and at most 0."""
    record = choice.get("logprobs")
    steps = record.get("content") if isinstance(record, dict) else None
    if not isinstance(steps, list) or len(steps) != num_tokens:
        count = len(steps) if isinstance(steps, list) else "no"
        raise FaultyAnswer(f"it gives {count} log-probabilities for {num_tokens} tokens")
    return tuple(_logprob(step) for step in steps)


def _logprob(step: Any) -> float:
    value: Any = step.get("logprob") if isinstance(step, dict) else None
    if not _is_number(value) or value > _ROUNDING:
        raise FaultyAnswer(f"it gives the log-probability {value!r:.40}, which is not a finite number of at most 0")
    return float(value)


def stop_text(choice: Mapping[str, Any], request: Request) -> str | None:
    """Return the stop string that ended a completion, one of the request's; None if none did."""
    reason = choice.get("stop_reason")
    if isinstance(reason, str):
        if "stop" in request.params and reason not in request.params["stop"]:
            raise FaultyAnswer(f"it stopped at {reason!r:.80}, which is no stop string of the request")
        return reason
    if reason is not None and not _is_count(reason):
        raise FaultyAnswer("its reason for stopping is neither a text nor a token")
    return None


def token_versions(choice: Mapping[str, Any], num_tokens: int) -> list[str]:
    """Return the version of the weights that sampled each token, from vLLM's spans of tokens."""
    versions: list[str] = []
    spans = choice.get("weight_versions") or ()
    if not isinstance(spans, Sequence) or len(spans) > num_tokens:
        raise FaultyAnswer("it does not tell the version of the weights")
    for span in spans:
        version, num_in_span = _span(span, start=len(versions), num_tokens=num_tokens)
        versions += [version] * num_in_span
    if len(versions) != num_tokens:
        raise FaultyAnswer(f"it tells the weights' version of {len(versions)} tokens of {num_tokens}")
    return versions


def _span(span: Any, *, start: int, num_tokens: int) -> tuple[str, int]:
    """Return (version, number of tokens) of a span that has to begin at `start`."""
    fields: list[Any] = [span.get(key) if isinstance(span, dict) else None for key in ("version", "start", "end")]
    version, first, end = fields
    follows = _is_count(first) and _is_count(end) and first == start < end <= num_tokens
    if not follows or not isinstance(version, str) or not is_weights_version(version):
        raise FaultyAnswer("it does not tell the version of each token's weights")
    return version, end - start


def routed_experts(text: Any, num_tokens: int, layers: list[int]) -> Tensor:
    """Return the experts of each token, [num_tokens, len(layers), K] int16, as vLLM's answer tells them.

    Args:
        text: experts in every layer of the model.
        layers: numbers of the layers with experts.
    """
    with _fault_of_the_record():
        record = decode_vllms_routing(text)[:, layers]
    return padded(_checked_record(record, layers), num_tokens)


def recorded_experts(content: bytes, num_tokens: int, layers: list[int]) -> Tensor:
    """Return the experts of each token, [num_tokens, len(layers), K] int16, -1 if unknown, as our recorder tells them.

    Args:
        content: result of `encode_routing`, of the layers with experts.
        layers: numbers of these layers.
    """
    with _fault_of_the_record():
        first, record = decode_routing(content)
    if first > num_tokens:
        raise FaultyAnswer(f"it tells no experts of the first {first} tokens, and there are {num_tokens}")
    return padded(_checked_record(record, layers), num_tokens, first=first)


@contextmanager
def _fault_of_the_record() -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError) as error:
        raise FaultyAnswer(f"it does not tell which experts it chose: {error}") from error


def _checked_record(record: Tensor, layers: list[int]) -> Tensor:
    if record.shape[1] != len(layers) or record.shape[2] > _MAX_EXPERTS_PER_TOKEN:
        raise FaultyAnswer(f"it tells experts of the shape {tuple(record.shape)} for {len(layers)} layers")
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -1e300 < value < 1e300 and math.isfinite(value)


def _is_version_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and is_weights_version(value))


_DESCRIPTION: dict[str, Callable[[Any], bool]] = {
    "version": _is_version_or_none,
    "digest": lambda value: isinstance(value, str),
    "idle_s": _is_number,
    "identity": lambda value: isinstance(value, dict),
    "records_routing": lambda value: isinstance(value, bool),
    "device": lambda value: isinstance(value, str),
    "model_runner": lambda value: value in (1, 2),
}
