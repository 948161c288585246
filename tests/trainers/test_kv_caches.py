"""Trainers replay what the engine's cache approximates."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.loop.reference import frozen_copy
from alignlab.trainers.grpo import GRPOTrainer
from tests.trainers.conftest import even_ids
from tests.trainers.tiny import ONLINE, make_case

Make = Callable[..., Any]
CACHES: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "int4": {"type": "int4", "group": 4}, "window": {"type": "window", "tokens": 8},
    "evict": {"type": "evict", "heavy": 3, "recent": 2, "sinks": 1, "interval": 2, "observed": 2},
    "top_k": {"type": "top_k", "tokens": 3, "recent": 1}, "threshold": {"type": "threshold", "mass": 0.5, "recent": 1},
    "low_rank": {"type": "low_rank", "rank": 3},
}


def sharp(model: Any) -> Any:
    """Return the model with a head whose logits show what a cache does to the states."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("name", ONLINE)
def test_every_trainer_that_samples_scores_as_its_engine_does(
    name: str, tmp_path: Path, make_model: Make, tokenizer: Any
) -> None:
    trainer = make_case(
        name, tmp_path / "run", sharp(make_model()).double(), tokenizer, rollout={"kv_cache": {"type": "int8"}},
        sampling={"max_new_tokens": 12},
    )
    rollouts = trainer.source.sample(trainer.source.prompts[:4], 0)
    for pack, logprobs in zip(
        packs := trainer.algorithm.pack(rollouts), trainer.learner.logprobs(packs), strict=True
    ):
        assert (logprobs - pack.rollout_logprobs).abs().max() < 2e-6
    trainer.learner.module.kv_approximation = None
    exact = trainer.learner.logprobs(packs)
    assert max((x - pack.rollout_logprobs).abs().max() for x, pack in zip(exact, packs, strict=True)) > 1e-4


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("cache", CACHES)
def test_replay_closes_the_gap(
    cache: str, lora: Any, make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    gaps = []
    for replay in (True, False):
        config = make_config(
            sampling={"max_new_tokens": 20},
            rollout={"kv_cache": CACHES[cache] | {"replay": replay}},
        )
        trainer = GRPOTrainer(sharp(make_model()), even_ids, config, rows, tokenizer=tokenizer, peft_config=lora)
        trainer.train_step(1)
        gaps.append(trainer.train_step(2)["rollout_gap"])
    assert gaps[0] < 1e-5 and gaps[1] > 1e-3


def test_the_reference_sees_the_same_cache(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """So that the KL is 0 where the policy has not moved."""
    config = make_config(rollout={"kv_cache": {"type": "int8"}}, num_steps=1, kl={"coef": 0.1, "placement": "reward"})
    trainer = GRPOTrainer(sharp(make_model()), even_ids, config, rows, tokenizer=tokenizer)
    copied = frozen_copy(trainer.learner.module)
    assert copied is not None and copied.kv_approximation is trainer.learner.module.kv_approximation is not None
    assert trainer.train().metrics["kl"] == pytest.approx(0, abs=1e-7)


def test_a_run_goes_on_with_another_cache(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """With bases of its own, of the new rank: settings of a cache may change, and the log says so."""
    first, *others = [
        GRPOTrainer(
            sharp(make_model()), even_ids, make_config(rollout={"kv_cache": cache}), rows, tokenizer=tokenizer
        ) for cache in ({"type": "int8"}, {"type": "low_rank", "rank": 3}, {"type": "low_rank", "rank": 2})
    ]  # fmt: skip
    first.train_step(1)
    for trainer, rank in zip(others, (3, 2), strict=True):
        trainer.load_state(first.state())
        assert trainer._kv_bases.ranks == {"key": rank, "value": rank}
        assert trainer.train_step(2)["rollout_gap"] < 1e-5
        first = trainer


def test_a_resumed_run_has_the_bases_that_it_began_with(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any, tmp_path: Path
) -> None:
    """Also where they would be measured otherwise now."""

    def stop_after_one_step(trainer: Any, step: int, metrics: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def make(folder: str, **options: Any) -> GRPOTrainer:
        config = make_config(
            output_dir=tmp_path / folder, num_steps=2, rollout={"kv_cache": {"type": "low_rank", "rank": 3}}
        )
        return GRPOTrainer(sharp(make_model()), even_ids, config, rows, tokenizer=tokenizer, **options)

    whole = make("whole")
    whole.train()
    make("stopped", callbacks=(stop_after_one_step,)).train()
    resumed = make("stopped")
    measured = resumed.state()["kv_bases"]
    assert measured == whole.state()["kv_bases"]
    basis = resumed._kv_bases.basis(1, "key", torch.device("cpu"))
    basis.neg_()  # as good a basis, of other bits
    resumed.train(resume=True)
    assert not torch.equal(resumed._kv_bases.basis(1, "key", torch.device("cpu")), basis)
    assert resumed.state()["kv_bases"] == measured
    for (name, one), other in zip(resumed.learner.trained.items(), whole.learner.trained.values(), strict=True):
        assert torch.equal(one, other), name
