"""`alignlab check` refuses what a training would refuse at its start or at its end, by the same code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from alignlab.cli import main
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.vocabulary import num_token_ids
from alignlab.files.manifest import MODEL_MANIFEST
from alignlab.models.hub.checkpoints import load_tokenizer, new_model, save_model

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model and a tokenizer with one token more than the model has rows."""
    tokenizer = train_tokenizer(["red blue one two"] * 9, vocab_size=270)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_model(new_model(SHAPE, vocab_size=num_token_ids(tokenizer), **ends), tmp_path / "model")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def write(model: Path, tmp_path: Path) -> Callable[..., str]:
    def written(rows: list[dict[str, Any]], settings: dict[str, Any] | None = None, **trainer: Any) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"num_steps": 2, "output_dir": str(tmp_path / "run"), "trackers": []} | trainer
        config = {"model": {"name": str(model)}, "data": {"path": str(tmp_path / "rows.jsonl")}, "trainer": section}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | (settings or {})))
        return str(tmp_path / "config.yaml")

    return written


def rows_for(kind: str, text: str) -> list[dict[str, Any]]:
    if kind in ("dpo", "reward"):
        return [{"prompt": "red", "chosen": text, "rejected": "one"}] * 2
    if kind == "kto":
        return [{"prompt": f"red {good}", "completion": f"{text} {good}", "label": good} for good in (True, False)]
    return [{"prompt": "red" if kind == "sft" else text, "completion": text, "answer": "1"}] * 2


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward", "grpo"])
def test_check_refuses_a_token_without_an_embedding(
    kind: str, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"rewards": [{"name": "exact_match"}]} if kind == "grpo" else {}
    assert main(["check", write(rows_for(kind, "blue <new>"), settings, type=kind)]) == 2
    assert "('<new>'), and the model has" in capsys.readouterr().err
    assert main(["check", write(rows_for(kind, "blue"), settings, type=kind)]) == 0
    assert not (tmp_path / "run").exists()


def test_check_tries_the_end_of_the_run(
    write: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_for("sft", "blue")
    file = model / "generation_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"temperature": 0.9}))
    assert main(["check", write(rows, type="sft")]) == 0
    assert "do_sample is set to true, which temperature 0.9" in caplog.text
    file.write_text(json.dumps(plain | {"temperature": "hot"}))
    assert main(["check", write(rows, type="sft")]) == 2
    assert "temperature 'hot', which must be a number" in capsys.readouterr().err
    file.write_text(json.dumps(plain))
    (tmp_path / "file").touch()
    assert main(["check", write(rows, type="sft", output_dir=str(tmp_path / "file" / "run"))]) == 2
    assert "is no folder; choose another trainer.output_dir" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert main(["check", write(rows, type="sft")]) == 2
    assert "GiB free" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_check_and_train_refuse_a_config_that_the_weights_do_not_fit(
    field: str, write: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / MODEL_MANIFEST).unlink(missing_ok=True)
    file = model / "config.json"
    config = json.loads(file.read_text())
    other = {"num_attention_heads": 1, "num_hidden_layers": 1}.get(field, config[field] * 2)
    file.write_text(json.dumps({name: v for name, v in config.items() if name != "layer_types"} | {field: other}))
    path = write(rows_for("sft", "blue"), type="sft")
    for command in ("check", "train"):
        assert main([command, path]) == 2, command
        assert "cannot be loaded" in (told := capsys.readouterr().err) or "do not fit its config" in told, command
    assert not (tmp_path / "run").exists()


def test_check_and_train_refuse_an_adapter_s_config_that_its_tensors_do_not_fit(
    write: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_for("sft", "blue")
    assert main(["train", write(rows, {"model": {"name": str(model), "lora": {"rank": 2}}}, type="sft")]) == 0
    adapter = tmp_path / "run/adapter"
    (adapter / MODEL_MANIFEST).unlink()
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))
    path = write(rows, {"model": {"name": str(adapter)}}, type="sft", output_dir=str(tmp_path / "again"))
    for command in ("check", "train"):
        assert main([command, path]) == 2, command
        assert "give the model that" in capsys.readouterr().err, command


