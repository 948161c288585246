from __future__ import annotations

import math

import pytest
import torch

from alignlab.errors import RolloutError
from alignlab.rollout.embedded import sampling as fast
from alignlab.types import SamplingParams
from tests.reference import sampling as slow

CASES = {
    "plain": SamplingParams(),
    "greedy": SamplingParams(temperature=0.0),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=2.5),
    "top_k": SamplingParams(top_k=5),
    "top_k of one": SamplingParams(top_k=1),
    "top_k over the vocabulary": SamplingParams(top_k=10_000),
    "top_p": SamplingParams(top_p=0.7),
    "tiny top_p": SamplingParams(top_p=1e-6),
    "min_p": SamplingParams(min_p=0.1),
    "penalty": SamplingParams(repetition_penalty=1.7),
    "reward for repetition": SamplingParams(repetition_penalty=0.5),
    "all": SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    "greedy with penalty": SamplingParams(temperature=0.0, repetition_penalty=3.0),
}
VOCAB = 700  # not a multiple of the chunks that rows are searched in
CPU = torch.device("cpu")


def table_of(rows: list[SamplingParams], keys: list[int] | None = None) -> fast.SamplingTable:
    return fast.SamplingTable.build(rows, keys or list(range(len(rows))), vocab_size=VOCAB, device=CPU)


def random_logits(rows: int) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 10:20] = logits[:, 5:6]  # ties
    return logits


def slow_draw(logits: torch.Tensor, params: SamplingParams, key: int, position: int, **options: list[int]) -> int:
    return slow.race(slow.distribution(logits.tolist(), params, **options), key, position, chunk=256)


