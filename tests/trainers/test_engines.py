"""Every online trainer of `tests.trainers.tiny.CASES` with every engine; a part of the conformance suite.

It has a file of its own, so that it may run beside the rest: vLLM takes seconds to start. One server of vLLM is started
for all trainers; vLLM in this process is started for each. Both get adapters merged into all weights, as a CPU needs;
adapters sent alone are tested in `tests/rollout/vllm/test_sync.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.rollout import RolloutSettings, VLLMSettings
from alignlab.loop.prefetch import RolloutBatch
from alignlab.models.hub.checkpoints import new_model
from alignlab.types import Rollout
from tests.rollout.conftest import full_logprobs
from tests.rollout.vllm.conftest import DENSE, INSTALLED, SMALL, serve
from tests.trainers.tiny import ONLINE, make_case

__all__ = ["serve"]  # a fixture, used by name
WITH_VLLM = [
    pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason="needs vLLM"),
]


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a random model of sizes that vLLM's kernels take on a CPU."""
    torch.manual_seed(0)
    return new_model(
        DENSE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )


@pytest.fixture(
    scope="module",
    params=["embedded", *(pytest.param(engine, marks=WITH_VLLM) for engine in ("vllm", "vllm_server"))],
)
def rollout(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """Settings of an engine."""
    if request.param == "embedded":
        yield RolloutSettings()
    elif request.param == "vllm":
        yield VLLMSettings(**{name: value for name, value in SMALL.items() if name in VLLMSettings.model_fields})
    else:
        with pytest.MonkeyPatch.context() as environment:
            # The token that is made by default lies in the cache folder, and each test has a cache of its own.
            environment.setenv("ALIGNLAB_SERVER_TOKEN", "a-token-of-the-tests")
            settings, _ = request.getfixturevalue("serve")(make_model(tokenizer))
            yield settings


def largest_gap(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> float:
    """Return the largest difference of an engine's log-probs to those of plain forward passes, nats."""
    gaps = []
    for rollout in rollouts:
        start = len(rollout.prompt.token_ids)
        for completion in rollout.completions:
            rows = full_logprobs(model, (*rollout.prompt.token_ids, *completion.token_ids))[start - 1 : -1]
            expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            gaps.append(float((torch.tensor(completion.logprobs) - expected).abs().max()))
    return max(gaps)


@pytest.mark.parametrize("name", ONLINE)
def test_every_step_is_sampled_from_the_weights_in_training(
    name: str, rollout: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    model = make_model(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, when it is imported and started
        trainer = make_case(name, tmp_path / "run", model, tokenizer, rollout=rollout)
    take, gaps, versions = trainer.source.take, [], []

    def take_and_compare(step: int) -> RolloutBatch:
        batch = take(step)
        with trainer.learner.module.in_use():
            gaps.append(largest_gap(model, batch.rollouts))
        versions.append({v for r in batch.rollouts for c in r.completions for v in c.policy_versions})
        return batch

    trainer.source.take = take_and_compare
    assert trainer.train().num_steps == 3
    assert versions == [{0}, {1}, {2}]
    assert max(gaps) < 2e-5, gaps
