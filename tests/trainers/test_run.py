"""A whole run from one YAML file: tokenizer, warm start, reinforcement learning, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignlab.cli import parse
from alignlab.cli.generate import template_settings
from alignlab.config.data import RenderSettings
from alignlab.config.loader import load_config
from alignlab.data.prompts import load_prompts
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError, ConfigError, DataError
from alignlab.run_from_config import generate_options, run
from alignlab.runs.rollout_store import read_rollouts
from alignlab.starting_model import make_tokenizer

CONFIG = """
model:
  architecture:
    {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
     num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 32, mlp_layer_types: [sparse, sparse]}
  tokenizer: {vocab_size: 300, num_texts: 50}
data: {task: chain_sum, task_options: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}, size: 60}
rewards: [{name: reasoning_gym_answer}]
warm_start: {trainer: {num_steps: 3, num_sequences: 8, optim: {learning_rate: 1e-2}, trackers: []}}
trainer:
  type: grpo
  num_steps: 2
  num_prompts: 4
  group_size: 4
  optim: {learning_rate: 1e-3}
  trackers: []
  sampling: {max_new_tokens: 4}
evaluation: {num_problems: 6, num_samples: 2}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.usefixtures("curves")
def test_whole_run(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    summary = run(load_config(config_file, [f"trainer.output_dir={folder}"])).to_json()
    assert summary["task"] == "chain_sum"
    assert set(summary["before"]) == set(summary["after"]) == {"greedy", "sampled"}
    assert summary["num_steps"] == 2
    assert summary["model"] == str(folder / "model")
    assert json.loads((folder / "report.json").read_text())["num_steps"] == 2
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((folder / "rollouts").glob("*.parquet"))) == 2
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loads = [value for name, value in metrics[-2].items() if name.startswith("expert_load/")]
    assert len(loads) == 4
    assert sum(loads) == pytest.approx(1)
    import alignlab.models.hub.checkpoints  # noqa: F401  # registers the model type

    AutoModelForCausalLM.from_pretrained(folder / "model")
    with pytest.raises(ConfigError, match="nothing was overwritten"):
        run(load_config(config_file, [f"trainer.output_dir={folder}"]))


def test_tokenizer_from_rows_of_messages(config_file: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "zebra"}, {"role": "assistant", "content": "zebra"}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": chat}) + "\n")
    changes = [f"data={{path: {data}}}", f"eval_data={{path: {data}}}"]
    assert len(make_tokenizer(load_config(config_file, changes)).tokenize("zebra")) == 1
    data.write_text(json.dumps({"question": "zebra"}) + "\n")
    with pytest.raises(DataError, match="row 0"):
        make_tokenizer(load_config(config_file, changes))


def test_weights_of_a_new_model_depend_on_the_seed_alone(config_file: Path, tmp_path: Path) -> None:
    """Otherwise two runs of one config differ, and a resumed run's reference is not its starting policy."""
    texts = []
    for draws in (1, 2):
        torch.rand(draws)
        folder = tmp_path / str(draws)
        run(load_config(config_file, [f"trainer.output_dir={folder}", "trainer.num_steps=1", "warm_start=null"]))
        texts.append(read_rollouts(folder / "rollouts")["token_ids"].to_pylist())
    assert texts[0] == texts[1]


def test_warm_start_under_an_adapter(config_file: Path, tmp_path: Path) -> None:
    """The warm start trains all weights in float32; the adapter's base is its result in bfloat16."""
    first = run(load_config(config_file, [f"trainer.output_dir={tmp_path / 'first'}", "trainer.num_steps=1"]))
    changes = [f"model={{name: {first.result.model_path}, lora: {{rank: 2}}}}", f"trainer.output_dir={tmp_path / 'on'}"]
    summary = run(load_config(config_file, changes))
    assert summary.trains_adapter
    assert (tmp_path / "on" / "warm_start" / "model").is_dir()


