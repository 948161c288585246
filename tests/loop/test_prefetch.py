"""Prefetched rollouts: in order, within the allowed staleness, none lost, with errors raised at their step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
import pytest

from alignlab.config.trainers import GRPOConfig
from alignlab.errors import RolloutError
from alignlab.loop.prefetch import RolloutBatch, RolloutPrefetcher, check_age
from alignlab.runs.rollout_store import read_rollouts
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import Completion, Prompt, Rollout
from tests.rollout.conftest import tokenizer
from tests.rollout.vllm.conftest import DENSE, INSTALLED, make_client, make_model, serve

__all__ = ["make_client", "serve", "tokenizer"]  # fixtures, used by name
NEEDS_VLLM = pytest.mark.skipif(not INSTALLED, reason="needs vLLM")


def batch(step: int) -> RolloutBatch:
    return RolloutBatch([], [], 0.0, {"step": step})


class Collector:
    """Notes the steps that it begins, and waits in each until the test releases it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.entered: dict[int, threading.Event] = {step: threading.Event() for step in range(1, 9)}
        self.released: dict[int, threading.Event] = {step: threading.Event() for step in range(1, 9)}

    def __call__(self, step: int) -> RolloutBatch:
        self.begun.append(step)
        self.entered[step].set()
        assert self.released[step].wait(10)
        return batch(step)


def make_prefetcher(
    collect: Callable[[int], RolloutBatch], max_staleness: int, last_step: int = 8
) -> RolloutPrefetcher:
    return RolloutPrefetcher(collect, abandon=lambda: None, max_staleness=max_staleness, last_step=last_step)


def test_staleness_0_collects_in_the_callers_thread() -> None:
    threads = []

    def collect(step: int) -> RolloutBatch:
        threads.append(threading.current_thread())
        return batch(step)

    prefetcher = make_prefetcher(collect, 0)
    assert [prefetcher.take(step).position["step"] for step in (1, 2)] == [1, 2]
    assert threads == [threading.current_thread()] * 2


@pytest.mark.parametrize("staleness", [1, 2])
def test_number_of_steps_begun_ahead_equals_the_staleness(staleness: int) -> None:
    collector = Collector()
    prefetcher = make_prefetcher(collector, staleness, last_step=5)
    for step in range(1, 6):
        for earlier in range(1, step + staleness):
            collector.released[min(earlier, 8)].set()
        assert prefetcher.take(step).position == {"step": step}
        last = min(step + staleness, 5)
        assert collector.entered[last].wait(10)  # begun, while this step trains
        assert collector.begun == list(range(1, last + 1))
    collector.released[5].set()
    prefetcher.close()
    assert collector.begun == [1, 2, 3, 4, 5]


def test_failure_of_a_collection_is_raised_when_its_step_is_taken() -> None:
    def collect(step: int) -> RolloutBatch:
        if step == 2:
            raise RolloutError("lost")
        return batch(step)

    prefetcher = make_prefetcher(collect, 1)
    assert prefetcher.take(1).position == {"step": 1}
    with pytest.raises(RolloutError, match="lost"):
        prefetcher.take(2)
    prefetcher.close()


def test_close_stops_the_running_collection_and_begins_no_other() -> None:
    stop, begun = threading.Event(), []

    def collect(step: int) -> RolloutBatch:
        begun.append(step)
        if step > 1:
            assert stop.wait(10)
        return batch(step)

    prefetcher = RolloutPrefetcher(collect, abandon=stop.set, max_staleness=3, last_step=8)
    prefetcher.take(1)
    prefetcher.close()
    assert begun in ([1], [1, 2])


def test_tokens_beyond_the_staleness_limit_are_refused() -> None:
    completion = Completion((1, 2), "ab", (0.0, 0.0), None, "stop", (3, 4))
    rollouts = [Rollout(Prompt((5,), "x"), (completion,))]
    check_age(rollouts, 5, 2)
    with pytest.raises(RolloutError, match=r"from version 3 of the policy, which is at version 6, .* at most 2 behind"):
        check_age(rollouts, 6, 2)


def even(*, prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


@pytest.mark.vllm
@NEEDS_VLLM
def test_prefetching_run_takes_every_prompt_once_and_resumes_at_its_position(
    serve: Any, tokenizer: Any, tmp_path: Any
) -> None:
    settings, _ = serve(make_model(DENSE), max_staleness=2)
    rows = [{"prompt": f"ab{i}"} for i in range(12)]

    def run(folder: str, stop_after: int | None, *, resume: bool = False) -> tuple[list[int], Any]:
        config = GRPOConfig(
            output_dir=tmp_path / folder, num_steps=6, num_prompts=2, group_size=4, optim={"learning_rate": 1e-3},
            trackers=(),
            sampling={"max_new_tokens": 12}, rollout=settings,
        )
        seen: list[dict[str, float]] = []

        def stop(trainer: Any, step: int, metrics: Any) -> None:
            seen.append(dict(metrics))
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        trainer = GRPOTrainer(make_model(DENSE), even, config, rows, tokenizer=tokenizer, callbacks=[stop])
        try:
            trainer.train(resume=resume)
        finally:
            trainer.source.engine.close()
        order = pc.unique(read_rollouts(tmp_path / folder / "rollouts")["prompt_index"]).to_pylist()
        return order, seen

    order, seen = run("whole", None)
    assert sorted(order) == list(range(12))  # two a step, each once, none left out
    ages = [metrics["staleness"] for metrics in seen]
    assert ages[0] == 0 and max(ages) <= 2 and min(ages[2:]) > 0
    assert all(metrics["rollout_gap"] < 0.5 for metrics in seen)
    half, _ = run("parts", 3)
    assert half == order[:6]
    assert run("parts", None, resume=True)[0] == order
