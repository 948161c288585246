"""Two ranks: the same gradient as one, and equal weights. Every trainer: `tests.trainers.test_conformance`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.runs.rollout_store import read_rollouts
from tests.loop import rank_held_out
from tests.loop.rank_gradients import gradients
from tests.loop.rank_uneven import UNEVEN
from tests.ranks import ROOT, run_ranks, torchrun
from tests.trainers.tiny import save_teacher

pytestmark = pytest.mark.distributed


def test_ranks_have_equal_weights_and_different_prompts(tmp_path: Path) -> None:
    """Three steps, stopped after two and resumed: equal weights on both ranks, and no prompt on both."""
    script = str(ROOT / "tests/loop/rank_training.py")
    for steps in ("2", "3"):
        done = run_ranks(script, str(tmp_path), steps)
        assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    rollouts = read_rollouts(tmp_path / "run" / "rollouts").to_pylist()
    assert sorted({row["step"] for row in rollouts}) == [1, 2, 3]
    for step in (1, 2, 3):
        prompts = [row["prompt_index"] for row in rollouts if row["step"] == step]
        assert len(prompts) == 4 * 4 and len(set(prompts)) == 4
        tokens = [row["advantage"] for row in rollouts if row["step"] == step for _ in row["token_ids"]]
        assert sum(tokens) / len(tokens) == pytest.approx(0, abs=1e-4), "whitened over all tokens of both ranks"
        assert sum(a * a for a in tokens) / (len(tokens) - 1) == pytest.approx(1, abs=1e-3)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward_failures"] for line in metrics] == [1, 2, 3], "failures of the second rank alone"


def test_ranks_have_the_bases_of_the_first_for_a_cache_in_few_dimensions(tmp_path: Path) -> None:
    """Where each would measure others: engine and trainer of both agree, and the bases stay."""
    done = run_ranks(str(ROOT / "tests/loop/rank_low_rank.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["own"] != second["own"]
    assert first["own"] == first["used"] == second["used"] == first["after"] == second["after"]
    assert first["gap"] == second["gap"] < 1e-5


def test_ranks_with_unlike_work_have_equal_weights(tmp_path: Path) -> None:
    """Online DPO, where only the first rank has a pair; GKD, where the dataset completes some prompts of each rank."""
    save_teacher(tmp_path / "teacher", train_tokenizer(["abc abd ab ba 123"], vocab_size=262))
    done = run_ranks(str(ROOT / "tests/loop/rank_uneven.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in UNEVEN:
        first, second = (load_file(tmp_path / f"{name}.rank{rank}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        for key, weight in first.items():
            assert torch.equal(second[key], weight), f"{name}: {key}"


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_gradient_does_not_depend_on_the_number_of_ranks(dtype: str, limit: float, tmp_path: Path) -> None:
    """In bfloat16 the sums over packs and ranks are float32, and what is summed is rounded to 8 bits."""
    done = run_ranks(str(ROOT / "tests/loop/rank_gradients.py"), str(tmp_path / "out"), dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, metrics = gradients(0, 1, tmp_path, dtype)
    for rank in (0, 1):
        path = tmp_path / f"rank{rank}.safetensors"
        shared = load_file(path)
        assert shared.keys() == alone.keys()
        for name, gradient in alone.items():
            assert shared[name].dtype == gradient.dtype == torch.float32
            assert (shared[name] - gradient).norm() <= limit * gradient.norm(), name
        with safe_open(path, "pt") as file:
            assert float(file.metadata()["loss"]) == pytest.approx(metrics["loss"], rel=max(1e-4, limit))


def test_held_out_data_is_shared_out_and_measured_as_by_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, texts included; each rank asks its engine for some of the problems alone."""
    done = run_ranks(str(ROOT / "tests/loop/rank_held_out.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "alone" / "cache"))
    for kind in rank_held_out.KINDS:
        alone = rank_held_out.measured(kind, tmp_path / "alone")
        assert alone is not None and json.loads(json.dumps(alone.to_json())) == ranks[0][kind], kind
    grpo = ranks[0]["grpo"]
    assert (grpo["num_problems"], grpo["num_judged"], len(grpo["samples"])) == (7, 6, 7)
    assert grpo["samples"][0]["sampled"] != grpo["samples"][3]["sampled"], "equal prompts have seeds of their own"


def test_ranks_with_a_warm_start_check_the_training_first(tmp_path: Path) -> None:
    """The checks make trainers on models without weights, which no rank can exchange, and only rank 0 writes."""
    (tmp_path / "run.yaml").write_text(WARM.format(folder=tmp_path / "run"))
    done = torchrun("-m", "alignlab", "train", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["num_steps"] == 2
    changes = ("trainer.routing_replay=trainer", "trainer.num_minibatches=2")
    other = f"trainer.output_dir={tmp_path / 'other'}"
    refused = run_ranks("-m", "alignlab", "train", str(tmp_path / "run.yaml"), other, *changes)
    assert "has no experts of ours" in refused.stderr and not (tmp_path / "other").exists()


WARM = """
model:
  architecture: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}}
  tokenizer: {{vocab_size: 300}}
data: {{task: products, task_options: {{min_terms: 2, max_terms: 2}}}}
rewards: [{{name: reasoning_gym_answer}}]
warm_start: {{trainer: {{num_steps: 2, num_sequences: 4, trackers: []}}}}
trainer:
  {{type: grpo, output_dir: {folder}, num_steps: 2, num_prompts: 4, group_size: 2, sampling: {{max_new_tokens: 4}},
   trackers: []}}
"""
