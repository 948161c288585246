"""A teacher's samples as supervised examples: what is kept, that it goes on exactly, that the tokens are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.config.rewards import RewardLimits
from alignlab.config.rollout import SamplingSettings
from alignlab.data.examples import examples_from_rows, load_examples
from alignlab.data.prompts import PromptRenderer, prompts_from_rows
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError, DataError, RewardError
from alignlab.scoring.loading import load_reward
from alignlab.scoring.runner import RewardRunner
from alignlab.synthesis.sample_selection import select
from alignlab.synthesis.teacher_samples import SampleSettings, sample_teacher
from alignlab.types import Completion, Prompt, Rollout, SamplingParams

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(5)]


class Parrot:
    """Says the prompt's number, another one, the number again, and something unfinished."""

    policy_version = 0

    def __init__(self, tokenizer: Any, fail_at: int | None = None) -> None:
        self.tokenizer, self.fail_at = tokenizer, fail_at
        self.calls: list[tuple[list[int], int | None]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(([prompt.index for prompt in prompts], sampling.seed))
        return [Rollout(p, tuple(self._say(p, i) for i in range(sampling.n))) for p in prompts]

    def _say(self, prompt: Prompt, i: int) -> Completion:
        answer = str(prompt.columns["answer"])
        text = [answer, f"{answer}0", answer, answer][i]
        ids = tuple(self.tokenizer(text)["input_ids"])
        return Completion.of(ids, text, finish_reason="length" if i == 3 else "stop")

    def update_weights(self, policy_version: int) -> None:
        raise AssertionError

    def metrics(self) -> dict[str, float]:
        return {}


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text == told) for text, told in zip(texts, answer, strict=True)]


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(["say 0 1 2 3 4"], vocab_size=262)


