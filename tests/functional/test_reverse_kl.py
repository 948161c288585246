"""The reverse KL as an advantage: by hand, against a slow twin, by its identities; spans of two tokenisations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional.reverse_kl import reverse_kl_advantages, spread_over_spans

# A shared prompt of 2, then a completion of 3, then one of 4 whose second token is a tool's.
IDS = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1, 1])
MASK = torch.tensor([False, False, True, True, True, True, False, True, True])
TEACHER = torch.tensor([9.0, 9.0, -1.0, -2.0, -3.0, -0.5, 9.0, -4.0, -1.0])
OLD = torch.tensor([7.0, 5.0, -3.0, -1.0, -1.0, -1.5, 3.0, -2.0, -1.0])
# teacher - old on the mask:      2, -1, -2 and 1, -2, 0


def advantages(discount: float, *, normalize_length: bool = False, **changes: torch.Tensor) -> torch.Tensor:
    given = {"teacher_logprobs": TEACHER, "old_logprobs": OLD, "mask": MASK, "sequence_ids": IDS} | changes
    return reverse_kl_advantages(**given, num_sequences=2, discount=discount, normalize_length=normalize_length)


def test_discount_0_gives_the_log_ratio_of_each_token() -> None:
    assert advantages(0.0).tolist() == [0, 0, 2, -1, -2, 1, 0, -2, 0]


def test_the_whole_future_by_hand() -> None:
    assert advantages(1.0).tolist() == [0, 0, -1, -3, -2, -1, 0, -2, 0]


def test_a_discounted_future_by_hand() -> None:
    assert advantages(0.5).tolist() == [0, 0, 2 - 0.5 - 0.5, -1 - 1, -2, 1 - 1, 0, -2, 0]


def test_a_normalised_future_is_a_mean_by_hand() -> None:
    expected = [0, 0, 2 + (-1 - 2) / 2, -1 - 2, -2, 1 + (-2 + 0) / 2, 0, -2 + 0, 0]
    assert advantages(1.0, normalize_length=True).tolist() == expected
    discounted = advantages(0.5, normalize_length=True)
    assert discounted[2].item() == pytest.approx(2 + (0.5 * -1 + 0.25 * -2) / 0.75)
    assert discounted[3:5].tolist() == [-3, -2]


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    assert not advantages(1.0, teacher_logprobs=OLD).any()


def test_the_first_token_s_whole_future_is_the_sequence_s_log_ratio() -> None:
    difference = (TEACHER - OLD)[MASK & (IDS == 0)].sum()
    assert advantages(1.0)[2] == difference


def test_bfloat16_is_computed_in_float32() -> None:
    found = advantages(0.9, teacher_logprobs=TEACHER.bfloat16(), old_logprobs=OLD.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, advantages(0.9))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_equals_a_slow_twin(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))) & (ids >= 0)
    numbers = st.lists(st.floats(-5, 0), min_size=count, max_size=count)
    teacher, old = (torch.tensor(data.draw(numbers)) for _ in range(2))
    discount, normalize = data.draw(st.sampled_from([0.0, 0.3, 1.0])), data.draw(st.booleans())
    expected = [0.0] * count
    for sequence in range(3):
        places = [i for i in range(count) if mask[i] and ids[i] == sequence]
        for number, i in enumerate(places):
            weights = [discount**k for k in range(1, len(places) - number)]
            future = math.fsum(
                w * float(teacher[j] - old[j]) for w, j in zip(weights, places[number + 1 :], strict=True)
            )
            total = math.fsum(weights)
            own = float(teacher[i] - old[i])
            expected[i] = own + (future / total if total > 0 else 0.0) if normalize else own + future
    found = reverse_kl_advantages(
        teacher, old, mask=mask, sequence_ids=ids, num_sequences=3, discount=discount, normalize_length=normalize
    )
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_reverse_kl() -> None:
    """One step, the expectation taken over all tokens: sum q A grad log q = -grad KL(q || p)."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, dtype=torch.float64).log_softmax(-1)
    old = logits.log_softmax(-1)
    everywhere = torch.ones(5, dtype=torch.bool)
    advantage = reverse_kl_advantages(
        teacher, old.detach(), mask=everywhere, sequence_ids=torch.arange(5), num_sequences=5, discount=0.0,
        normalize_length=False,
    )
    [surrogate] = torch.autograd.grad((old.exp().detach() * advantage * old).sum(), logits, retain_graph=True)
    [kl] = torch.autograd.grad((old.exp() * (old - teacher)).sum(), logits)
    torch.testing.assert_close(surrogate, -kl)


def test_a_span_s_difference_is_spread_over_its_tokens_by_hand() -> None:
    """Spans of 2 and 1 tokens of the student's, 1 and 3 of the teacher's."""
    old, teacher = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -1.0, -0.5, -0.5])
    found = spread_over_spans(old, torch.tensor([0, 0, 1]), teacher, torch.tensor([0, 1, 1, 1]), num_spans=2)
    assert found.tolist() == [0.0, -2.0, -2.0]


def test_spans_of_one_token_each_give_the_teacher_s_log_probs() -> None:
    old, teacher, each = torch.tensor([-1.0, -3.0]), torch.tensor([-2.5, -0.25]), torch.arange(2)
    torch.testing.assert_close(spread_over_spans(old, each, teacher, each, num_spans=2), teacher)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5), st.integers(0, 1000))
def test_spans_sum_to_the_teacher_s(sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    spans, teacher_spans = (
        torch.tensor([s for s, pair in enumerate(sizes) for _ in range(pair[side])]) for side in (0, 1)
    )
    old, teacher = -torch.rand(len(spans)), -torch.rand(len(teacher_spans))
    found = spread_over_spans(old, spans, teacher, teacher_spans, num_spans=len(sizes))
    for span in range(len(sizes)):
        torch.testing.assert_close(found[spans == span].sum(), teacher[teacher_spans == span].sum())
        shifts = (found - old)[spans == span]
        torch.testing.assert_close(shifts, shifts[0].expand_as(shifts))
