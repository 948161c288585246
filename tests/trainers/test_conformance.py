"""What every trainer does alike. A new trainer is tested here by one line in `tests.trainers.tiny.CASES`."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from alignlab.models.hub.checkpoints import new_model
from tests.ranks import run_ranks
from tests.trainers import rank_cases
from tests.trainers.conftest import DENSE, even_ids
from tests.trainers.steps import credit_of, weights_of
from tests.trainers.tiny import CASES, ONLINE, REWARDED, make_case, save_teacher

ROOT = Path(__file__).parents[2]
OF_TIME = re.compile(r"_s$|per_s$|time")


@pytest.fixture
def make(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(name: str, folder: str = "run", **options: Any) -> Any:
        return make_case(name, tmp_path / folder, make_model(), tokenizer, **options)

    return make


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, those of time left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not OF_TIME.search(name)} for line in lines]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model or the adapter that a run has saved."""
    [path] = [path for kind in ("model", "adapter") for path in (folder / kind).glob("*.safetensors")]
    return load_file(path)


class WholeRun(NamedTuple):
    """An uninterrupted run of a case: its end, its folder, and all that was trained."""

    result: Any
    folder: Path
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], WholeRun]:
    """Train a case without an interruption, once."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def train(name: str) -> WholeRun:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGNLAB_CACHE", str(folder / f"cache of {name}"))
            torch.manual_seed(0)
            model = new_model(
                DENSE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            trainer = make_case(name, folder / name / "run", model, tokenizer)
            return WholeRun(trainer.train(), folder / name / "run", weights_of(trainer))

    return train


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    name: str, make: Callable[..., Any], whole: Callable[[str], WholeRun]
) -> None:
    def stop_after_two_steps(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    expected_result, whole_folder, expected = whole(name)
    assert make(name, "stopped", callbacks=(stop_after_two_steps,)).train().interrupted
    resumed = make(name, "stopped")
    result = resumed.train(resume=True)
    assert (result.before, result.after) == (expected_result.before, expected_result.after)
    weights = weights_of(resumed)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    folders = [Path(resumed.config.output_dir), whole_folder]
    resumed_metrics, whole_metrics = (metrics_of(folder) for folder in folders)
    assert resumed_metrics == whole_metrics
    saved, expected_saved = (saved_weights(folder) for folder in folders)
    assert saved.keys() == expected_saved.keys()
    assert all(torch.equal(saved[key], expected_saved[key]) for key in expected_saved)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """The gradients of a trainer's first update, which is not made."""
    found: dict[str, torch.Tensor] = {}
    for role, learner in trainer.learners.items():

        def keep(*_: Any, role: str = role, learner: Any = learner) -> dict[str, float]:
            found.update({f"{role}{n}": p.grad.clone() for n, p in learner.trained.items() if p.grad is not None})
            learner.strategy.clear()
            return {}

        learner._step = keep
    if hasattr(trainer, "source"):
        packs, *_ = credit_of(trainer, 9, trainer.source.collect(1).rollouts).minibatches
        trainer.algorithm.update(9, packs)
    else:
        packs = trainer.algorithm.packs("train", trainer.train_examples, range(4))
        trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights,
                               metric_weights=trainer.algorithm.loss_weights)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_does_not_depend_on_the_cut_into_packs(name: str, make: Callable[..., Any]) -> None:
    many, one = (
        gradients(make(name, f"run{budget}", memory={"tokens_per_microbatch": budget})) for budget in (12, 4096)
    )
    assert many.keys() == one.keys() and one
    for key, gradient in one.items():
        torch.testing.assert_close(many[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", REWARDED)
def test_occasional_failures_of_a_reward_are_counted_and_tolerated(name: str, make: Callable[..., Any]) -> None:
    calls = 0

    def unreliable(**arguments: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("no answer today")
        return even_ids(**arguments)

    trainer = make(name, rewards=[unreliable, even_ids])
    result = trainer.train()
    assert result.num_steps == 3 and result.metrics["reward_failures"] == 1


@pytest.mark.parametrize("name", CASES)
def test_every_metric_is_in_the_glossary(name: str, whole: Callable[[str], WholeRun]) -> None:
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    patterns = [re.escape(entry).replace(r"<name>", ".+").replace(r"<i>", r"\d+").replace(r"<part>", ".+")
                for entry in re.findall(r"`([a-z_]+(?:[/@][\w<>@]+)?)`", glossary)]
    names = {key for line in metrics_of(whole(name).folder) for key in line} - {"step"}
    unknown = [key for key in names if not any(re.fullmatch(pattern, key) for pattern in patterns)]
    assert not unknown, f"explain these in docs/metrics.md: {sorted(unknown)}"


@pytest.mark.parametrize("name", ONLINE)
def test_only_the_policy_s_tokens_are_trained_on(name: str, make: Callable[..., Any]) -> None:
    """Tokens that a tool wrote in a completion are read by the policy, and have no gradient."""
    trainer = make(name)
    rollouts = trainer.source.collect(1).rollouts
    mixed = [mix(rollout) for rollout in rollouts]
    packs = [pack for minibatch in credit_of(trainer, 9, mixed).minibatches for pack in minibatch]
    written = sum(sum(c.policy_tokens) for rollout in mixed for c in rollout.completions)
    trained = sum(int(pack.completion_mask.sum()) for pack in packs)
    assert 0 < trained <= written < sum(len(c.token_ids) for rollout in mixed for c in rollout.completions)
    for pack in packs:
        if pack.advantages is not None:
            assert not pack.advantages[~pack.completion_mask].any()


@pytest.fixture(scope="module")
def train_on_two_ranks(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train the cases whose weights are in a place, once, in one pair of processes, and return their folder."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def train(place: str) -> Path:
        save_teacher(folder / place / "teacher", tokenizer)
        done = run_ranks(str(ROOT / "tests/trainers/rank_cases.py"), str(folder), place)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / place

    return train


@pytest.fixture(scope="module")
def train_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """Train a case on one rank, once, and return its folder and all that was trained."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def train(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGNLAB_CACHE", str(folder / f"cache of {name}"))
            return folder / name, rank_cases.train(name, folder)

    return train


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, (_, names) in rank_cases.PLACES.items() for name in names]
)
def test_two_ranks_have_the_weights_and_metrics_of_one(
    place: str, name: str, train_on_two_ranks: Callable[[str], Path], train_alone: Callable[[str], Any]
) -> None:
    """With the same rollouts: `rank_cases` samples without the rank, by which the seeds of a real run differ."""
    folder_alone, expected = train_alone(name)
    folder = train_on_two_ranks(place)
    first, second = (load_file(folder / f"{name}.rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], weight, rtol=0, atol=1e-5, msg=key)
    saved, expected_saved = saved_weights(folder / name), saved_weights(folder_alone)
    assert saved.keys() == expected_saved.keys() and saved
    for key, weight in expected_saved.items():
        torch.testing.assert_close(saved[key], weight, rtol=0, atol=1e-5, msg=key)
    for step, step_of_one in zip(metrics_of(folder / name), metrics_of(folder_alone), strict=True):
        assert step == pytest.approx(step_of_one, rel=1e-3, abs=1e-5)


def mix(rollout: Any) -> Any:
    """The rollout with every second token of its completions written by a tool."""
    return replace(
        rollout,
        completions=tuple(
            replace(c, writers=tuple("tool" if i % 2 else "policy" for i in range(len(c.token_ids))))
            for c in rollout.completions
        ),
    )
