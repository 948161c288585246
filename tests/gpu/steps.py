"""What steps of the engine wait for on a pretended GPU, and whether completions are those of a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignlab.types import Rollout
from tests.gpu.pretended import PretendedGPU


class Steps:
    """Counts what each step of a generation waits for; told by the engine after each, as `on_step`."""

    def __init__(self, mode: PretendedGPU) -> None:
        self._mode = mode
        self._counted: list[tuple[int, int, str]] = []

    def __call__(self, tokens: int, done: int) -> None:
        self._counted.append((done, self._mode.num_waits, self._mode.report()))
        self._mode.reset()

    def check(self, num_waits: int = 1) -> None:
        """Assert that steps wait so often at most: all but the first, and those in which sequences end."""
        ends = [done for done, _, _ in self._counted]
        others = [
            (waits, report)
            for (done, waits, report), before in zip(self._counted[1:], ends, strict=False) if done == before
        ]
        assert len(others) > 1
        assert max(others)[0] <= num_waits, max(others)[1]


def assert_same(rollouts: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    """Assert that completions have equal tokens, log-probs and records."""
    for rollout, other_rollout in zip(rollouts, expected, strict=True):
        for completion, other in zip(rollout.completions, other_rollout.completions, strict=True):
            assert completion.token_ids == other.token_ids
            assert completion.logprobs == other.logprobs and completion.raw_logprobs == other.raw_logprobs
            for name in ("routing", "kv_record"):
                mine, theirs = getattr(completion, name), getattr(other, name)
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
