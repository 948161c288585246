"""vLLM beside weights that are spread over two ranks: on a server for both, and in the process of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import ROOT, run_ranks
from tests.rollout.vllm.conftest import FORKS, INSTALLED, SMALL, serve
from tests.trainers.rank_engines import NUM_STEPS, make_model

__all__ = ["serve"]  # a fixture, used by name
pytestmark = [
    pytest.mark.vllm, pytest.mark.slow, pytest.mark.distributed,
    pytest.mark.skipif(not INSTALLED, reason="needs vLLM"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tests.trainers.rank_engines import make_tokenizer

    return make_tokenizer()


def run(folder: Path, *runs: dict[str, Any], start: Callable[..., Any] = run_ranks) -> None:
    """Train on two ranks, one run after another.

    Args:
        start: starts the ranks.
    """
    done = start(str(ROOT / "tests/trainers/rank_engines.py"), str(folder), json.dumps(runs))
    assert done.returncode == 0, done.stderr[-9000:]


def weights_of_ranks(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights that both ranks have at the end of a run."""
    first, second = (load_file(folder / f"{name}.rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return first


def gaps_of(folder: Path, name: str) -> list[float]:
    """Return the difference of the rollouts' log-probs from the trainer's, at each step, nats."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["rollout_gap"] for line in lines if "rollout_gap" in line]


def test_a_server_gets_from_parts_the_weights_that_it_gets_from_whole_ones(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", "a-token-of-the-tests")
    settings, _ = serve(make_model("dense"))
    rollout = settings.model_dump(mode="json")
    strategies = {"dense": ("fsdp2", "zero3"), "adapter": ("fsdp2", "zero2")}
    run(tmp_path, *(
        {"name": f"{model}-{strategy}", "model": model, "strategy": strategy, "rollout": rollout}
        for model, others in strategies.items() for strategy in ("ddp", *others)
    ))  # fmt: skip
    for model, others in strategies.items():
        whole = weights_of_ranks(tmp_path, f"{model}-ddp")
        for strategy in others:
            parts = weights_of_ranks(tmp_path, f"{model}-{strategy}")
            for name, weight in whole.items():
                torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-5, msg=f"{strategy}: {name}")
            gaps = gaps_of(tmp_path, f"{model}-{strategy}")
            assert len(gaps) == NUM_STEPS and max(gaps) < 2e-5, (model, strategy, gaps)


def test_each_rank_has_a_vllm_of_its_own(tmp_path: Path) -> None:
    """With an adapter that is sent alone, and with a mixture whose experts are replayed."""
    in_process = {"engine": "vllm"} | SMALL
    run(
        tmp_path,
        {"name": "adapter", "model": "adapter", "strategy": "fsdp2", "rollout": in_process | {"sync": "adapter"}},
        {"name": "mixture", "model": "mixture", "strategy": "fsdp2", "rollout": in_process},
        start=partial(run_ranks, servers=[FORKS]),
    )
    for name in ("adapter", "mixture"):
        assert weights_of_ranks(tmp_path, name)
        gaps = gaps_of(tmp_path, name)
        assert len(gaps) == NUM_STEPS and max(gaps) < 2e-5, (name, gaps)
