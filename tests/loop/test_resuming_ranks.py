"""A run that is stopped goes on on another number of ranks, with its weights in other places."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignlab.runs.rollout_store import read_rollouts
from tests.loop import rank_resuming
from tests.ranks import ROOT, run_ranks
from tests.trainers.tiny import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of which a step is done by fsdp2 on two ranks, the next on one, and the last by fsdp2 on two again."""
    folder = tmp_path_factory.mktemp("resuming")
    script = str(ROOT / "tests/loop/rank_resuming.py")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        for num_steps in (1, 2, 3):
            if num_steps == 2:
                for name in rank_resuming.CASES:
                    rank_resuming.train(name, folder, "ddp", num_steps)
                continue
            done = run_ranks(script, str(folder), "fsdp2", str(num_steps))
            assert done.returncode == 0, done.stderr[-3000:]
    return folder


def weights_of_ranks(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights that both ranks have at the end."""
    first, second = (load_file(folder / f"{name}.3.rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return first


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in rank_resuming.CASES if CASES[name].rewards is None])
def test_examples_are_learnt_from_as_in_an_uninterrupted_run(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    expected = rank_resuming.train(name, tmp_path, "ddp", 3)
    weights = weights_of_ranks(folder, name)
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-6, msg=key)


@pytest.mark.distributed
def test_models_beside_checkpoints_are_whole_wherever_the_weights_were(folder: Path) -> None:
    written = load_file(folder / "sft" / "models" / "step-00000003" / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights_of_ranks(folder, "sft").items()}
    assert weights and all(torch.equal(written[name], weight) for name, weight in weights.items())


@pytest.mark.distributed
def test_rollouts_go_on_with_the_next_prompts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_resuming.train("grpo", tmp_path, "ddp", 3)
    assert weights_of_ranks(folder, "grpo")
    prompts, expected = (
        [Counter(row["prompt_index"] for row in rows if row["step"] == step) for step in (1, 2, 3)]
        for rows in (read_rollouts(run / "grpo" / "rollouts").to_pylist() for run in (folder, tmp_path))
    )
    assert prompts == expected and [len(step) for step in prompts] == [4, 4, 4]


@pytest.mark.distributed
def test_the_report_says_what_another_number_of_ranks_changes(folder: Path) -> None:
    report = json.loads((folder / "grpo" / "report.json").read_text())
    changes = [(entry["step"], text) for entry in report["changed_on_resume"] for text in entry["changes"]]
    of_ranks = [(step, text) for step, text in changes if "number of ranks" in text]
    assert [step for step, _ in of_ranks] == [1, 2]
    assert "was 2 and is 1" in of_ranks[0][1] and "was 1 and is 2" in of_ranks[1][1]
    assert "rollouts are sampled with other seeds" in of_ranks[0][1]
