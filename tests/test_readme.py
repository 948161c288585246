"""What the README says is true: its code runs, its commands parse, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from alignlab.cli import main, parse
from alignlab.config.recipes import RECIPES
from alignlab.config.rewards import RewardSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.checkpoints import new_model, save_model
from alignlab.training.reward_functions import load_reward

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_trainer_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["Why is the sky blue? Who wrote Faust?"] * 20, vocab_size=300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_model(new_model(shape, vocab_size=len(tokenizer), **ends), tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    [code] = [block for block in blocks("python") if "GRPOTrainer" in block]
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 12
    for theirs, small in (("smollm2-135m-instruct", str(tmp_path / "tiny")), ("num_steps=20", "num_steps=2")):
        assert theirs in code
        code = code.replace(theirs, small)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "brief" / "adapter" / "adapter_config.json").is_file()
    assert capsys.readouterr().out.rstrip().endswith("adapter")


def test_reward_example_is_found_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = [block for block in blocks("python") if block.startswith("# my_rewards.py")]
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    reward = load_reward(RewardSettings(name="my_rewards.py:ends_with_answer", options={"bonus": 0.5}))
    values = reward.function(completions=["It is 5.", "6"], answer=["5", "5"], prompts=["", ""], **reward.options)
    assert values == [0.5, 0.0]


def test_every_command_parses():
    code = "".join(blocks("bash")).replace("\\\n", " ")
    lines = [line for line in code.splitlines() if line.startswith("alignlab ")]
    assert {parse(shlex.split(line, comments=True)[1:]).name for line in lines} == {
        "check", "train", "eval", "generate", "merge", "judge"
    }  # fmt: skip


def test_the_error_that_is_shown_is_the_error(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    [block] = [block for block in blocks("") if block.startswith("$ alignlab")]
    command, expected = block.removeprefix("$ ").split("\n", 1)
    assert main(shlex.split(command)[1:]) == 2
    assert capsys.readouterr().err == expected


def test_every_script_and_config_that_is_named_exists():
    named = set(re.findall(r"\b(?:launch|configs)/[\w.]+\.(?:sh|sbatch|yaml|py)", README))
    assert {f"launch/{path.name}" for path in (ROOT / "launch").iterdir()} <= named
    assert all((ROOT / name).is_file() for name in named)


def test_the_tree_is_the_tree():
    [tree] = [block for block in blocks("") if block.startswith("pyproject.toml")]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    there = {path.stem if path.is_dir() else path.name for path in (ROOT / "alignlab").iterdir()}
    assert listed == there - {"__pycache__", "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_table_is_right(recipe):
    [row] = re.findall(rf"^\| `{recipe}` \|(.*)$", README, flags=re.MULTILINE)
    advantage, surrogate, reduction, _, *_ = (cell.strip() for cell in row.split("|"))
    config = GRPOConfig(recipe=recipe)
    assert (advantage, surrogate.split(",")[0], reduction) == (config.advantage, config.surrogate, config.reduction)
