"""A judge's model behind a server that speaks OpenAI's chat completions, such as vLLM's."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2

from alignlab.config.judge import EndpointJudge
from alignlab.errors import ConfigError
from alignlab.rlaif.chat_model import Conversation, Failure, FailureKind

_TOO_MANY, _SERVER_FAULT, _FAULT = 429, 500, 400
_OF_EVERYBODY = (401, 403, 404)  # no key, no right, no such model
_Answer = TypeVar("_Answer")


class EndpointChatModel:
    """Asks a server, many questions at a time; a request that may succeed later is sent again.

    Args:
        settings: the server, and how patiently it is asked.
        transport: of the connection; default: the network.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, settings: EndpointJudge, *, transport: httpx2.BaseTransport | None = None) -> None:
        self.identity = f"{settings.url} {settings.model} {settings.top_logprobs}"
        self.num_retries = 0
        self._settings = settings
        self._lock = threading.Lock()
        self._headers, self._transport = _authorization(settings), transport

    def choose(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> list[tuple[float, ...] | Failure]:
        """Log-probability of each choice as the first token. A choice that is not among the `top_logprobs` likeliest
        tokens gets the log-probability of the least of these, which is the most that it can have."""
        options = {
            "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": self._settings.top_logprobs,
        }  # fmt: skip
        return self._each(conversations, options, lambda choice: _choice_logprobs(choice, choices))

    def write(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | Failure]:
        """A sampled answer to each conversation."""
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        return self._each(conversations, options, _text)

    def _each(
        self, conversations: Sequence[Conversation], options: dict[str, Any],
        read: Callable[[Any], _Answer | Failure],
    ) -> list[_Answer | Failure]:
        def ask(conversation: Conversation) -> _Answer | Failure:
            answer = self._ask(http, {"model": self._settings.model, "messages": list(conversation), **options})
            return answer if isinstance(answer, Failure) else read(answer)

        patience = self._settings.request_timeout_s
        with (
            httpx2.Client(headers=self._headers, timeout=patience, transport=self._transport) as http,
            ThreadPoolExecutor(self._settings.max_concurrent) as pool,
        ):
            return list(pool.map(ask, conversations))

    def _ask(self, http: httpx2.Client, request: dict[str, Any]) -> dict[str, Any] | Failure:
        """The first choice of the server's answer."""
        answer: dict[str, Any] | Failure = Failure("unreachable", "")
        for attempt in range(self._settings.max_attempts):
            if attempt:
                with self._lock:
                    self.num_retries += 1
                time.sleep(self._settings.retry_wait_s * 2 ** (attempt - 1))
            answer = self._send(http, request)
            if not isinstance(answer, Failure) or answer.kind not in ("timeout", "unreachable"):
                break
        return answer

    def _send(self, http: httpx2.Client, request: dict[str, Any]) -> dict[str, Any] | Failure:
        address = f"{self._settings.url.rstrip('/')}/chat/completions"
        try:
            response = http.post(address, json=request)
        except httpx2.TimeoutException:
            return Failure("timeout", f"{address} did not answer within {self._settings.request_timeout_s:g} s")
        except httpx2.HTTPError as error:
            return Failure("unreachable", f"{address} cannot be reached: {error}")
        status = response.status_code
        if status == _TOO_MANY or status >= _SERVER_FAULT:
            return Failure("unreachable", f"{address} answers with status {status}: {response.text[:200]}")
        if status >= _FAULT:
            kind: FailureKind = "unusable" if status in _OF_EVERYBODY else "refused"
            return Failure(kind, f"{address} answers with status {status}: {response.text[:200]}")
        try:
            choice: dict[str, Any] = response.json()["choices"][0]
            return choice
        except (ValueError, LookupError, TypeError):
            return Failure("unusable", f"{address} answers with no completion: {response.text[:200]}")


def _authorization(settings: EndpointJudge) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(
            f"judge.api_key_env names the environment variable {settings.api_key_env}, and it is not set; set it, or "
            "remove api_key_env for a server without keys"
        )
    return {"Authorization": f"Bearer {key}"}


def _text(choice: Any) -> str | Failure:
    try:
        return str(choice["message"]["content"] or "")
    except (LookupError, TypeError):
        return Failure("refused", f"the server's answer has no message: {choice!r:.200}")


def _choice_logprobs(choice: Any, choices: Sequence[str]) -> tuple[float, ...] | Failure:
    try:
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
        told = [(str(one["token"]), float(one["logprob"])) for one in likeliest]
    except (LookupError, TypeError, ValueError):
        return Failure("unusable", "the server gives no log-probabilities (top_logprobs); use answers: sampled")
    listed = [(token, logprob) for token, logprob in told if math.isfinite(logprob)]
    found = [[logprob for token, logprob in listed if token.strip() == one] for one in choices]
    if not any(found):
        return Failure("nonsense", f"none of {', '.join(choices)} is among the likeliest tokens {listed[:3]}")
    least = min(logprob for _, logprob in listed)
    return tuple(_total(each) if each else least for each in found)


def _total(logprobs: Sequence[float]) -> float:
    """The log of the sum of probabilities."""
    top = max(logprobs)
    return top + math.log(sum(math.exp(logprob - top) for logprob in logprobs))
