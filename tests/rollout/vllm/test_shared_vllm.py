"""Ranks that share one vLLM in their processes get what each would get from one of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.rollout import RolloutSettings, VLLMServerSettings, VLLMSettings
from alignlab.errors import ConfigError
from alignlab.rollout.vllm import rank_groups
from alignlab.rollout.vllm.rank_groups import check_groups, require_own_vllm
from tests.evaluation import test_evaluation as evaluation
from tests.evaluation.test_evaluation import ScriptedEngine
from tests.ranks import ROOT, run_ranks, torchrun
from tests.rollout.vllm.conftest import FORKS, INSTALLED, SMALL
from tests.trainers.rank_engines import NUM_STEPS
from tests.trainers.test_rank_engines import gaps_of, run, weights_of_ranks


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that pretends a number of ranks."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(rank_groups, "has_several_ranks", lambda: count > 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)

    return pretend


def test_ranks_that_cannot_form_groups_are_refused(ranks: Any) -> None:
    settings = VLLMSettings(tensor_parallel=2)
    for count in (1, 2, 4):
        ranks(count)
        check_groups(settings)
    ranks(3)
    with pytest.raises(ConfigError, match=r"parallel is 2, and must divide the number of ranks \(3\).* use 1, st"):
        check_groups(settings)
    check_groups(VLLMSettings())


def test_ranks_on_several_machines_that_would_share_a_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on ranks whose own group is on one machine."""
    monkeypatch.setattr(rank_groups, "neighbours", lambda size: None)
    monkeypatch.setattr(rank_groups, "gather_json", lambda value, group: [value, value])
    monkeypatch.setattr(rank_groups, "largest_of_ranks", lambda number: number)
    rank_groups.RankGroup(2)
    monkeypatch.setattr(rank_groups, "largest_of_ranks", lambda number: 2)
    with pytest.raises(ConfigError, match="ranks that share one vLLM must be on one machine"):
        rank_groups.RankGroup(2)


def test_work_at_each_ranks_own_pace_is_refused_where_ranks_share_a_vllm(ranks: Any) -> None:
    ranks(2)
    with pytest.raises(ConfigError, match="tensor_parallel is 2, and must be 1 for labels on several ranks"):
        require_own_vllm(VLLMSettings(tensor_parallel=2), "labels")
    for settings in (VLLMSettings(), VLLMServerSettings(tensor_parallel=2), RolloutSettings()):
        require_own_vllm(settings, "labels")
    ranks(1)
    require_own_vllm(VLLMSettings(tensor_parallel=2), "labels")


@pytest.fixture(scope="module", params=["dense", "mixture"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what both ranks wrote."""
    folder = Path(tmp_path_factory.mktemp(request.param))
    done = run_ranks(str(ROOT / "tests/rollout/vllm/rank_shared_vllm.py"), str(folder), request.param, servers=[FORKS])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Assert that completions have the same tokens and experts, and the same log-probs within rounding."""
    assert len(found) == len(expected)
    for (ids, logprobs, routing), (other_ids, other_logprobs, other_routing) in zip(found, expected, strict=True):
        assert ids == other_ids and routing == other_routing
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(other_logprobs), rtol=0, atol=2e-5)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not INSTALLED, reason="needs vLLM")
def test_two_ranks_that_share_a_vllm_sample_what_each_samples_alone(results: list[dict[str, Any]]) -> None:
    """Before and after updates, also where one rank has nothing to ask."""
    for of_rank, counts in zip(results, ((8, 8), (4, 0)), strict=True):
        assert (len(of_rank["2 first"]), len(of_rank["2 later"])) == counts
        assert_same(of_rank["2 first"], of_rank["1 first"])
        assert_same(of_rank["2 later"], of_rank["1 later"])
        assert max(of_rank["1 gap"], of_rank["2 gap"]) < 5e-5
    assert results[0]["2 first"] != results[0]["2 later"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not INSTALLED, reason="needs vLLM")
def test_a_fault_of_one_rank_leaves_no_other_rank_waiting(results: list[dict[str, Any]]) -> None:
    other = "another rank could not prepare its requests to the vLLM that it shares with this one; see its message"
    assert results[0]["faults"] == [other, "generation was abandoned, because the run ends"]
    assert "128 tokens" in results[1]["faults"][0] and results[1]["faults"][1] == 4
    for of_rank in results:
        assert_same(of_rank["after the faults"], of_rank["2 later"])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not INSTALLED, reason="needs vLLM")
def test_ranks_that_share_a_vllm_train_as_those_with_their_own(tmp_path: Path) -> None:
    shared = {"engine": "vllm"} | SMALL | {"tensor_parallel": 2}
    runs = {"own": ("ddp", shared | {"tensor_parallel": 1}), "ddp": ("ddp", shared), "fsdp2": ("fsdp2", shared)}
    run(tmp_path, *(
        {"name": name, "model": "dense", "strategy": strategy, "rollout": rollout}
        for name, (strategy, rollout) in runs.items()
    ), start=torchrun)  # fmt: skip
    expected = weights_of_ranks(tmp_path, "own")
    for name in ("ddp", "fsdp2"):
        for key, weight in weights_of_ranks(tmp_path, name).items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-4, msg=f"{name}: {key}")
        gaps = gaps_of(tmp_path, name)
        assert len(gaps) == NUM_STEPS and max(gaps) < 2e-5, (name, gaps)


class RankWithoutProblems:
    """The second of two ranks, which ends once it has computed its part."""

    index, count = 1, 2

    def gather_done(self, work: str, compute: Callable[[], Any]) -> list[Any]:
        """Compute this rank's part, and leave the evaluation."""
        assert compute() == []
        raise InterruptedError


def test_an_evaluations_rank_without_problems_generates_as_often_as_the_others() -> None:
    with_problems, without = ScriptedEngine(), ScriptedEngine()
    evaluation.run(with_problems, prompts=evaluation.problems({0: 4}))
    with pytest.raises(InterruptedError):
        evaluation.run(without, prompts=evaluation.problems({0: 4}), ranks=RankWithoutProblems())
    assert without.asked == with_problems.asked and len(without.asked) == 2