@pytest.fixture
def draw(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(engine: Any = None, reward: Any = right, rows: Any = ROWS, limits: Any = None, **changes: Any) -> Any:
        data = RenderSettings(**changes.pop("data", {}))
        functions = [] if reward is None else [load_reward(reward)]
        options: dict[str, Any] = {"num_samples": 4, "min_reward": 1.0, "prompts_at_once": 2} | changes
        return sample_teacher(
            engine or Parrot(tokenizer), prompts_from_rows(rows, data, tokenizer),
            RewardRunner(functions, limits or RewardLimits()), PromptRenderer(data, tokenizer), tmp_path / "out.jsonl",
            SampleSettings(SamplingSettings(), **options), identity={"model": "parrot"},
        )

    return make


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_right_completions_are_kept_once(draw: Any, tmp_path: Path) -> None:
    counts = draw()
    assert rows_of(tmp_path / "out.jsonl") == [
        {"prompt": f"say {i}", "completion": str(i), "reward": 1.0, "row": i} for i in range(5)
    ]
    assert counts == {
        "prompts": 5, "completions": 20, "kept": 5, "truncated": 5, "below_min_reward": 5, "duplicate": 5,
        "prompts_without": 0, "rendered_otherwise": 0, "reward_failures": 0, "empty": 0, "no_reward": 0, "not_best": 0,
    }
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_without_rewards_all_distinct_completions_are_kept(draw: Any, tmp_path: Path) -> None:
    counts = draw(reward=None, min_reward=None)
    assert counts["kept"] == 10 and rows_of(tmp_path / "out.jsonl")[0]["reward"] is None


def test_prompts_without_a_kept_completion_are_counted(draw: Any, tmp_path: Path) -> None:
    rows = [{**row, "answer": "x" if i < 2 else row["answer"]} for i, row in enumerate(ROWS)]

    def strict(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [None if told == "x" else float(text == told) for text, told in zip(completions, answer, strict=True)]

    counts = draw(reward=strict, rows=rows)
    assert counts["prompts_without"] == 2 and counts["kept"] == 3
    assert counts["no_reward"] == 6 and counts["reward_failures"] == 0  # it applied to none of the first chunk


def test_an_interrupted_sampling_resumes_with_the_same_result(draw: Any, tokenizer: Any, tmp_path: Path) -> None:
    whole = Parrot(tokenizer)
    expected_counts = draw(whole)
    expected = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    first = Parrot(tokenizer, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        draw(first)
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"rows": [{"prompt": "half a li')  # as a crash leaves it
    second = Parrot(tokenizer)
    assert draw(second) == expected_counts
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert first.calls + second.calls == whole.calls and len(second.calls) == 1


def test_each_chunk_has_a_different_seed(draw: Any, tokenizer: Any) -> None:
    engine = Parrot(tokenizer)
    draw(engine)
    assert len({seed for _, seed in engine.calls}) == len(engine.calls) == 3


def test_a_partial_file_of_other_settings_is_refused(draw: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(Parrot(tokenizer, fail_at=1))
    with pytest.raises(ConfigError, match="was begun with another model, other data or other settings"):
        draw(min_reward=0.5)
    draw()
    with pytest.raises(ConfigError, match="exists, and is not overwritten"):
        draw()
    assert len(rows_of(tmp_path / "out.jsonl")) == 5


@pytest.mark.parametrize("changed", [{"prompt": "say 44"}, {"answer": "9"}])
def test_a_partial_file_of_other_data_is_refused(changed: Any, draw: Any, tokenizer: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(Parrot(tokenizer, fail_at=1))
    with pytest.raises(ConfigError, match="other data"):
        draw(rows=[*ROWS[:-1], ROWS[-1] | changed])


@pytest.mark.parametrize("kind", ["special token", "half a character", "text of other tokens"])
def test_a_completion_whose_text_does_not_hold_all_its_tokens_is_not_kept(kind: str, draw: Any, tokenizer: Any) -> None:
    class Odd(Parrot):
        def _say(self, prompt: Prompt, i: int) -> Completion:
            said = super()._say(prompt, i)
            ids, text = said.token_ids, said.text
            if prompt.index == 0 and kind == "special token":
                ids = (tokenizer.eos_token_id, *ids)
            elif prompt.index == 0 and kind == "half a character":
                ids = (*ids, tokenizer("é")["input_ids"][0])
                text = tokenizer.decode(ids)
            elif prompt.index == 0:
                ids = tuple(tokenizer("x")["input_ids"])
            return replace(said, token_ids=ids, text=text, logprobs=(0.0,) * len(ids), routing=None)

    counts = draw(Odd(tokenizer), reward=None, min_reward=None)
    assert counts["kept"] == 8 and counts["rendered_otherwise"] == 2


def test_a_file_that_another_process_writes_is_refused(draw: Any, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "out.jsonl.partial").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing"):
            draw()


def test_no_kept_completion_is_an_error_with_the_reasons(draw: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 20 completions was kept.*truncated 5, below_min_reward 15"):
        draw(min_reward=2.0)
    assert list(tmp_path.iterdir()) == []


def test_failing_rewards_stop_the_sampling_at_their_limit(draw: Any) -> None:
    def broken(**_: Any) -> list[float]:
        raise RuntimeError("service is down")

    with pytest.raises(RewardError, match="service is down"):
        draw(reward=broken, limits=RewardLimits(max_failures=1))


@pytest.mark.parametrize("data", [{}, {"system_prompt": "Be brief."}, {"prompt_template": "Q: {prompt}"}], ids=str)
def test_fine_tuning_reads_the_prompt_that_the_teacher_saw(
    data: dict[str, str], draw: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """A chat with its system prompt, read again without any setting but the path."""
    tokenizer.chat_template = TEMPLATE
    draw(data=data)
    prompts = prompts_from_rows(ROWS, RenderSettings(**data), tokenizer)
    examples = load_examples(DataSettings(path=str(tmp_path / "out.jsonl")), tokenizer)
    for prompt, example in zip(prompts, examples, strict=True):
        length = len(prompt.token_ids)
        assert example.token_ids[:length] == prompt.token_ids
        assert example.completion_mask == (False,) * length + (True,) * (len(example.token_ids) - length)
        assert example.token_ids[length:] == (
            *tokenizer(str(prompt.columns["answer"]))["input_ids"], tokenizer.eos_token_id
        )


def test_plain_prompts_keep_their_template(draw: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    draw(data={"chat": False, "prompt_template": "Q: {prompt} A:"})
    assert rows_of(tmp_path / "out.jsonl")[1]["prompt"] == "Q: say 1 A:"


def test_an_open_assistant_turn_is_continued(draw: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    open_turn = [{"role": "user", "content": "say 9"}, {"role": "assistant", "content": "I say"}]
    assert draw(rows=[*ROWS, {"prompt": open_turn, "answer": "9"}])["kept"] == 6
    [example] = examples_from_rows(rows_of(tmp_path / "out.jsonl")[5:], RenderSettings(), tokenizer)
    assert tokenizer.decode(example.token_ids) == "<user>say 9<|endoftext|><assistant>I say9<|endoftext|>"
    taught = [token for token, kept in zip(example.token_ids, example.completion_mask, strict=True) if kept]
    assert tokenizer.decode(taught) == "9<|endoftext|>"


def test_completions_that_the_template_renders_differently_are_counted(draw: Any, tokenizer: Any) -> None:
    changes = "{% if messages[0].content == 'say 3' and messages[-1].role == 'assistant' %}!{% endif %}"
    tokenizer.chat_template = changes + TEMPLATE
    counts = draw()
    assert counts["rendered_otherwise"] == 1 and counts["prompts_without"] == 1 and counts["kept"] == 4


def test_the_best_is_the_first_with_the_highest_reward(tokenizer: Any) -> None:
    engine = Parrot(tokenizer)
    [rollout] = engine.generate([Prompt((5,), "say 1", columns={"answer": "1"})], SamplingParams(n=4))
    rollout = replace(rollout, rewards=(0.5, 2.0, 0.5, 9.0))
    assert select(rollout, min_reward=None, keep="best") == ([1], {"duplicate": 1, "truncated": 1, "not_best": 1})
    assert select(rollout, min_reward=0.5, keep="all")[0] == [0, 1]
    tied = replace(rollout, rewards=(2.0, 2.0, math.nan, 9.0))
    assert select(tied, min_reward=None, keep="best")[0] == [0]
    empty = replace(rollout.completions[0], text=" \n")
    assert select(Rollout(rollout.prompt, (empty,), (1.0,)), min_reward=None, keep="all") == ([], {"empty": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"prompts_at_once": 0}, "prompts_at_once is 0"),
        ({"reward": None}, "min_reward is 1.0, and must be left out where there are no rewards"),
        ({"reward": None, "min_reward": None, "keep": "best"}, "keep is best"),
        ({"min_reward": float("nan")}, "min_reward is nan"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes: dict[str, Any], message: str, draw: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(**changes)
    with pytest.raises(ConfigError, match="must be 1 at temperature 0"):
        SampleSettings(SamplingSettings(temperature=0)).check(1)


def test_a_damaged_chunk_is_sampled_again(
    draw: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = draw()
    expected = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    partial = tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        draw(Parrot(tokenizer, fail_at=2))
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 3, "what it was begun with, and two of three chunks"
    partial.write_text("".join([lines[0], lines[1].replace("say 1", "say 7"), lines[2]]))
    engine = Parrot(tokenizer)
    assert draw(engine) == counts and (tmp_path / "out.jsonl").read_bytes() == expected
    assert len(engine.calls) == 3 and "line 2 is damaged" in caplog.text
    (tmp_path / "out.jsonl").unlink()
    partial.write_text(lines[0].replace("parrot", "parrop") + lines[1])
    with pytest.raises(ConfigError, match="is damaged in its first line, which says what it was begun with"):
        draw()