@pytest.mark.parametrize("name", CASES)
def test_distribution_and_draw_equal_the_reference(name: str) -> None:
    rows = 40
    logits, params = random_logits(rows), CASES[name]
    table = table_of([params] * rows)
    used = {row: [(row * 7 + step) % VOCAB for step in range(30)] for row in range(rows)}
    seen = torch.tensor([(row, token) for row, tokens in used.items() for token in tokens])
    positions = torch.arange(rows) * 3
    sampled = fast.sample(logits, table, positions, penalised=seen if table.any_penalty else None)
    for row in range(rows):
        options = {"seen": used[row]} if table.any_penalty else {}
        expected = slow.distribution(logits[row].tolist(), params, **options)
        token = int(sampled.tokens[row])
        assert token == slow_draw(logits[row], params, row, 3 * row, **options)
        assert float(sampled.logprobs[row]) == pytest.approx(math.log(expected[token]), abs=2e-6)
        raw = logits[row].double().log_softmax(-1)[token]
        assert float(sampled.raw_logprobs[row]) == pytest.approx(float(raw), abs=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_truncated_probabilities_equal_the_reference(name: str) -> None:
    params = CASES[name]
    if params.temperature == 0 or params.repetition_penalty != 1:
        params = SamplingParams(top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    logits = random_logits(6)
    weights, _ = fast.truncate((logits / params.temperature).softmax(-1), table_of([params] * 6))
    probs = weights / weights.sum(-1, keepdim=True)
    for row in range(6):
        expected = torch.tensor(slow.distribution(logits[row].tolist(), params))
        assert torch.equal(probs[row] > 0, expected > 0)
        torch.testing.assert_close(probs[row], expected, rtol=1e-5, atol=1e-7)


def hot_and_cold_probs(rows: int, scale: float, *, step: float = 0.0) -> torch.Tensor:
    """Random probabilities; with a `step`, logits are rounded to multiples of it, so that many tokens tie."""
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * scale
    return (logits if step == 0 else (logits / step).round() * step).softmax(-1)


@pytest.mark.parametrize("step", [0.0, 0.25, 2.0], ids=["no ties", "ties", "many ties"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_likeliest_tokens_alone_give_the_tokens_of_a_bisection(scale: float, step: float) -> None:
    rows = [
        SamplingParams(top_k=top_k, top_p=top_p)
        for top_k in (0, 1, 2, 7, 40, 300) for top_p in (1.0, 1e-6, 0.1, 0.5, 0.9, 0.999)
    ]  # fmt: skip
    probs, table = hot_and_cold_probs(len(rows), scale, step=step), table_of(rows)
    expected, flags = fast.truncate(probs, table)
    assert flags is None
    for num_likeliest in (300, VOCAB):
        weights, is_exact = fast.truncate(probs, table, num_likeliest)
        assert is_exact is not None
        assert torch.equal(weights[is_exact], expected[is_exact])
        likeliest = probs.topk(num_likeliest).values.sum(-1)
        for row, params in enumerate(rows):
            within = params.top_k > 0 or params.top_p == 1 or float(likeliest[row]) > params.top_p
            assert bool(is_exact[row]) == within, "only a nucleus of more tokens than were looked at is bisected"


def test_a_nucleus_wider_than_the_likeliest_tokens_is_told_and_not_cut() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).expand(3, 4)
    rows = [SamplingParams(top_p=0.95), SamplingParams(top_p=0.6), SamplingParams(top_k=2, top_p=0.95)]
    table = fast.SamplingTable.build(rows, [0, 1, 2], vocab_size=4, device=CPU)
    weights, is_exact = fast.truncate(probs, table, 2)
    assert is_exact is not None and is_exact.tolist() == [False, True, True]
    assert [row.nonzero()[:, 0].tolist() for row in weights[1:]] == [[0, 1], [0, 1]]


def test_the_number_of_likeliest_tokens_holds_every_top_k_and_most_nuclei() -> None:
    cases = {
        (SamplingParams(),): None, (SamplingParams(min_p=0.1),): None, (SamplingParams(top_k=5),): 5,
        (SamplingParams(top_k=5, top_p=0.5), SamplingParams(top_k=9)): 9, (SamplingParams(top_k=10_000),): VOCAB,
        (SamplingParams(top_p=0.5),): VOCAB,
    }  # fmt: skip
    assert {rows: fast._num_likeliest(rows, VOCAB) for rows in cases} == cases
    assert fast._num_likeliest([SamplingParams(top_p=0.5), SamplingParams(top_k=3)], 50_000) == 1024


def test_rows_with_other_parameters_do_not_change_a_row() -> None:
    logits = random_logits(len(CASES))
    rows = list(CASES.values())
    penalised = [row for row, params in enumerate(rows) if params.repetition_penalty != 1]
    seen = torch.tensor([(row, token) for row in penalised for token in range(50)])
    together = fast.sample(logits, table_of(rows), torch.zeros(len(rows), dtype=torch.int64), penalised=seen)
    for row, params in enumerate(rows):
        options = {"seen": list(range(50))} if row in penalised else {}
        assert int(together.tokens[row]) == slow_draw(logits[row], params, row, 0, **options)
        if params.temperature == 0:
            assert float(together.logprobs[row]) == 0.0


def test_blocks_of_rows_do_not_change_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, table = random_logits(9), table_of([CASES["all"]] * 9)
    seen = torch.tensor([(row, 3) for row in range(9)])
    whole = fast.sample(logits, table, torch.arange(9), penalised=seen)
    monkeypatch.setattr(fast, "_BLOCK_ELEMENTS", 2 * VOCAB)
    cut = fast.sample(logits, table, torch.arange(9), penalised=seen)
    assert torch.equal(whole.tokens, cut.tokens)
    torch.testing.assert_close(whole.logprobs, cut.logprobs)


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(50, VOCAB)
    logits[:, [4, 9]] = 20.0
    banned = torch.tensor([(row, 4) for row in range(50)])
    for params in (SamplingParams(), SamplingParams(temperature=0.0)):
        sampled = fast.sample(logits, table_of([params] * 50), torch.zeros(50, dtype=torch.int64), banned=banned)
        assert sampled.tokens.tolist() == [9] * 50
    expected = slow.distribution(logits[0].tolist(), SamplingParams(), banned=[4])[9]
    sampled = fast.sample(logits, table_of([SamplingParams()] * 50), torch.zeros(50, dtype=torch.int64), banned=banned)
    assert float(sampled.logprobs[0]) == pytest.approx(math.log(expected), abs=1e-6)
    assert float(sampled.raw_logprobs[0]) == pytest.approx(float(logits[0].log_softmax(-1)[9]), abs=1e-6)


def test_top_k_by_hand_keeps_ties() -> None:
    probs = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1]])
    table = fast.SamplingTable.build([SamplingParams(top_k=2)], [0], vocab_size=5, device=CPU)
    torch.testing.assert_close(fast.truncate(probs, table)[0], torch.tensor([[0.4, 0.0, 0.2, 0.2, 0.0]]))


def test_top_p_by_hand_keeps_the_token_that_reaches_it() -> None:
    probs = torch.tensor([[0.5, 0.05, 0.3, 0.15]])
    for top_p, kept in ((0.5, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 2, 3]), (0.96, [0, 1, 2, 3])):
        table = fast.SamplingTable.build([SamplingParams(top_p=top_p)], [0], vocab_size=4, device=CPU)
        assert fast.truncate(probs, table)[0][0].nonzero()[:, 0].tolist() == kept


