"""Rollouts made by hand."""

from collections.abc import Callable

import pytest

from alignlab.types import Completion, Prompt, Rollout


@pytest.fixture
def make_rollout() -> Callable[..., Rollout]:
    def make(index: int = 0, texts: tuple[str, ...] = ("4", "five"), version: int = 3) -> Rollout:
        completions = tuple(
            Completion(
                token_ids=tuple(range(10, 11 + len(text))),
                text=text,
                logprobs=tuple(-0.5 * (i + 1) for i in range(1 + len(text))),
                raw_logprobs=tuple(-0.25 * (i + 1) for i in range(1 + len(text))),
                finish_reason="stop" if text == "4" else "length",
                policy_versions=(version,) * (1 + len(text)),
            )
            for text in texts
        )
        prompt = Prompt(
            token_ids=(1, 2, 3),
            text=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}],
            index=index,
            columns={"answer": "4"},
        )
        exact = tuple(1.0 if text == "4" else None for text in texts)
        length = tuple(float(len(text)) for text in texts)
        return Rollout(prompt, completions, rewards=length, reward_parts={"exact": exact, "length": length})

    return make
