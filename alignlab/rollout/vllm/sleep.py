"""vLLM's sleep between calls, which frees memory of the trainer's device, and its awakening in two stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

_WEIGHTS, _CACHE = "weights", "kv_cache"  # vLLM's names


class Sleep:
    """The sleep of a vLLM in this process.

    Args:
        llm: vLLM, awake.
        level: 1 moves weights to the host, 2 drops them; the KV cache is dropped by both.
        is_enabled: False makes `begin` do nothing.

    Attributes:
        lacks_weights: the weights were dropped, and none were loaded since.
    """

    def __init__(self, llm: LLM, *, level: int, is_enabled: bool) -> None:
        self.lacks_weights = False
        self._llm, self._level, self._is_enabled = llm, level, is_enabled
        self._asleep: set[str] = set()

    def begin(self) -> None:
        """Free vLLM's memory; a vLLM without its KV cache is left as it is."""
        if self._is_enabled and not self._asleep:
            self._llm.sleep(level=self._level)
            self._asleep = {_WEIGHTS, _CACHE}
            self.lacks_weights = self._level > 1

    def wake_weights(self) -> None:
        """Allocate the memory of the weights, which hold what they held unless they were dropped."""
        self._wake(_WEIGHTS)

    def wake_cache(self) -> None:
        """Allocate the KV cache; after `wake_weights`, vLLM can then generate."""
        self._wake(_CACHE)

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self._llm.wake_up([part])
            self._asleep.remove(part)