def test_top_p_takes_its_share_of_what_top_k_left() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    table = fast.SamplingTable.build([SamplingParams(top_k=2, top_p=0.5)], [0], vocab_size=4, device=CPU)
    assert fast.truncate(probs, table)[0][0].nonzero()[:, 0].tolist() == [0]  # 0.4 / 0.7 is over a half


def test_each_token_is_drawn_as_often_as_its_weight_says() -> None:
    weights = torch.zeros(700)
    weights[[3, 4, 300, 699]] = torch.tensor([1.0, 2.0, 4.0, 1.0])
    draws = 40_000
    keys = fast.row_keys(torch.arange(draws), torch.zeros(draws, dtype=torch.int64))
    tokens, totals = fast.race(weights.expand(draws, 700), keys)
    counts = tokens.bincount(minlength=700)
    assert int(counts.sum()) == int(counts[[3, 4, 300, 699]].sum()), "a token of weight 0 was drawn"
    for token, expected in ((3, 1 / 8), (4, 2 / 8), (300, 4 / 8), (699, 1 / 8)):
        deviation = math.sqrt(expected * (1 - expected) / draws)
        assert abs(int(counts[token]) / draws - expected) < 4 * deviation
    assert totals.unique().tolist() == [8.0]


def test_draws_of_one_completion_are_independent() -> None:
    """Of two equally likely tokens, each of the four pairs is as frequent."""
    weights = torch.ones(10_000, 2)
    keys = torch.arange(10_000)
    first, second = (fast.race(weights, fast.row_keys(keys, torch.full((10_000,), i)))[0] for i in (0, 1))
    assert (first * 2 + second).bincount().float().sub(2500).abs().max() < 4 * math.sqrt(10_000 * 3 / 16)


def test_rounding_does_not_move_a_draw() -> None:
    """Hidden states that are rounded otherwise move all logits a little, and with them every cumulative sum.

    Inverting the cumulative distribution changes 60 of these 400 draws; who arrives first changes in none.
    """
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(49_152, 64, generator=generator)
    hidden = torch.randn(400, 64, generator=generator) * 0.3
    moved = hidden + 1e-4 * torch.randn(400, 64, generator=generator)
    table = fast.SamplingTable.build([SamplingParams()] * 400, list(range(400)), vocab_size=49_152, device=CPU)
    positions = torch.zeros(400, dtype=torch.int64)
    one, other = (fast.sample(states @ head.T, table, positions).tokens for states in (hidden, moved))
    assert torch.equal(one, other)
    assert len(one.unique()) > 50


def test_logprobs_of_a_large_vocabulary_are_exact() -> None:
    logits = torch.randn(20, 151_936, generator=torch.Generator().manual_seed(1)) * 3
    for params in (SamplingParams(), SamplingParams(temperature=0.0)):
        table = fast.SamplingTable.build([params] * 20, list(range(20)), vocab_size=151_936, device=CPU)
        sampled = fast.sample(logits, table, torch.zeros(20, dtype=torch.int64))
        exact = logits.double().log_softmax(-1).gather(1, sampled.tokens[:, None])[:, 0]
        torch.testing.assert_close(sampled.raw_logprobs.double(), exact, atol=3e-6, rtol=0)


def test_argmax_is_the_first_of_equals() -> None:
    values = torch.zeros(2, 600)
    values[0, [40, 300, 599]] = 1.0
    values[1] = -5.0
    assert fast.argmax(values).tolist() == [40, 0]


def test_keys_are_splitmix64() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 1234567]
    expected = [[slow.hashed(key, position) for position in range(5)] for key in keys]
    found = [fast.row_keys(torch.tensor([key]).expand(5), torch.arange(5)).tolist() for key in keys]
    assert [[number % 2**64 for number in row] for row in found] == expected
    assert slow.hashed(1234567, 0) == 6457827717110365317  # the published test vector


def test_stream_keys_differ_by_seed_prompt_and_index() -> None:
    keys = {fast.stream_key(s, p, i) for s in (0, 1) for p in ((1, 2), (12,), (1, 2, 3)) for i in (0, 1)}
    assert len(keys) == 12
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0}, {"temperature": -0.1}, {"temperature": 1e-39},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0},
        {"repetition_penalty": 0.0}, {"max_new_tokens": 0}, {"min_new_tokens": 65}, {"stop": ("",)},
        {"ignore_eos": True, "stop": ("x",)}, {"ignore_eos": True, "stop_token_ids": (1,)},
    ],
)
def test_parameters_out_of_range_are_named(wrong: dict) -> None:
    name = next(iter(wrong))
    with pytest.raises(RolloutError, match=rf"sampling\.{name} is .*, and must "):
        fast.check_sampling(SamplingParams(**wrong))
