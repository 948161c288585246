"""A judge's model behind a server that speaks OpenAI's chat completions, such as vLLM's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx2

from alignlab.config.judge import EndpointJudge
from alignlab.network.addresses import is_loopback, must_bypass_proxies
from alignlab.network.bounded_http import OK, PLAIN, Reply, TooLargeError, excerpt, exchange, retry_after
from alignlab.network.credentials import environment_key
from alignlab.rollout.background import LoopThread
from alignlab.rollout.task_groups import run_all
from alignlab.scoring.judges.chat_model import DOWN, Conversation, Failure
from alignlab.scoring.judges.endpoint_answers import choice_logprobs, completion_text, first_choice

logger = logging.getLogger(__name__)
MAX_ANSWER_BYTES = 4 * 2**20
MAX_WAIT_S = 120.0
_TOO_MANY, _SERVER_FAULT, _FAULT = 429, 500, 400
_AUTH_STATUSES = (401, 403, 404)
"""No key, no permission, no such model: every request would get the same answer."""
_Answer = TypeVar("_Answer")


class Outage:
    """State of a server that may be down: after `limit` consecutive failures in `DOWN`, no further question is sent."""

    def __init__(self, limit: int) -> None:
        self._limit, self._num_consecutive = limit, 0
        self._last = Failure("unreachable", "")

    def note(self, answer: object) -> None:
        """Count the outcome of a question."""
        if isinstance(answer, Failure) and answer.kind in DOWN:
            self._num_consecutive, self._last = self._num_consecutive + 1, answer
        else:
            self._num_consecutive = 0

    def failure(self) -> Failure | None:
        """Return the failure of a question that is not sent; None while questions are to be sent."""
        return self._last if self._num_consecutive >= self._limit else None


class EndpointChatModel:
    """Sends questions to a server, many at a time; a request that may succeed later is sent again.

    An attempt takes at most `request_timeout_s`, from connecting to the last byte, and an answer has at most
    `MAX_ANSWER_BYTES`. If a server has answered none of many questions, the others of the call are not sent. The wait
    before the next attempt is the longer of our own and the server's `Retry-After`, up to `MAX_WAIT_S`. Requests to
    this machine bypass proxies, so that no proxy sees the key.

    Args:
        settings: address, limits and retries.
        transport: transport of the HTTP client; default: the network.

    Raises:
        ConfigError: the environment variable of the key is not set, blank, or holds no key.
    """

    def __init__(self, settings: EndpointJudge, *, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.identity = f"{settings.url} {settings.model} {settings.top_logprobs}"
        self.num_retries, self._has_warned = 0, False
        self._settings, self._transport = settings, transport
        self._address = f"{settings.url.rstrip('/')}/chat/completions"
        variable = settings.api_key_env
        self._key = "" if variable is None else environment_key(variable, "judge.api_key_env").get_secret_value()
        address = urlsplit(settings.url)
        self._bypasses_proxies = must_bypass_proxies(address.hostname or "")
        if self._key and address.scheme == "http" and not is_loopback(address.hostname or ""):
            logger.warning(
                "the judge's key travels unencrypted to %s; use https, or a tunnel to this machine (ssh -L)",
                settings.url,
            )

    def choose(
        self, conversations: Sequence[Conversation], choices: Sequence[str]
    ) -> list[tuple[float, ...] | Failure]:
        """Return the log-probability of each choice as the first token; see `choice_logprobs`."""
        options = {
            "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": self._settings.top_logprobs,
        }  # fmt: skip
        return self._send_all(conversations, options, lambda choice: choice_logprobs(choice, choices))

    def write(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | Failure]:
        """Return a sampled answer to each conversation."""
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        return self._send_all(conversations, options, completion_text)

    def _send_all(
        self, conversations: Sequence[Conversation], options: dict[str, Any],
        read_choice: Callable[[Any], _Answer | Failure],
    ) -> list[_Answer | Failure]:
        """Send all questions and read their answers, in a new thread, since the caller's may run an event loop."""
        requests = [
            {"model": self._settings.model, "messages": list(conversation), **options} for conversation in conversations
        ]
        thread = LoopThread("alignlab-judge")
        try:
            choices: list[dict[str, Any] | Failure] = thread.submit(self._ask_all(requests)).result()
        finally:
            thread.close()
        return [choice if isinstance(choice, Failure) else read_choice(choice) for choice in choices]

    async def _ask_all(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any] | Failure]:
        slots, outage = anyio.Semaphore(self._settings.max_concurrent), Outage(2 * self._settings.max_concurrent)
        headers = PLAIN | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        async with httpx2.AsyncClient(
            headers=headers, timeout=None, transport=self._transport, trust_env=not self._bypasses_proxies
        ) as http:

            async def ask(request: dict[str, Any]) -> dict[str, Any] | Failure:
                async with slots:
                    answer = outage.failure() or await self._ask(http, request)
                    outage.note(answer)
                    return answer

            return await run_all(ask, requests)

    async def _ask(self, http: httpx2.AsyncClient, request: dict[str, Any]) -> dict[str, Any] | Failure:
        """Return the choice of the server's answer, after as many attempts as the settings allow."""
        answer: dict[str, Any] | Failure = Failure("unreachable", "")
        server_wait_s = 0.0
        for attempt in range(self._settings.max_attempts):
            if attempt:
                self.num_retries += 1
                await anyio.sleep(max(self._wait_s(attempt), server_wait_s))
            answer, server_wait_s = await self._send(http, request)
            if not isinstance(answer, Failure) or answer.kind not in ("timeout", "unreachable"):
                break
            if not self._has_warned and self._settings.max_attempts > 1:
                self._has_warned = True
                logger.warning("%s; a question is asked up to %d times", answer.message, self._settings.max_attempts)
        return answer

    def _wait_s(self, attempt: int) -> float:
        """Return the wait before an attempt, the second being number 1: doubled each time, up to `MAX_WAIT_S`."""
        first = self._settings.retry_wait_s
        return max(first, min(first * 2.0 ** min(attempt - 1, 30), MAX_WAIT_S))

    async def _send(
        self, http: httpx2.AsyncClient, request: dict[str, Any]
    ) -> tuple[dict[str, Any] | Failure, float]:
        """Return the choice or the failure, and the seconds to wait that the server asks for."""
        patience = self._settings.request_timeout_s
        body = json.dumps(request).encode()  # ASCII, so that a lone surrogate is no error here
        try:
            reply = await exchange(
                http, "POST", self._address, deadline_s=patience, max_bytes=MAX_ANSWER_BYTES,
                content=body, headers={"Content-Type": "application/json"},
            )  # fmt: skip
        except (TimeoutError, httpx2.TimeoutException):
            message = f"waited for {self._address}, and it did not answer whole within {patience:g} s"
            return Failure("timeout", f"{message} (judge.request_timeout_s)"), 0.0
        except TooLargeError as error:
            return Failure("unusable", f"{self._address} cannot be used: {error}"), 0.0
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            why = excerpt(str(error).encode(errors="replace"), self._key)
            return Failure("unreachable", f"{self._address} cannot be reached: {why}"), 0.0
        return self._read(reply), retry_after(reply.headers, longest_s=MAX_WAIT_S)

    def _read(self, reply: Reply) -> dict[str, Any] | Failure:
        """Return the choice of a reply; a Failure for a status other than 200, or a reply that is no completion."""
        status, text = reply.status, reply.excerpt(self._key)
        if status == _TOO_MANY or status >= _SERVER_FAULT:
            return Failure("unreachable", f"{self._address} answers with status {status}: {text}")
        if status >= _FAULT and status not in _AUTH_STATUSES:
            return Failure("refused", f"{self._address} answers with status {status}: {text}")
        if status != OK:
            return Failure("unusable", f"{self._address} answers with status {status}: {text}")
        try:
            return first_choice(reply.json())
        except ValueError as error:
            return Failure("unusable", f"{self._address} answers with no completion ({error}): {text}")
