from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from alignlab.errors import CheckpointError, ConfigError
from alignlab.evaluation.strategies import pool
from alignlab.evaluation.strategies.pool import draw_pool, is_complete, read_pool
from alignlab.types import Completion, Prompt, Rollout

FACTS = {"model": "m", "seed": 0}


def prompts(count: int) -> list[Prompt]:
    return [Prompt((i, 7), f"problem {i}", i, {"answer": i}) for i in range(count)]


class Drawer:
    """Says the prompt's first token and the number of the draw, and remembers what it was asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.fails_at = fails_at

    def __call__(self, asked: Sequence[Prompt]) -> list[Rollout]:
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append([prompt.index for prompt in asked])
        return [Rollout(p, tuple(said(p, i) for i in range(2))) for p in asked]


def said(prompt: Prompt, number: int) -> Completion:
    return Completion.of(
        (prompt.token_ids[0], number), f"{prompt.token_ids[0]} {number}", logprobs=(-0.5, -1.25),
        raw_logprobs=(-0.25, -2.5), finish_reason="length", writers=("policy", "user"),
    )


def test_a_pool_is_drawn_once(tmp_path):
    drawer, path = Drawer(), tmp_path / "p.jsonl"
    drawn = draw_pool(prompts(3), FACTS, drawer, path)
    assert drawer.calls == [[0, 1, 2]] and drawn.num_samples == 2 and is_complete(path, prompts(3), FACTS)
    again = draw_pool(prompts(3), FACTS, drawer, path)
    assert drawer.calls == [[0, 1, 2]] and again == drawn == read_pool(path, prompts(3))
    assert again.rollouts[2].completions[1] == said(prompts(3)[2], 1), "log-probs and writers too"


def test_interrupted_drawing_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "PROMPTS_AT_ONCE", 2)
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        draw_pool(prompts(5), FACTS, Drawer(fails_at=1), path)
    assert not is_complete(path, prompts(5), FACTS)
    with pytest.raises(CheckpointError, match="samples of all 5 problems, and holds 2"):
        read_pool(path, prompts(5))
    drawer = Drawer()
    drawn = draw_pool(prompts(5), FACTS, drawer, path)
    assert drawer.calls == [[2, 3], [4]]
    assert [rollout.completions[0].text for rollout in drawn.rollouts] == [f"{i} 0" for i in range(5)]


def test_equal_prompts_are_drawn_together(monkeypatch):
    monkeypatch.setattr(pool, "PROMPTS_AT_ONCE", 2)
    first, second, third, fourth = prompts(4)
    repeated = [first, second, third, replace(fourth, token_ids=first.token_ids)]
    drawer = Drawer()
    drawn = draw_pool(repeated, FACTS, drawer)
    assert drawer.calls == [[0, 3], [1, 2]] and [r.prompt.index for r in drawn.rollouts] == [0, 1, 2, 3]


def test_an_equal_prompt_that_comes_later_is_drawn_with_the_first(tmp_path):
    first, second = prompts(2)
    later = replace(second, token_ids=first.token_ids)
    drawer, path = Drawer(), tmp_path / "p.jsonl"
    before = draw_pool([first], FACTS, drawer, path)
    after = draw_pool([first, later], FACTS, drawer, path)
    assert drawer.calls == [[0], [0, 1]], "its samples go on where those of the first end"
    assert after.rollouts[0] == before.rollouts[0] and read_pool(path, [first, later]) == after
    assert len(path.read_text().splitlines()) == 3, "the facts, and each problem once"


def test_fewer_problems_read_the_beginning_and_more_draw_the_rest(tmp_path):
    drawer, path = Drawer(), tmp_path / "p.jsonl"
    draw_pool(prompts(3), FACTS, drawer, path)
    assert len(draw_pool(prompts(2), FACTS, drawer, path).rollouts) == 2
    assert len(draw_pool(prompts(4), FACTS, drawer, path).rollouts) == 4
    assert drawer.calls == [[0, 1, 2], [3]]


def test_samples_of_something_else_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    draw_pool(prompts(2), FACTS, Drawer(), path)
    with pytest.raises(CheckpointError, match=r"whose seed differ.*seed: 0, now 1.*another --pool"):
        draw_pool(prompts(2), FACTS | {"seed": 1}, Drawer(), path)
    other = [prompts(2)[0], replace(prompts(2)[1], columns={"answer": 9})]
    with pytest.raises(CheckpointError, match="samples of another problem than number 1"):
        draw_pool(other, FACTS, Drawer(), path)
    (tmp_path / "q.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(CheckpointError, match="must be the file of a pool"):
        draw_pool(prompts(2), FACTS, Drawer(), tmp_path / "q.jsonl")


def test_a_damaged_line_is_drawn_again(tmp_path):
    path = tmp_path / "p.jsonl"
    drawn = draw_pool(prompts(3), FACTS, Drawer(), path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace("1 0", "1 5"), *lines[3:]]))
    drawer = Drawer()
    assert draw_pool(prompts(3), FACTS, drawer, path) == drawn and drawer.calls == [[1]]


def test_no_problems_are_refused():
    with pytest.raises(ConfigError, match="at least one problem"):
        draw_pool([], FACTS, Drawer())