def test_resume_skips_a_finished_warm_start(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = [f"trainer.output_dir={folder}", "trainer.checkpoints.every_steps=1"]
    run(load_config(config_file, changes))
    warm = (folder / "warm_start" / "metrics.jsonl").read_text()
    again = run(load_config(config_file, [*changes, "trainer.num_steps=3"]), resume=True)
    assert again.result.num_steps == 3
    assert (folder / "warm_start" / "metrics.jsonl").read_text() == warm


def test_a_finished_warm_start_is_not_trained_on_when_its_settings_change(config_file: Path, tmp_path: Path) -> None:
    """An adapter's base would be lost, and every checkpoint of the run with it."""
    folder = tmp_path / "run"
    first = run(load_config(config_file, [f"trainer.output_dir={tmp_path / 'first'}", "trainer.num_steps=1"]))
    changes = [f"model={{name: {first.result.model_path}, lora: {{rank: 2}}}}", f"trainer.output_dir={folder}"]
    run(load_config(config_file, [*changes, "trainer.num_steps=1"]))
    base = folder / "warm_start/model/model.safetensors"
    before = base.read_bytes()
    with pytest.raises(CheckpointError, match=r"warm_start\.trainer\.num_steps was 3 and is 5"):
        run(load_config(config_file, [*changes, "warm_start.trainer.num_steps=5"]), resume=True)
    assert base.read_bytes() == before
    assert run(load_config(config_file, [*changes, "trainer.num_steps=2"]), resume=True).result.num_steps == 2


def test_warm_start_cannot_be_added_or_removed_on_resume(config_file: Path, tmp_path: Path) -> None:
    with_one, without = (tmp_path / name for name in ("with", "without"))
    run(load_config(config_file, [f"trainer.output_dir={with_one}", "trainer.num_steps=1"]))
    run(load_config(config_file, [f"trainer.output_dir={without}", "trainer.num_steps=1", "warm_start=null"]))
    with pytest.raises(ConfigError, match="holds its warm start; add it"):
        run(load_config(config_file, [f"trainer.output_dir={with_one}", "warm_start=null"]), resume=True)
    with pytest.raises(ConfigError, match="was started without; remove it"):
        run(load_config(config_file, [f"trainer.output_dir={without}"]), resume=True)
    assert not (without / "warm_start").exists()


def test_training_and_evaluation_problems_are_disjoint(config_file: Path) -> None:
    config = load_config(config_file, [])
    tokenizer = train_tokenizer(["1 + 2"], vocab_size=262)
    held_out = config.evaluation_data
    assert held_out is not None
    for seed in (0, 1):
        training = load_prompts(config.data.model_copy(update={"seed": seed}), tokenizer)
        evaluation = load_prompts(held_out, tokenizer)
        assert len(evaluation) >= 6
        assert {p.text for p in training}.isdisjoint(p.text for p in evaluation)


def test_generate_options_of_a_run_render_prompts_as_in_training(config_file: Path) -> None:
    data: Any = load_config(config_file, ["data.system_prompt=Be brief.", "data.chat=false"]).data
    assert generate_options(data) == ("--plain", "--system-prompt", "Be brief.")
    data = load_config(config_file, ["data.prompt_template='Q: {prompt} A:'"]).data
    assert generate_options(data) == ("--prompt-template", "Q: {prompt} A:")
    assert generate_options(load_config(config_file, []).data) == ()


DISTILL = """
model: {{name: {teacher}, student: {{num_layers: 1}}}}
data: {{task: chain_sum, task_options: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}, size: 60}}
rewards: {rewards}
warm_start: {{data: {{path: {samples}}}, trainer: {{num_steps: 3, num_sequences: 8, trackers: []}}}}
trainer:
  type: on_policy_distill
  teacher: {{name: {teacher}}}
  output_dir: {folder}
  num_steps: 2
  num_prompts: 4
  trackers: []
  sampling: {{max_new_tokens: 4}}
evaluation: {{num_problems: 6, num_samples: 2}}
"""


@pytest.mark.parametrize("rewards", ["[{name: reasoning_gym_answer}]", "[]"], ids=["measured", "without rewards"])
def test_student_starts_with_the_layers_and_sampling_of_its_teacher(
    rewards: str, config_file: Path, tmp_path: Path
) -> None:
    teacher = run(load_config(config_file, [f"trainer.output_dir={tmp_path / 'teacher'}"])).result.model_path
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": str(i + 1)}) + "\n" for i in range(8)))
    path = tmp_path / "distill.yaml"
    path.write_text(DISTILL.format(teacher=teacher, samples=samples, folder=tmp_path / "distill", rewards=rewards))
    summary = run(load_config(path)).to_json()
    assert (summary["before"] is None) == (rewards == "[]")
    config = json.loads((Path(summary["model"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    metrics = [json.loads(line) for line in (tmp_path / "distill/metrics.jsonl").read_text().splitlines()]
    assert all("reverse_kl" in line for line in metrics if "tokens_per_s" in line)


def test_generate_accepts_the_flags_that_a_run_reports(config_file: Path) -> None:
    overrides = [
        "data.tools=[{function: {name: look_up}}]", "data.chat_template_kwargs={enable_thinking: false}",
        "data.template_date=2026-11-03", "data.escape_special_tokens=true",
    ]
    data: Any = load_config(config_file, overrides).data
    args = parse(["generate", "model", "prompt", *generate_options(data)])
    assert args.escape_special_tokens
    settings = RenderSettings(**template_settings(args))
    assert settings == RenderSettings(
        tools=data.tools, chat_template_kwargs=data.chat_template_kwargs, template_date=data.template_date
    )
    for flag, value, named in (
        ("--tools", "{", "--tools must be JSON"),
        ("--chat-template-kwargs", "[]", "must be a JSON object"),
        ("--template-date", "tomorrow", "must be a day"),
    ):
        with pytest.raises(ConfigError, match=named):
            template_settings(parse(["generate", "model", "prompt", flag, value]))


def test_turns_to_teach_are_refused_where_no_turn_is_taught(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.taught_turns.* must stay together for trainer grpo"):
        load_config(config_file, ["data.taught_turns=last", "warm_start=null"])


def test_used_output_folder_is_refused_before_the_warm_start(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("precious")
    config = load_config(config_file, [f"trainer.output_dir={folder}"])
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"holds metrics\.jsonl without the starts\.jsonl"):
            run(config, resume=resume)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
