"""`alignlab judge`: measurements of a judge, and the questions with correct answers that train one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignlab.cli import judge as command
from alignlab.cli import main
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model, save_model
from alignlab.synthesis.judge_examples import KnownPair
from tests.scoring.judges.conftest import CONSTITUTION, RuledModel
from tests.scoring.judges.conftest import make_judge as make_judge
from tests.scoring.judges.test_local import SHAPE, TEMPLATE

Make = Callable[..., Any]
PAIRS = [
    {"prompt": "q", "chosen": "ab", "rejected": "c"},
    {"prompt": "r", "chosen": [{"role": "assistant", "content": "d"}], "rejected": "efg"},
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run on a tiny model that chats; beside it, pairs."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["which is better 1 2"], vocab_size=262)
    tokenizer.chat_template = TEMPLATE
    model = new_model(SHAPE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    save_model(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "constitution.yaml").write_text(yaml.safe_dump(CONSTITUTION.model_dump(mode="json")))
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    told = {
        "model": {"name": str(tmp_path / "model"), "lora": {"rank": 2}},
        "data": {"task": "products", "task_options": {"max_terms": 2, "max_digits": 1}, "size": 20, "eval_frac": 0.5},
        "trainer": {
            "type": "rlaif", "path": "direct", "output_dir": str(tmp_path / "run"),
            "constitution": str(tmp_path / "constitution.yaml"), "judge": {"max_rating": 3},
            "policy": {"type": "grpo", "num_steps": 1, "num_prompts": 2, "group_size": 2},
        },
        "evaluation": {"scorer": "reasoning_gym_answer"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(told))
    return str(tmp_path / "run.yaml")


def written(config: str, *options: str) -> list[tuple[str, str]]:
    """(question, right answer) of each example."""
    path = Path(config).parent / "examples.jsonl"
    path.unlink(missing_ok=True)
    assert main(["judge", config, "--write-examples", str(path), *options]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(len(row["prompt"]) == 1 and row["prompt"][0]["role"] == "user" for row in rows)
    return [(row["prompt"][0]["content"], row["completion"]) for row in rows]


def test_examples_of_pairs_are_asked_in_both_orders_by_each_principle(config: str) -> None:
    pairs = ["--pairs", str(Path(config).parent / "pairs.jsonl")]
    asked = written(config, *pairs, "--kind", "comparisons", "--num-pairs", "1")
    shown = [("Answer 1: ab\n\nAnswer 2: c", "1"), ("Answer 1: c\n\nAnswer 2: ab", "2")]
    assert asked == [
        (f"Question: q\n\n{answers}\n\nWhich is more {name}? Reply with 1 or 2 only.", choice)
        for name in ("long", "odd", "calm")
        for answers, choice in shown
    ]
    rated = written(config, *pairs, "--kind", "ratings")
    scale = "Rate it from 1 to 3, where 3 is best. Reply with the number only."
    assert rated[:2] == [(f"Question: q\n\nAnswer: {a}\n\nHow long? {scale}", r) for a, r in (("ab", "3"), ("c", "1"))]
    assert len(rated) == 2 * 3 * 2 and "Answer: d\n\n" in rated[6][0]
    assert written(config, *pairs) == written(config, *pairs, "--kind", "comparisons") + rated


def test_examples_for_a_judge_that_writes_first_have_what_it_is_to_write(config: str) -> None:
    sampled = "trainer.judge={answers: sampled, max_rating: 3}"
    plain = written(config, sampled, "--pairs", str(Path(config).parent / "pairs.jsonl"))
    assert all("step by step" in question and answer in "123" for question, answer in plain)
    asked = written(
        config, sampled, "--kind", "ratings", "--num-wrong", "2", "--answer-template", "<{answer}>",
        "--answer-template", "{answer}!", "--reason", "It is {answer}.",
    )  # fmt: skip
    right = {}
    for question, answer in asked:
        if answer.endswith("\n3"):
            product = question.split("multiplication: ")[1].split(".")[0]
            one, other = map(int, product.split(" * "))
            assert answer == f"It is {one * other}.\n3"
            assert f"\n\nAnswer: <{one * other}>\n\n" in question or f"\n\nAnswer: {one * other}!\n\n" in question
            right[product] = answer
        else:
            assert answer.endswith("\n1") and "step by step" in question
    assert len(asked) == len(right) * 2 * 2 * 2 * 3, "wrong answers, templates, right and wrong, principles"


def test_held_out_questions_are_others(config: str) -> None:
    def questions(*options: str) -> set[str]:
        return {question.split("\n\n")[0] for question, _ in written(config, "--kind", "ratings", *options)}

    assert questions() and questions("--held-out") and not questions() & questions("--held-out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trainer.type=grpo", "trainer.path=null"], "must be rlaif|is not a setting"),
        (["--num-pairs", "0"], "--num-pairs is 0, and must be at least 1"),
        (["--answer-template", "no"], "must contain {answer}"),
        (["--write-examples", "x", "--reason", "It is {answer}."], "set trainer.judge.answers=sampled"),
        (["trainer.judge.answers=sampled", "--reason", "It is {answer}."], "goes with --write-examples"),
        (["trainer.judge.answers=sampled", "--write-examples", "x", "--reason", "So."], "must contain {answer}"),
        (["trainer.judge={backend: reward_model, name: x}", "--write-examples", "x"], "which is asked no question"),
        (["--pairs", "p", "--held-out"], "--held-out is about the questions of a task, and --pairs names other pairs"),
        (["--pairs", "p", "--num-wrong", "2"], "--num-wrong is about the questions of a task"),
        (["--pairs", "p", "--answer-template", "{answer}"], "--answer-template is about the questions of a task"),
        (["--kind", "ratings"], "--kind is ratings, and goes with --write-examples"),
        (["data={path: rows.jsonl}"], "without pairs to judge; give --pairs FILE"),
    ],
)
def test_wrong_uses_are_named(
    options: list[str], message: str, config: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["judge", config, *options]) == 2
    told = capsys.readouterr().err
    assert any(part in told for part in message.split("|")), told
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"name": "nowhere/judge"}, "nowhere/judge"),
        ({"votes": 4}, "judge.votes is 4, and must be at most the 3 principles of test"),
        ({"backend": "reward_model", "name": "nowhere"}, "must be a local folder of a reward model"),
        ({"backend": "endpoint", "model": "m", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
    ],
)
def test_check_looks_at_the_judge(judge: dict[str, Any], message: str, config: str, capsys: Any) -> None:
    assert main(["check", config]) == 0
    assert "test: long, odd, calm" in capsys.readouterr().out
    assert main(["check", config, f"trainer.judge={json.dumps(judge)}"]) == 2
    assert message in capsys.readouterr().err


def test_pairs_without_a_column_are_named(config: str, capsys: Any) -> None:
    path = Path(config).parent / "few.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps({"prompt": "q", "chosen": "a"}) + "\n")
    assert main(["judge", config, "--pairs", str(path)]) == 2
    assert "row 1 (the first is 0) has no column 'rejected'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": 5, "rejected": "a"}, "has int in the column 'chosen'"),
        ({"prompt": "q", "chosen": "a", "rejected": {"x": 1}}, "has dict in the column 'rejected'"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "has int in the column 'prompt'"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, "in the column 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "  "}, "has an empty string in the column 'rejected'"),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "in the column 'chosen'"),
    ],
)
def test_pairs_that_are_no_texts_are_named(row: dict[str, Any], message: str, config: str, capsys: Any) -> None:
    path = Path(config).parent / "odd.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert main(["judge", config, "--pairs", str(path)]) == 2
    told = capsys.readouterr().err
    assert "row 0 (the first is 0) has" in told and message in told


def test_pairs_without_a_row_are_refused(config: str, capsys: Any) -> None:
    path = Path(config).parent / "none.jsonl"
    path.touch()
    assert main(["judge", config, "--pairs", str(path)]) == 2
    assert "must have a pair to judge, and has no row" in capsys.readouterr().err


def test_what_is_measured(make_judge: Make) -> None:
    """The rule prefers what is longer, 2 to 1 and 1 to 3, and what stands first by ln 2."""
    model = RuledModel(bias=0.6931471805599453)
    pairs = [KnownPair("q", "ab", "c"), KnownPair("r", "d", "efg"), KnownPair("s", "mute", "x")]
    told = command.measure(make_judge(model), pairs)
    # In both orders: 4/5 and 2/4 (as 1 - 1/2) of the first pair, 2/5 and 1/7 (as 1 - 6/7) of the second.
    first, second = (4 / 5 + 1 / 2) / 2, (2 / 5 + 1 / 7) / 2
    assert told["num_pairs"] == 3 and told["accuracy"] == 0.5 and told["rating_accuracy"] == 0.5
    assert told["confidence"] == pytest.approx((first + 1 - second) / 2)
    # Shown first it is preferred, a tie, and not; the other way round of the second pair as well.
    assert told["first_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4) and told["agreement"] == 0.5


@pytest.mark.parametrize(("leads", "rate"), [([], None), ([1.0, -1.0, 0.0, 2.0], 0.625)])
def test_a_tie_is_a_guess(leads: list[float], rate: float | None) -> None:
    assert command.right_rate(leads) == rate


def test_a_real_model_is_asked(config: str, capsys: Any) -> None:
    assert main(["judge", config, "--pairs", str(Path(config).parent / "pairs.jsonl")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_pairs"] == 2 and told["asked"] == told["answered"] == 2 * 2 + 2 * 2
    assert 0.5 <= told["confidence"] <= 1 and told["accuracy"] in (0, 0.5, 1)
    assert main(["judge", config, "--pairs", str(Path(config).parent / "pairs.jsonl")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cached"] == 8 and "asked" not in again and again["accuracy"] == told["accuracy"]
