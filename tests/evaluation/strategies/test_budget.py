"""Budget forcing against an engine that says what it is told to, a character a token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.evaluation.strategies.budget import BudgetForcing, budget_figure, most_new_tokens
from alignlab.evaluation.strategies.settings import Budget
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Completion, Prompt, Rollout, SamplingParams
from tests.rollout.conftest import llama, tokenizer

__all__ = ["llama", "tokenizer"]

END = 0


class Characters:
    """A tokenizer of one token a character, but for the pair that it is given."""

    def __init__(self, pair: str = "") -> None:
        self.pair = pair

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        shown = (i for i in token_ids if not (skip_special_tokens and i == END))
        return "".join(self.pair if i == 1 else "$" if i == END else chr(i) for i in shown)


class ScriptedEngine:
    """Continues each prompt by the script, up to its length; a text that ends ends with the end token."""

    policy_version = 0

    def __init__(self, script: dict[str, Sequence[str]], tokenizer: Characters) -> None:
        self.script, self.tokenizer = script, tokenizer
        self.asked: list[tuple[str, SamplingParams]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[Rollout]:
        rollouts = []
        for prompt, params in zip(prompts, sampling, strict=True):
            text = self.tokenizer.decode(prompt.token_ids)
            self.asked.append((text, params))
            said = self.script[text][: params.n]
            rollouts.append(Rollout(prompt, tuple(self.completion(one, params) for one in said)))
        return rollouts

    def completion(self, text: str, params: SamplingParams) -> Completion:
        ids = [END if c == "$" else 1 if c == "#" else ord(c) for c in text]
        ended = len(ids) <= params.max_new_tokens
        ids = ids[: params.max_new_tokens]
        logprobs = [-float(i + 1) for i in range(len(ids))]
        return Completion.of(
            ids, "", logprobs=logprobs, raw_logprobs=logprobs, finish_reason="stop" if ended else "length"
        )


def forced(
    script: dict[str, Sequence[str]], budget: int, *, pair: str = "", sampling: dict[str, object] | None = None,
    **settings: object,
):
    tokenizer = Characters(pair)
    engine = ScriptedEngine(script, tokenizer)
    strategy = Budget.model_validate({"budgets": [budget], "cue": ":", "answer_tokens": 2, **settings})
    sampled = SamplingSettings.model_validate({"temperature": 0.5, **(sampling or {})})
    forcing = BudgetForcing(engine, tokenizer, sampled, strategy, seed=3)  # type: ignore[arg-type]
    [rollout] = forcing.generate([Prompt((ord("q"),), "q")], budget)
    return rollout.completions, engine.asked


def test_thinking_is_cut_at_the_budget_and_the_answer_asked_for():
    [completion], asked = forced({"q": ["abcdef$"], "qabcd:": ["5$"]}, 4)
    assert completion.text == "abcd:5" and completion.finish_reason == "stop"
    assert completion.token_ids == (*map(ord, "abcd:5"), END)
    assert completion.writers == ("policy",) * 4 + ("user",) + ("policy",) * 2
    assert completion.raw_logprobs == completion.logprobs == (-1, -2, -3, -4, 0, -1, -2)
    assert [(params.max_new_tokens, params.n) for _, params in asked] == [(4, 1), (2, 1)]
    assert all((params.temperature, params.seed) == (0.5, 3) for _, params in asked)


def test_thinking_that_ends_early_loses_its_end_token():
    [completion], _ = forced({"q": ["ab$"], "qab:": ["5$"]}, 4)
    assert completion.text == "ab:5" and END not in completion.token_ids[:-1]


def test_wait_draws_thinking_out_as_long_as_the_budget_allows():
    script = {"q": ["ab$"], "qabW": ["cd$"], "qabWcdW": ["efg$"], "qabWcdWe:": ["5$"]}
    [completion], asked = forced(script, 7, waits=2, wait="W")
    assert completion.text == "abWcdWe:5"
    # 7 tokens of thinking: 3 with the end, then 3, then 1; what is put in does not count.
    assert [params.max_new_tokens for _, params in asked] == [7, 4, 1, 2]
    [once], _ = forced(script | {"qabWcd:": ["6$"]}, 7, waits=1, wait="W")
    assert once.text == "abWcd:6"


def test_a_used_up_budget_is_not_drawn_out():
    [completion], asked = forced({"q": ["abcdef$"], "qabcd:": ["5$"]}, 4, waits=3, wait="W")
    assert completion.text == "abcd:5" and len(asked) == 2
    # It ended by itself, with the last token that it had.
    [completion], asked = forced({"q": ["abc$"], "qabc:": ["5$"]}, 4, waits=3, wait="W")
    assert completion.text == "abc:5" and len(asked) == 2


def test_the_text_that_ends_thinking_is_put_back_behind_it():
    [completion], asked = forced({"q": ["ab</t>"], "qab</t>:": ["5$"]}, 8, end="</t>")
    assert completion.text == "ab</t>:5" and asked[0][1].stop == ("</t>",)
    assert completion.writers == ("policy",) * 2 + ("user",) * 5 + ("policy",) * 2


def test_an_end_that_is_one_token_is_looked_for_as_a_token():
    [completion], asked = forced({"q": ["abE"], "qabE:": ["5$"]}, 8, end="E")
    assert completion.text == "abE:5" and completion.writers == ("policy",) * 2 + ("user",) * 2 + ("policy",) * 2
    assert (asked[0][1].stop, asked[0][1].stop_token_ids) == ((), (ord("E"),))
    assert (asked[1][1].stop, asked[1][1].stop_token_ids) == ((), ())


def test_a_pattern_is_the_answer_s_and_forced_tokens_are_the_thinking_s():
    sampling = {"regex": "[0-9]", "forced_tokens": {0: ord("a")}, "stop": ("!",)}
    script = {"q": ["ab$"], "qabW": ["cdef"], "qabWcd:": ["5$"]}
    _, asked = forced(script, 5, waits=1, wait="W", sampling=sampling)
    assert [params.regex for _, params in asked] == [None, None, "[0-9]"]
    assert [params.forced_tokens for _, params in asked] == [((0, ord("a")),), (), ()]
    assert all(params.stop == ("!",) for _, params in asked)


def test_a_token_across_the_end_of_thinking_is_cut_in_two():
    # The token "b<" holds the last character of the thinking and the first of its end.
    [completion], _ = forced({"q": ["a#/t>"], "qab</t>:": ["5$"]}, 8, pair="b<", end="</t>")
    assert completion.text == "ab</t>:5"
    assert completion.writers == ("policy",) + ("user",) * 6 + ("policy",) * 2


def test_samples_of_a_prompt_are_drawn_from_one_prompt_and_go_their_own_ways():
    script = {"q": ["ab$", "cdefg"], "qab:": ["5$"], "qcde:": ["6$"]}
    completions, asked = forced(script, 3, samples=2)
    assert [completion.text for completion in completions] == ["ab:5", "cde:6"]
    assert [(text, params.n) for text, params in asked] == [("q", 2), ("qab:", 1), ("qcde:", 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_embedded_engine_s_traces_are_those_of_two_calls(llama, tokenizer, temperature):
    engine = EmbeddedEngine(llama, tokenizer, RolloutSettings(block_size=4, cache_tokens=256))
    sampling = SamplingSettings(temperature=temperature)
    prompt = Prompt(tuple(b"ab"), "ab")
    forcing = BudgetForcing(engine, tokenizer, sampling, Budget(budgets=(6,), cue="x:", answer_tokens=3, samples=2), 5)
    [rollout] = forcing.generate([prompt], 6)
    [first] = engine.generate([prompt], SamplingParams(n=2, temperature=temperature, max_new_tokens=6, seed=5))
    for forced_one, thought in zip(rollout.completions, first.completions, strict=True):
        ids = thought.token_ids if thought.finish_reason == "length" else thought.token_ids[:-1]
        assert forced_one.token_ids[: len(ids) + 2] == (*ids, *b"x:")
        assert forced_one.logprobs[: len(ids)] == thought.logprobs[: len(ids)]
    # Greedy traces are equal, and their second prompts too: what the answer is, is known.
    if temperature == 0:
        longer = Prompt((*prompt.token_ids, *rollout.completions[0].token_ids[:8]), "")
        [answer] = engine.generate([longer], SamplingParams(temperature=0.0, max_new_tokens=3))
        assert rollout.completions[0].token_ids[8:] == answer.completions[0].token_ids


def test_room_is_kept_for_all_that_may_stand_behind_a_prompt():
    strategy = Budget(budgets=(8, 32), waits=2, wait="Wait", end="</t>", cue="A:", answer_tokens=5)
    assert most_new_tokens(strategy) == 32 + 2 * 4 + 4 + 2 + 5


def test_a_figure_is_the_mean_of_the_traces(problem):
    figure = budget_figure(
        [problem([None] * 2, [1.0, 0.0], tokens=[4, 6]), problem([None] * 2, [0.0] * 2, tokens=[1, 1])], 8
    )
    assert (figure.k, figure.values, figure.tokens) == (8, (0.5, 0.0), pytest.approx(3.0))