def test_check_tries_the_end_of_an_adapter_and_of_a_student(
    write: Callable[..., str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_for("sft", "blue")
    adapter = {"model": {"name": str(model), "lora": {"rank": 2, "target_modules": ["q_proj", "nothing"]}}}
    assert main(["check", write(rows, adapter, type="sft")]) == 2
    assert "target_modules names nothing" in capsys.readouterr().err
    adapter["model"]["lora"] = {"rank": 2}
    assert main(["check", write(rows, adapter, type="sft")]) == 0
    assert main(["train", write(rows, adapter, type="sft")]) == 0
    further = {"model": {"name": str(model.parent / "run" / "adapter")}}
    assert main(["check", write(rows, further, type="sft", output_dir=str(model.parent / "again"))]) == 0
    student = {"model": {"name": str(model), "student": {"num_layers": 1}}}
    assert main(["check", write(rows, student, type="sft")]) == 0
    student["model"]["student"] = {"num_layers": 5}
    assert main(["check", write(rows, student, type="sft")]) == 2
    assert "num_layers is 5" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["distill", "gkd", "on_policy_distill"])
def test_check_refuses_a_teacher_with_too_few_rows(
    kind: str, write: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(model))
    tokenizer.save_pretrained(tmp_path / "student")
    save_model(new_model(SHAPE, vocab_size=num_token_ids(tokenizer)), tmp_path / "student")
    student = {"model": {"name": str(tmp_path / "student")}}
    config = write(rows_for(kind, "blue"), student, type=kind, teacher={"name": str(model)})
    rows = num_token_ids(tokenizer) - 1
    assert main(["check", config]) == 2
    assert f"the teacher has {rows} logits" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["distill", "gkd", "on_policy_distill"])
def test_check_names_the_model_of_a_run_that_is_given_as_a_teacher(
    kind: str, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_for("sft", "blue")
    assert main(["train", write(rows, type="sft", num_steps=1)]) == 0
    config = write(rows_for(kind, "blue"), type=kind, teacher={"name": str(tmp_path / "run")})
    assert main(["check", config, f"trainer.output_dir={tmp_path / 'student'}"]) == 2
    assert f"teacher.name must be a model or an adapter, and {tmp_path / 'run'} is a run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_missing_result_names_its_command(
    command: str, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"model": {"name": "x"}, "trainer": {"type": "sft", "output_dir": str(tmp_path / "teacher")}}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    missing = {"model": {"name": str(tmp_path / "teacher" / "model")}}
    assert main([command, write(rows_for("sft", "blue"), missing, type="sft")]) == 2
    assert f"make it first: alignlab train {tmp_path / 'first.yaml'}" in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [False, True])
def test_check_skips_or_refuses_prompts_without_room_as_the_training_does(
    held_out: bool, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"prompt": "red", "answer": "1"}, {"prompt": "blue one two " * 40, "answer": "1"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (long if held_out else long[:1])))
    settings = {"rewards": [{"name": "exact_match"}], "eval_data": {"path": str(tmp_path / "eval.jsonl")}}
    room = {"type": "grpo", "rollout": {"cache_tokens": 40}, "sampling": {"max_new_tokens": 8}}
    config = write(long[:1] if held_out else long, settings, **room)
    section = "eval_data" if held_out else "data"
    assert main(["check", config]) == 2
    told = capsys.readouterr().err
    assert "must fit rollout.cache_tokens (40)" in told and f"longest {'evaluation ' if held_out else ''}prompt" in told
    assert main(["check", config, f"{section}.on_bad_row=skip"]) == 0


