"""The command line: what it prints where, how it ends, and one small run from training to a merged model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alignlab.run_from_config
from alignlab.cli import COMMANDS, main, parse
from alignlab.errors import ConfigError, RolloutError
from alignlab.files.manifest import MODEL_MANIFEST, find_damage, has_manifest
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from tests.config.test_loader import SHIPPED

WORDS = "red blue green one two three"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """`main` adds to the environment: take it back after each test."""
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("GOMP_SPINCOUNT")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A config that trains an adapter on a tiny model in a second; the model and the data lie beside it."""
    from alignlab.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("cli")
    tokenizer = train_tokenizer([WORDS] * 20, vocab_size=300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = new_model(
        shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"say {word}", "answer": word} for word in WORDS.split()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(
        "def vowels(completions, **columns):\n"
        "    return [float(any(letter in text for letter in 'aeiou')) for text in completions]\n"
    )
    config = {
        "model": {"name": str(folder / "model"), "lora": {"rank": 2}},
        "data": {"path": str(folder / "rows.jsonl")},
        "eval_data": {"path": str(folder / "rows.jsonl"), "size": 3},
        "rewards": [{"name": f"{folder / 'reward.py'}:vowels"}],
        "trainer": {
            "type": "grpo",
            "output_dir": str(folder / "run"),
            "num_steps": 2,
            "num_prompts": 2,
            "group_size": 2,
            "sampling": {"max_new_tokens": 4},
            "trackers": [],
        },
        "evaluation": {"num_samples": 2, "pass_at": [1, 2]},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(run_file) -> str:
    """What `alignlab train` makes."""
    if not (run_file.parent / "run" / "adapter").exists():
        assert main(["train", str(run_file)]) == 0
    return str(run_file.parent / "run" / "adapter")


def test_train_ends_with_its_result_as_json(run_file, capfd):
    assert main(["train", str(run_file)]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(result) >= {"task", "before", "after", "train_seconds", "adapter"}
    assert set(result["before"]) == set(result["after"]) == {"greedy", "sampled"}
    assert (Path(result["adapter"]) / "adapter_config.json").exists()


def test_a_second_run_in_the_same_folder_is_refused(run_file, adapter, capsys):
    before = sorted(Path(adapter).iterdir())
    assert main(["train", str(run_file)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert sorted(Path(adapter).iterdir()) == before


def test_check_tells_sizes_and_tries_the_rewards(run_file, capsys):
    assert main(["check", str(run_file), "trainer.output_dir=runs/none"]) == 0
    told = capsys.readouterr().out
    assert "6 prompts of" in told and "3 prompts of" in told and "columns: answer" in told
    assert "vowels: 1.0 for 'red'" in told
    assert "grpo = group_normalized + ppo_clip + sequence_mean: 2 steps" in told
    assert "3 evaluation prompts are also trained on" in told


@pytest.mark.parametrize(
    ("row", "kind", "told"),
    [
        ({"prompt": "say", "completion": "red"}, "sft", ", of which 2 taught"),
        ({"prompt": "say", "chosen": "red", "rejected": "a"}, "dpo", "2 pairs of"),
        ({"prompt": "say", "chosen": "red", "rejected": "a"}, "reward", "2 pairs of"),
        ({"prompt": "say", "chosen": "red", "rejected": "a"}, "kto", "2 desirable and 2 undesirable"),
    ],
)
def test_check_reads_rows_as_the_training_does(row, kind, told, run_file, tmp_path, capsys):
    lines = [json.dumps(row | {"prompt": prompt}) for prompt in ("say", "tell")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = [f"data.path={tmp_path / 'rows.jsonl'}", "eval_data=null", "rewards=[]", "evaluation={}"]
    trainer = f"trainer={json.dumps({'type': kind, 'output_dir': str(tmp_path / 'run')})}"
    assert main(["check", str(run_file), *data, trainer]) == 0
    assert told in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "say"}) + "\n", encoding="utf-8")
    assert main(["check", str(run_file), *data, trainer]) == 2
    assert "row 0" in capsys.readouterr().err


def test_check_sees_rows_that_the_model_has_no_positions_for(run_file, tmp_path, capsys, caplog):
    config = run_file.parent / "model" / "config.json"
    kept = config.read_text()
    lines = [json.dumps({"prompt": "say", "completion": text}) for text in ("red", "red " * 40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    bare = [f"data.path={tmp_path / 'rows.jsonl'}", "eval_data=null", "rewards=[]", "evaluation={}"]
    section = {"type": "sft", "output_dir": str(tmp_path / "run"), "num_steps": 1, "trackers": []}
    trainer = f"trainer={json.dumps(section)}"
    assert main(["check", str(run_file), *bare, trainer]) == 0
    try:
        config.write_text(json.dumps(json.loads(kept) | {"max_position_embeddings": 9}))
        assert main(["check", str(run_file), *bare, trainer]) == 2
        assert "and must fit the model's 9 positions" in capsys.readouterr().err
        for command in ("check", "train"):
            assert main([command, str(run_file), *bare, trainer, "data.on_bad_row=skip"]) == 0
            assert "skipped 1 of 2 examples: more tokens than the model's 9 positions" in caplog.text
            caplog.clear()
        assert main(["check", str(run_file), "trainer.sampling.max_new_tokens=8"]) == 2
        assert "must fit the model's 9 positions" in capsys.readouterr().err
    finally:
        config.write_text(kept)


def test_check_sees_examples_that_the_teacher_has_no_positions_for(run_file, tmp_path, capsys):
    short = tmp_path / "teacher"
    shutil.copytree(run_file.parent / "model", short)
    config = short / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2}))
    trainer = {"type": "distill", "teacher": {"name": str(short)}, "output_dir": str(tmp_path / "run")}
    assert main(["check", str(run_file), f"trainer={json.dumps(trainer)}"]) == 2
    assert "and must fit the teacher's 2 positions" in capsys.readouterr().err


def test_check_notes_held_out_prompts_that_distillation_trains_on(run_file, tmp_path, capsys):
    teacher = {"type": "distill", "teacher": {"name": str(run_file.parent / "model")}, "output_dir": str(tmp_path)}
    assert main(["check", str(run_file), f"trainer={json.dumps(teacher)}"]) == 0
    assert "3 evaluation prompts are also trained on" in capsys.readouterr().out


def test_check_warns_of_learning_rates_that_do_not_fit(run_file, capsys):
    assert main(["check", str(run_file), "trainer.optim.learning_rate=1e-6"]) == 0
    assert "1e-06 is low for LoRA" in capsys.readouterr().out
    assert main(["check", str(run_file), "trainer.optim.learning_rate=1e-3", "model.lora=null"]) == 0
    assert "0.001 is high for all weights" in capsys.readouterr().out


def test_a_run_that_learns_nothing_says_so_in_its_last_line(run_file, tmp_path, capfd):
    reward = tmp_path / "rewards.py"
    reward.write_text(
        "def same(completions, **columns):\n    return [1.0] * len(completions)\n"
        "def silent(completions, **columns):\n    return [None] * len(completions)\n"
        "def needy(completions, gold, **columns):\n    return [1.0] * len(completions)\n"
    )

    def train(name):
        words = [str(run_file), f"rewards=[{{name: {reward}:{name}}}]", f"trainer.output_dir={tmp_path / name}"]
        status = main(["train", *words, "eval_data=null"])
        out, err = capfd.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    status, result, err = train("same")
    assert status == 0 and result["learnt"] is False
    assert result["reason"].startswith("nothing was learnt in 2 steps: every completion got the same reward, 1.")
    assert f"no success: {result['reason']}" in err
    status, result, err = train("silent")
    assert status == 2 and result["learnt"] is False and "adapter" in result
    assert err.splitlines()[-1].startswith("alignlab train: nothing was learnt in 2 steps: no completion got a reward")
    status, result, err = train("needy")
    assert status == 2 and result is None and "'needy' requires gold, and the training data has only answer" in err
    assert main(["check", str(run_file), f"rewards=[{{name: {reward}:needy}}]", "eval_data=null"]) == 2
    assert "'needy' requires gold, and the training data has only answer" in capfd.readouterr().err


def test_check_stops_at_a_reward_that_fails(run_file, tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(completions, **columns):\n    return [1.0]\n")
    assert main(["check", str(run_file), f"rewards=[{{name: '{broken}:broken'}}]"]) == 2
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([""], "PROMPT is empty, and must be a text to complete; write it in quotes"),
        (["  \n"], "PROMPT is empty"),
        (["say " * 5000], "the prompt has 20000 tokens, and must have fewer than the model's"),
        (["say", "--plain", "--system-prompt", "Be brief."], "put the text into --prompt-template instead"),
    ],
)
def test_generate_refuses_a_prompt_in_terms_of_its_flags(words, told, run_file, capsys):
    assert main(["generate", str(run_file.parent / "model"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "RenderSettings" not in error


def test_generate_refuses_bytes_that_are_no_text(capsys):
    assert main(["generate", "no-model-is-loaded", "ab\udce9"]) == 2
    assert "PROMPT must be text, and has bytes that are none" in capsys.readouterr().err


def test_generate_takes_the_beginning_and_the_form_of_the_text(run_file, capsys):
    model = str(run_file.parent / "model")
    words = ["--seed", "3", "--max-new-tokens", "9", "--dtype", "float32"]
    assert main(["generate", model, "say red", *words, "--begin-with", "so: "]) == 0
    assert capsys.readouterr().out.startswith("so: ")
    assert main(["generate", model, "say red", *words, "--regex", "[0-9]{2}-[a-c]"]) == 0
    assert re.fullmatch("[0-9]{2}-[a-c]\n", capsys.readouterr().out)
    assert main(["generate", model, "say red", *words, "--regex", "[0-9"]) == 2
    assert "unclosed character class" in capsys.readouterr().err


def test_generate_searches_beams(run_file, capsys):
    words = ["generate", str(run_file.parent / "model"), "say red", "--max-new-tokens", "4", "--dtype", "float32"]
    assert main([*words, "--beams", "3"]) == 0
    best = capsys.readouterr().out
    assert main([*words, "--beams", "3", "--best", "3", "--length-penalty", "1"]) == 0
    rows = re.findall(r"^ *(-\d+\.\d{3})  ", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 3 and sorted(rows, key=float, reverse=True) == rows and best.endswith("\n")
    for wrong, told in (
        (["--best", "2"], "--best is 2, and needs --beams"),
        (["--beams", "2", "--temperature", "0"], "--temperature is 0.0, and --beams samples nothing"),
        (["--beams", "2", "--ban", "red"], "--ban is ['red'], and --beams samples nothing"),
        (["--beams", "2", "--beam-groups", "2"], "beams.diversity is 0.0, and must be over 0"),
    ):
        assert main([*words, *wrong]) == 2
        assert told in capsys.readouterr().err


def test_generate_streams_the_same_text_for_the_same_seed(run_file, adapter, capsys):
    model = str(run_file.parent / "model")
    words = ["--seed", "3", "--max-new-tokens", "6", "--dtype", "float32"]
    assert main(["generate", model, "say red", *words]) == 0
    first = capsys.readouterr().out
    assert first.endswith("\n")
    assert main(["generate", model, "say red", *words]) == 0
    assert capsys.readouterr().out == first
    for drafts in ("ngram", model):
        assert main(["generate", model, "say red", *words, "--speculate", drafts]) == 0
        assert capsys.readouterr().out == first
    assert main(["generate", model, "--adapter", adapter, "say red", *words]) == 0


def test_eval_counts_on_the_config_s_data(run_file, adapter, capsys):
    arguments = ["eval", "--adapter", adapter, "--config", str(run_file), "--num-samples", "3", "--pass-at", "1", "3"]
    assert main([*arguments, "--show", "1"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["num_problems"] == 3 and result["num_samples"] == 3
    assert 0 <= result["sampled"] == result["pass@1"] <= result["pass@3"] <= 1
    assert "problem: say red" in err and err.count("sampled:") == 3


def test_eval_takes_a_task_in_place_of_a_config(run_file, capsys):
    model = str(run_file.parent / "model")
    words = ["--task", "chain_sum", "--num-problems", "2", "--num-samples", "2", "--max-new-tokens", "3"]
    assert main(["eval", model, *words]) == 0
    assert json.loads(capsys.readouterr().out)["num_problems"] == 2
    assert main(["eval", model, *words, "--set", "a.b=1"]) == 2
    assert main(["eval", "--task", "chain_sum"]) == 2
    assert "give MODEL or --adapter" in capsys.readouterr().err


def test_merged_model_is_the_adapted_one(run_file, adapter, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignlab.cli.policy import load_policy

    trained = tmp_path / "adapter"  # two steps hardly move an adapter: move it far
    adapted, _ = load_policy(str(run_file.parent / "model"), adapter, "float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(trained)

    assert main(["merge", str(trained), str(tmp_path / "merged"), "--model", str(run_file.parent / "model")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    base = load_model(str(run_file.parent / "model"), dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged")(WORDS)["input_ids"]])
    with torch.no_grad():
        expected, got, before = adapted(tokens).logits, merged(tokens).logits, base(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - before).abs().max() > 1e-3
    assert has_manifest(tmp_path / "merged") and find_damage(tmp_path / "merged") is None

    assert main(["merge", str(trained), str(tmp_path / "merged")]) == 2  # it is not empty any more


def test_numbers_that_are_not_finite_are_not_merged(run_file, adapter, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    (broken / MODEL_MANIFEST).unlink()
    model = str(run_file.parent / "model")
    assert main(["merge", str(broken), str(tmp_path / "merged"), "--model", model]) == 2
    assert "finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("*merged*"))


def test_a_student_is_written_with_its_tokenizer(run_file, adapter, tmp_path, capsys):
    teacher, output = str(run_file.parent / "model"), str(tmp_path / "student")
    assert main(["student", teacher, output, "--layers", "0"]) == 0
    assert "layers 0: " in capsys.readouterr().err
    assert has_manifest(Path(output)) and find_damage(Path(output)) is None
    assert main(["generate", output, "say red", "--max-new-tokens", "2"]) == 0
    assert main(["student", teacher, output, "--num-layers", "1"]) == 2
    assert "OUTPUT must be a new or empty folder" in capsys.readouterr().err
    assert main(["student", teacher, str(tmp_path / "other"), "--layers", "1"]) == 2
    assert "layers holds 1, and must hold numbers from 0 to 0" in capsys.readouterr().err
    assert main(["student", adapter, str(tmp_path / "other"), "--layers", "0"]) == 2
    assert "merge it first" in capsys.readouterr().err
    assert main(["check", str(run_file), "model.lora=null", "model.student={num_layers: 1}"]) == 0
    assert "a student of" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["qwen3_next", "kimi_linear", "moa", "mtp"])
def test_a_preset_is_checked_trained_and_used(preset, run_file, tmp_path, capsys):
    """From nothing but a config, through the prediction of memory, the engine and the saved model."""
    model = f"model={{architecture: {{preset: {preset}, hidden_size: 32}}, tokenizer: {run_file.parent / 'model'}}}"
    overrides = [model, "trainer.num_steps=1", f"trainer.output_dir={tmp_path / 'run'}"]
    assert main(["check", str(run_file), *overrides]) == 0
    assert main(["train", str(run_file), *overrides]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])["model"]
    assert main(["generate", trained, "say red", "--max-new-tokens", "3", "--temperature", "0"]) == 0


def test_a_pruned_model_and_a_narrow_student_are_measured_on_rows(run_file, tmp_path, capsys):
    model, rows = str(run_file.parent / "model"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "say red ", "completion": f"red {i}"}) + "\n" for i in range(40)))
    measured = ["--data", str(rows), "--calibration-tokens", "256"]
    half = [str(tmp_path / "half"), "--method", "wanda", "--pattern", "2:4"]
    assert main(["prune", model, *half, *measured]) == 0
    assert "are zero (50.0%)" in capsys.readouterr().err
    assert main(["student", model, str(tmp_path / "narrow"), "--intermediate-size", "8", *measured]) == 0
    assert "8 neurons, " in capsys.readouterr().err
    for made in ("half", "narrow"):
        assert find_damage(tmp_path / made) is None
        assert main(["generate", str(tmp_path / made), "say red", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    other = str(tmp_path / "other")
    for words, message in [
        (["prune", model, other, "--sparsity", "1"], "--sparsity is 1.0, and must be between 0 and 1"),
        (["prune", model, other, "--pattern", "4:4"], "--pattern is 4:4, and must be N:M"),
        (["prune", model, other, "--pattern", "2:4", "--method", "wanda"], "--data is missing"),
        (["prune", model, other, "--sparsity", "0.5", *measured], "--data is not read by magnitude"),
        (["prune", model, other, "--pattern", "2:4", "--method", "wanda", *measured[:2]], "must have 1,024 tokens"),
        (["student", model, other], "a student has less than its teacher"),
        (["student", model, other, "--hidden-size", "8"], "there is no --data"),
        (["student", model, other, "--layers", "0", *measured], "none is cut"),
        (["student", model, other, "--hidden-size", "8", *measured[:3], "9"], "and must be at least 64"),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not Path(other).exists()


def test_a_model_is_quantized_for_serving(run_file, adapter, tmp_path, capsys):
    pytest.importorskip("compressed_tensors")
    model, output = str(run_file.parent / "model"), str(tmp_path / "int8")
    assert main(["quantize", model, output, "--scheme", "int8"]) == 0
    assert "rounding moved the weights by 0." in capsys.readouterr().err
    assert find_damage(Path(output)) is None and (Path(output) / "tokenizer.json").exists()
    assert main(["generate", output, "say red"]) == 2
    assert "quantised" in capsys.readouterr().err
    other = str(tmp_path / "other")
    assert main(["quantize", model, other, "--scheme", "int8", "--group-size", "8"]) == 2
    assert "must be left out for int8" in capsys.readouterr().err
    assert main(["quantize", model, other, "--scheme", "int4", "--group-size", "7"]) == 2
    assert "must divide the inputs" in capsys.readouterr().err
    assert main(["quantize", adapter, other, "--scheme", "fp8"]) == 2
    assert "merge it first" in capsys.readouterr().err


def test_a_mixture_is_made_of_a_dense_model_with_its_tokenizer(run_file, adapter, tmp_path, capsys):
    model, output = str(run_file.parent / "model"), str(tmp_path / "mixture")
    options = ["--experts", "4", "--experts-per-token", "2"]
    assert main(["upcycle", model, output, *options]) == 0
    assert "4 experts, 2 a token: " in capsys.readouterr().err
    assert has_manifest(Path(output)) and find_damage(Path(output)) is None
    assert main(["generate", model, "say red", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", output, "say red", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["upcycle", model, output, *options]) == 2
    assert "OUTPUT must be a new or empty folder" in capsys.readouterr().err
    assert main(["upcycle", adapter, str(tmp_path / "other"), *options]) == 2
    assert "merge it first" in capsys.readouterr().err
    assert main(["upcycle", model, str(tmp_path / "other"), *options, "--slices", "2"]) == 2
    assert "is of method virtual_groups" in capsys.readouterr().err


def test_a_teacher_s_samples_are_data_for_fine_tuning(run_file, tmp_path, capsys):
    model, output = str(run_file.parent / "model"), tmp_path / "samples.jsonl"
    words = ["sample", model, "--config", str(run_file), "--output", str(output), "--num-samples", "500"]
    assert main([*words, "--num-prompts", "3", "--max-new-tokens", "8", "--min-reward", "0"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["prompts"] == 3 and result["completions"] == 1500  # few of a new model's are text that ends
    kept = len(output.read_text(encoding="utf-8").splitlines())
    assert result["kept"] == kept > 0 and result["kept_frac"] == round(kept / 1500, 4)
    assert f"fine-tune on it: data.path={output}" in err
    overrides = ["trainer={type: sft, num_steps: 1, trackers: []}", f"trainer.output_dir={tmp_path / 'sft'}"]
    bare = ["rewards=[]", "eval_data=null", "evaluation={}"]
    assert main(["train", str(run_file), f"data.path={output}", *bare, *overrides]) == 0
    assert main([*words[:4], "--output", str(tmp_path / "samples.txt")]) == 2
    assert "must end in .jsonl" in capsys.readouterr().err
    assert main([*words, "--set", "rewards=[]", "--set", "trainer={type: sft}", "--keep", "best"]) == 2
    assert main([*words[:-2], "--output", str(tmp_path / "x.jsonl"), "--temperature", "0"]) == 2
    assert "must be 1 at temperature 0" in capsys.readouterr().err
    for number in ("0", "-1"):
        assert main([*words[:4], "--output", str(tmp_path / "y.jsonl"), "--num-prompts", number]) == 2
        assert f"--num-prompts is {number}, and must be at least 1" in capsys.readouterr().err


def test_check_looks_at_a_teacher(run_file, tmp_path, capsys):
    from alignlab.data.tokenizer_training import train_tokenizer

    def check(teacher, **options):
        trainer = {"type": "on_policy_distill", "teacher": {"name": str(teacher)}, "output_dir": str(tmp_path / "run")}
        return main(["check", str(run_file), f"trainer={json.dumps(trainer | options)}"])

    assert check(run_file.parent / "model") == 0
    out = capsys.readouterr().out
    assert "judges by tokens" in out and "on_policy_distill = reverse KL to" in out
    tokenizer = train_tokenizer(["other words"] * 9, vocab_size=262)
    tokenizer.save_pretrained(tmp_path / "other")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_model(new_model(shape, vocab_size=len(tokenizer)), tmp_path / "other")
    assert check(tmp_path / "other") == 2
    assert "must have the student's tokenizer" in capsys.readouterr().err
    assert check(tmp_path / "other", alignment="text") == 0
    assert "judges by text" in capsys.readouterr().out
    for kind in ("gkd", "distill"):
        trainer = {"type": kind, "teacher": {"name": str(tmp_path / "other")}, "output_dir": str(tmp_path / kind)}
        bare = ["rewards=[]", "eval_data=null", "evaluation={}"]
        assert main(["check", str(run_file), *bare, f"trainer={json.dumps(trainer)}"]) == 2
        assert "must have the student's tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_problems_without_room_are_refused_or_skipped(command, run_file, tmp_path, capsys, caplog):
    rows = [{"prompt": "say red", "answer": "red"}, {"prompt": "say blue " * 30, "answer": "blue"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = "data" if command == "sample" else "eval_data"
    data = {"path": str(tmp_path / "rows.jsonl")}
    words = [command, str(run_file.parent / "model"), "--config", str(run_file), "--max-new-tokens", "8"]
    words += ["--output", str(tmp_path / "out.jsonl")] if command == "sample" else []
    words += ["--set", "trainer.rollout={cache_tokens: 64}", "--set"]
    assert main([*words, f"{section}={json.dumps(data)}"]) == 2
    assert "must fit rollout.cache_tokens (64)" in capsys.readouterr().err
    main([*words, f"{section}={json.dumps(data | {'on_bad_row': 'skip'})}"])  # of a random model nothing may be kept
    assert "skipped 1 of 2" in caplog.text and "must fit" not in capsys.readouterr().err


def test_sample_takes_the_last_stage_s_sampling():
    import argparse

    from alignlab.cli.sample import add_arguments, settings_of
    from alignlab.config.loader import load_config

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["teacher", "--config", "configs/rlaif_smollm2_cpu.yaml", "--output", "x.jsonl"])
    assert settings_of(load_config(args.config, []), args).sampling.max_new_tokens == 24


def test_an_adapter_s_own_tokenizer_renders_its_prompts(run_file, adapter, tmp_path):
    """The one it was trained with, and not its base's, whether or not the base is named."""
    import shutil

    from alignlab.cli.policy import load_policy
    from alignlab.models.hub.checkpoints import load_tokenizer

    base, own = str(run_file.parent / "model"), tmp_path / "own"
    shutil.copytree(adapter, own)
    tokenizer = load_tokenizer(str(own))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(own)
    assert load_policy(base, str(own))[1].chat_template == tokenizer.chat_template
    assert main(["merge", str(own), str(tmp_path / "merged"), "--model", base]) == 0
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == tokenizer.chat_template
    assert load_policy(base, adapter)[1].chat_template is None


def test_merge_refuses_what_is_no_adapter(run_file, tmp_path, capsys):
    assert main(["merge", str(run_file.parent / "model"), str(tmp_path / "merged")]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_help_ends_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command.NAME, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith(f"Example: {command.EXAMPLE}")
    import shlex

    program, *words = shlex.split(command.EXAMPLE)
    assert program == "alignlab" and parse(words).name == command.NAME


def test_examples_name_configs_that_exist():
    named = {word for command in COMMANDS for word in command.EXAMPLE.split() if word.endswith(".yaml")}
    assert {Path(word).name for word in named} <= {path.name for path in SHIPPED}


def test_an_error_with_a_name_is_one_message_and_status_2(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("alignlab train: nowhere.yaml must be") and "Traceback" not in err


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ConfigError):
        main(["train", "nowhere.yaml", "--debug"])


def test_ctrl_c_ends_with_status_130(run_file, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(alignlab.run_from_config, "run", interrupted)
    assert main(["train", str(run_file)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_overrides_may_follow_options():
    args = parse(["train", "a.yaml", "x=1", "--resume", "y=2"])
    assert args.overrides == ["x=1", "y=2"] and args.resume


@pytest.mark.parametrize("words", [["train"], ["train", "a.yaml", "--resum3"], ["nothing"], ["merge", "a"]])
def test_wrong_usage_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_threads_spin_for_a_bounded_time_unless_the_user_chose(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    main(["train", "nowhere.yaml"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    main(["train", "nowhere.yaml"])
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_module_runs_as_the_command(run_file):
    command = [sys.executable, "-m", "alignlab", "check", str(run_file), "trainer.group_size=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.endswith("trainer.group_size is 1, and must be at least 2; use 2 or more\n")


def test_an_unwritable_place_is_named(run_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", str(run_file), f"trainer.output_dir={tmp_path / 'file' / 'run'}"]) == 2
    assert "is no folder; choose another trainer.output_dir" in capsys.readouterr().err


def test_resuming_where_there_is_no_run(run_file, tmp_path, capsys):
    warm = "warm_start={trainer: {num_steps: 1}}"
    assert main(["train", str(run_file), "--resume", f"trainer.output_dir={tmp_path / 'typo'}", warm]) == 2
    assert "holds none" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_setting_in_the_place_of_a_model_is_named(run_file, capsys):
    assert main(["eval", "trainer.seed=1", "--config", str(run_file)]) == 2
    assert "write --set trainer.seed=1" in capsys.readouterr().err


def test_eval_refuses_a_scorer_that_nothing_satisfies(run_file, capsys):
    model = str(run_file.parent / "model")
    assert main(["eval", model, "--task", "spell_backward", "--num-problems", "2"]) == 2
    assert "gives 0.0 to the row's own answer" in capsys.readouterr().err
    words = ["--num-problems", "2", "--num-samples", "1", "--max-new-tokens", "2"]
    assert main(["eval", model, "--task", "spell_backward", "--extract", "whole", *words]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.trackers=[nonsense]", "trainer.trackers holds 'nonsense'"),
        ("warm_start={answer_column: nope}", "no column 'nope'"),
        ("trainer.sampling.max_new_tokens=2", None),
    ],
)
def test_check_refuses_what_train_would(run_file, change, message, capsys):
    assert main(["check", str(run_file), change]) == (2 if message else 0)
    if message:
        assert message in capsys.readouterr().err


def test_check_says_where_a_row_s_own_answer_is_not_right(run_file, capsys):
    data = "data={task: spell_backward, size: 20}"
    changes = [data, "rewards=[{name: reasoning_gym_answer}]", "eval_data=null"]
    assert main(["check", str(run_file), *changes]) == 0
    assert "gives 0.0 to the row's own answer" in capsys.readouterr().out


def test_an_adapter_of_another_model_is_refused(run_file, adapter, tmp_path, capsys):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_model(new_model(shape, vocab_size=300), tmp_path)
    assert main(["generate", str(tmp_path), "hi", "--adapter", str(adapter), "--plain"]) == 2
    assert "does not fit" in capsys.readouterr().err


def compared(capsys) -> tuple[dict, str]:
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_eval_compares_models_side_by_side(run_file, adapter, tmp_path, capsys):
    base, run, plot = str(run_file.parent / "model"), str(run_file.parent / "run"), tmp_path / "plot.png"
    words = ["--config", str(run_file), "--num-samples", "3", "--pass-at", "1", "3", "--plot", str(plot)]
    assert main(["eval", f"base={base}", run, *words, "--show", "2", f"again={base}"]) == 0
    result, err = compared(capsys)
    first, second, third = result["models"]
    assert [entry["name"] for entry in result["models"]] == ["base", run, "again"]
    assert (first["model"], second["model"]) == (base, adapter) and f"{run}: {adapter}" in err
    assert (result["num_problems"], result["num_samples"], result["complete"]) == (3, 3, True)
    assert result["dtype"] == "bfloat16", "the adapter's, so that all compute alike"
    assert first["difference"] is None and first["greedy"] == third["greedy"] and first["sampled"] == third["sampled"]
    assert third["difference"]["greedy"]["value"] == 0 and second["num_parameters"] > first["num_parameters"]
    assert 0 < first["greedy_tokens"] <= 4 and {"pass@1", "pass@3", "tokens_per_s", "strict_greedy"} <= set(first)
    assert "3 problems, 3 samples each" in err and "some models answer right" in err and plot.exists()


def test_eval_of_one_model_is_as_with_its_adapter_named(run_file, adapter, capsys):
    words = ["--config", str(run_file), "--num-samples", "2", "--pass-at", "1"]
    assert main(["eval", "--adapter", adapter, *words]) == 0
    alone, _ = compared(capsys)
    assert main(["eval", str(run_file.parent / "run"), *words]) == 0
    assert compared(capsys)[0] == alone
    assert main(["eval", f"mine={adapter}", *words]) == 0
    assert compared(capsys)[0] == alone | {"name": "mine"}


def test_eval_names_a_model_that_is_not_there_before_any_is_loaded(run_file, tmp_path, monkeypatch, capsys):
    base = str(run_file.parent / "model")
    monkeypatch.setattr("alignlab.cli.evaluate.load_policy", lambda *words: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    for wrong, message in ((str(tmp_path / "none"), "is no folder"), (str(tmp_path / "empty"), "hold safetensors")):
        assert main(["eval", base, f"b={wrong}", "--config", str(run_file)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "MODEL b: " in err and wrong in err and message in err and "nothing was evaluated" in err


def test_eval_names_the_model_that_its_engine_failed_with(run_file, monkeypatch, capsys):
    def fail(*args, **options):
        raise RolloutError("the model's logits must be finite")

    monkeypatch.setattr("alignlab.evaluation.evaluate.evaluate", fail)
    model = str(run_file.parent / "model")
    for words, name in (([model], model), (["a=" + model, "b=" + model], "a")):
        assert main(["eval", *words, "--config", str(run_file)]) == 2
        assert f"MODEL {name}: the model's logits must be finite" in capsys.readouterr().err


def test_eval_keeps_what_is_measured_when_it_is_interrupted(run_file, monkeypatch, capsys):
    from alignlab.cli import evaluate

    base, load, loaded = str(run_file.parent / "model"), evaluate.load_policy, []

    def interrupted(*words):
        loaded.append(words)
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return load(*words)

    monkeypatch.setattr(evaluate, "load_policy", interrupted)
    assert main(["eval", f"a={base}", f"b={base}", f"c={base}", "--config", str(run_file), "--show", "1"]) == 130
    result, err = compared(capsys)
    assert [entry["name"] for entry in result["models"]] == ["a", "b"] and result["complete"] is False
    assert "interrupted" in err and "Traceback" not in err
    loaded[:] = [None] * 2
    assert main(["eval", f"a={base}", f"b={base}", "--config", str(run_file)]) == 130
    assert capsys.readouterr().out == ""


def test_each_model_is_given_the_same_problems_by_its_own_tokenizer(run_file, tmp_path, capsys):
    import shutil

    from alignlab.cli.candidates import candidates_of
    from alignlab.cli.evaluate import plan_of_config, same_problems
    from alignlab.config.loader import load_config
    from alignlab.models.hub.checkpoints import load_tokenizer
    from alignlab.scoring.loading import load_reward

    base, chatty = run_file.parent / "model", tmp_path / "chatty"
    shutil.copytree(base, chatty)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = "{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}"
    tokenizer.save_pretrained(chatty)
    lengths = [len(tokenizer(f"<<say {word}>>")["input_ids"]) for word in WORDS.split()]
    room = sorted(lengths)[-2]  # the longest problem is too long under the template alone
    assert lengths.count(max(lengths)) == 1 and room > max(lengths) - 2
    words = ["eval", "--config", str(run_file), "--num-problems", "4"]
    changes = ["eval_data.size=6", f"eval_data.max_prompt_tokens={room}", "eval_data.on_bad_row=skip"]
    plan = plan_of_config(load_config(str(run_file), changes), parse(words))
    both = candidates_of([f"plain={base}", f"chatty={chatty}"], None, None)
    plain, chat = same_problems(plan, both, load_reward(plan.scorer))
    assert [p.index for p in plain] == [p.index for p in chat] and len(plain) == 4
    assert all(tokenizer.decode(p.token_ids) == f"<<{p.text}>>" for p in chat)
    assert all(tokenizer.decode(p.token_ids) == p.text for p in plain)
    assert "not every model can be given them: 1" in capsys.readouterr().err


def test_eval_keeps_what_is_measured_when_a_later_model_is_damaged(run_file, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    base, damaged = run_file.parent / "model", tmp_path / "damaged"
    shutil.copytree(base, damaged)
    file = damaged / "model.safetensors"
    tensors = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})  # the names and shapes fit: generating shows the damage
    assert main(["eval", f"a={base}", f"b={damaged}", "--config", str(run_file)]) == 2
    result, err = compared(capsys)
    assert "the model's logits must be finite" in err
    assert [entry["name"] for entry in result["models"]] == ["a"] and result["complete"] is False


def test_eval_says_where_problems_come_from_for_a_config_without_any(run_file, tmp_path, capsys):
    config = json.loads(run_file.read_text()) | {"trainer": {"type": "sft"}}
    del config["eval_data"], config["rewards"], config["evaluation"]
    (tmp_path / "sft.yaml").write_text(json.dumps(config))
    assert main(["eval", "--config", str(tmp_path / "sft.yaml")]) == 2
    assert "has no evaluation data; set eval_data" in capsys.readouterr().err


def test_eval_says_what_to_do_with_preferences(capsys):
    config = next(path for path in SHIPPED if path.name == "dpo_smollm2_cpu.yaml")
    assert main(["eval", "--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert "of trainer dpo" in told and "report.json" in told and "--task products" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "a.png"], "--plot draws several models"),
        (["a", "b", "--plot", "a.pdf"], "must be a .png file"),
        (["a", "b", "--plot", "nowhere/a.png"], "in a folder that exists"),
    ],
)
def test_eval_refuses_a_plot_that_cannot_be(run_file, words, message, capsys):
    assert main(["eval", *words, "--config", str(run_file)]) == 2
    assert message in capsys.readouterr().err


def test_check_notes_a_combination_that_is_hardly_meant(run_file, capsys):
    assert main(["check", str(run_file), "trainer.recipe=gspo", "trainer.reduction=token_mean"]) == 0
    assert "note       reduction is token_mean with surrogate gspo_clip" in capsys.readouterr().out


def test_a_model_of_a_preset_is_written_with_a_tokenizer(run_file, tmp_path, capsys):
    tokenizer, output = str(run_file.parent / "model"), str(tmp_path / "new")
    options = [output, "--tokenizer", tokenizer, "hidden_size=16", "num_hidden_layers=2"]
    assert main(["new", "kda", *options, "preset=mla"]) == 2
    assert "preset=mla is given, and the preset is named by PRESET; leave it out" in capsys.readouterr().err
    assert main(["new", "kda", *options]) == 0
    assert has_manifest(Path(output)) and find_damage(Path(output)) is None
    assert main(["generate", output, "say red", "--max-new-tokens", "2"]) == 0


def test_a_list_of_presets_takes_fields_and_no_preset(capsys):
    assert main(["new", "--list", "hidden_size=48", "n_group=3"]) == 0
    shown = capsys.readouterr()
    assert "arXiv:2510.26692" not in shown.out and "kda: n_group is 3, but no layer is sparse" in shown.err
    assert main(["new", "kda", "--list"]) == 2
    assert "kda is given with --list, which shows all presets" in capsys.readouterr().err
    for option, value in (("--tokenizer", "smollm2"), ("--seed", "0"), ("--dtype", "bfloat16")):
        assert main(["new", "--list", option, value]) == 2
        assert f"{option} is {value}, and --list makes no model that has one; leave it out" in capsys.readouterr().err
    assert main(["new", "--list", "preset=kda"]) == 2
    assert main(["new", "--list", "vocab_size=many"]) == 2
    assert "vocab_size is 'many', and must be a whole number of at least 1" in capsys.readouterr().err