@pytest.mark.parametrize(("trainer", "rows", "message"), [
    ({"type": "distill", "top_k": 999}, [{"prompt": "red", "completion": "blue"}] * 2, "top_k is 999"),
    ({"type": "gkd", "student_frac": 0.5}, [{"prompt": "red"}] * 2, "has neither completion nor answer"),
    ({"type": "on_policy_distill", "routing_replay": "trainer", "num_minibatches": 2}, [{"prompt": "red"}] * 2,
     "has no experts of ours"),
])  # fmt: skip
def test_check_refuses_what_the_trainer_refuses_as_it_is_made(
    trainer: dict[str, Any], rows: list[dict[str, Any]], message: str, write: Callable[..., str], model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(rows, teacher={"name": str(model)}, **trainer)
    for command in ("check", "train"):
        assert main([command, config]) == 2, command
        assert message in capsys.readouterr().err, command


def test_a_training_that_would_be_refused_is_refused_before_its_warm_start(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "rewards": [{"name": "exact_match"}],
        "warm_start": {"trainer": {"type": "sft", "num_steps": 1, "trackers": []}},
    }
    without_experts = {"type": "grpo", "routing_replay": "trainer", "num_minibatches": 2}
    config = write([{"prompt": "red", "answer": "1"}] * 2, settings, **without_experts)
    for command in ("check", "train"):
        assert main([command, config]) == 2, command
        assert "has no experts of ours" in capsys.readouterr().err, command
    assert not (tmp_path / "run").exists()


def test_check_names_the_largest_part_of_too_much_memory(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(rows_for("sft", "blue"), type="sft")
    assert main(["check", config]) == 0
    told = capsys.readouterr().out
    assert "GiB on each rank's device, a CPU (--device cuda predicts for a GPU): weights 0.00" in told
    assert "less than the training takes" not in told
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 1000, "available": 2**40}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["check", config]) == 0
    assert "less than the training takes; activations: set trainer.memory.gradient_checkpointing" in (
        capsys.readouterr().out
    )
    assert main(["check", config, "--device", "cuda"]) == 0
    told = capsys.readouterr().out
    assert "GiB on each rank's device, a GPU: weights" in told and "less than the training takes" not in told


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_check_of_an_architecture_of_transformers_own(
    kind: str, write: Callable[..., str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(model))
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=num_token_ids(tokenizer), n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings: dict[str, Any] = {"model": {"name": str(tmp_path / "gpt2")}}
    if kind == "grpo":
        settings["rewards"] = [{"name": "exact_match"}]
    assert main(["check", write(rows_for("sft", "blue"), settings, type=kind)]) == 0
    told = capsys.readouterr().out
    assert "ok: nothing was trained" in told and "GiB" not in told


def test_check_says_which_weights_decay(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(rows_for("sft", "blue"), type="sft", optim={"weight_decay": 0.1})
    assert main(["check", path]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decay")]
    assert line.split(maxsplit=1)[1].startswith("0.1 of matrices (15 tensors, 9,440 weights)")
    assert "embeddings (1 tensors, 4,320 weights); none of norms (5 tensors, 80 weights)" in line
    assert main(["check", path, "trainer.optim.weight_decay=0"]) == 0
    assert "decay      no weight decays" in capsys.readouterr().out


def test_check_predicts_the_memory_of_an_average(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, and the weights again while they are set aside: 13,840 weights of 4 bytes, twice."""
    monkeypatch.setattr("alignlab.cli.check._memory_line", lambda config, memory, *_: f"{dict(memory)}")
    assert main(["check", write(rows_for("sft", "blue"), type="sft", ema={"decay": 0.9})]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert "'average of weights': 110720" in line


@pytest.mark.parametrize("rollout", [
    {"kv_cache": {"type": "mmap", "folder": "."}}, {"quantization": "int8"}, {"quantization": "int8_dynamic"},
], ids=str)  # fmt: skip
def test_check_takes_what_the_embedded_engine_does_on_a_cpu_alone(
    rollout: dict[str, Any], write: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model that is checked has no weights, and is on no device."""
    monkeypatch.chdir(tmp_path)
    config = write(rows_for("grpo", "blue"), {"rewards": [{"name": "exact_match"}]}, type="grpo", rollout=rollout)
    assert main(["check", config, "--device", "cpu"]) == 0
    assert main(["check", config, "--device", "cuda"]) == 2
    assert "GPU" in capsys.readouterr().err


def test_check_counts_the_tokens_that_a_cache_in_few_dimensions_is_measured_on(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = {"kv_cache": {"type": "low_rank", "rank": 8}}
    settings = {"rewards": [{"name": "exact_match"}]}
    options = {"type": "grpo", "num_prompts": 2, "rollout": rollout}
    assert main(["check", write(rows_for("grpo", "red blue " * 4), settings, **options)]) == 0
    assert main(["check", write(rows_for("grpo", "red"), settings, **options)]) == 2
    assert "must have at least 8 tokens" in capsys.readouterr().err
