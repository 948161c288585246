"""Divergences by hand, by loops, by gradcheck and against TRL's; chunks; the top K."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional import distillation
from alignlab.functional.distillation import Head, TopTokens
from tests.reference import functional as twin

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
LOG = math.log


def make(num_tokens=7, student_size=4, teacher_size=6, vocabulary=11, *, seed=0, bias=True, softcap=None):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(size, more):
        return Head(random(vocabulary + more, size), random(vocabulary + more) if bias else None, softcap)

    return random(num_tokens, student_size), head(student_size, 2), random(num_tokens, teacher_size), head(
        teacher_size, 0
    )


def logits(hidden, head, width):
    found = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    found = found if head.softcap is None else head.softcap * torch.tanh(found / head.softcap)
    return found[:, :width]


def test_by_hand():
    teacher, student = (torch.tensor([p]).log() for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert distillation.divergence(teacher, student, beta=0.0).item() == pytest.approx(0.25 * LOG(2))
    assert distillation.divergence(teacher, student, beta=1.0).item() == pytest.approx(0.25 * LOG(2))
    of_one = 0.5 * LOG(0.5 / 0.375) + 0.25 * LOG(0.25 / 0.375)
    assert distillation.divergence(teacher, student, beta=0.5).item() == pytest.approx(of_one)
    skew = torch.tensor([[0.8, 0.1, 0.1]]).log()
    assert distillation.divergence(skew, student, beta=0.0).item() == pytest.approx(
        0.8 * LOG(3.2) + 0.1 * LOG(0.4) + 0.1 * LOG(0.2)
    )
    assert distillation.divergence(skew, student, beta=1.0).item() == pytest.approx(
        -0.25 * LOG(3.2) - 0.25 * LOG(0.4) - 0.5 * LOG(0.2)
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("bias", "softcap", "temperature"), [(False, None, 1.0), (True, 1.5, 0.7), (True, None, 2.0)])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_divergence_equals_the_slow_twin(beta, bias, softcap, temperature, chunk):
    hidden, head, theirs, their_head = make(bias=bias, softcap=softcap)
    found = distillation.chunked_divergence(
        hidden, head, theirs, their_head, beta=beta, width=11, temperature=temperature, chunk_tokens=chunk
    )
    expected = [
        twin.generalized_jsd(
            twin.softmax((p / temperature).tolist()), twin.softmax((q / temperature).tolist()), beta
        )
        for p, q in zip(logits(theirs, their_head, 11), logits(hidden, head, 11), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_of_hidden_states_and_head(beta):
    hidden, head, theirs, their_head = make(5, softcap=2.0)
    inputs = [t.requires_grad_() for t in (hidden, head.weight, head.bias)]

    def found(hidden, weight, bias):
        return distillation.chunked_divergence(
            hidden, Head(weight, bias, 2.0), theirs, their_head, beta=beta, width=11, temperature=1.3, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(found, inputs)
    found(*inputs).sum().backward()
    assert head.weight.grad[:11].abs().min() > 0
    assert not head.weight.grad[11:].any()  # padding takes no part


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    distillation.divergence(teacher, student.log_softmax(-1), beta=0.0).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.exp())


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_reaches_the_teacher_and_equals_have_no_divergence(beta):
    hidden, head, _, _ = make()
    theirs = hidden.clone().requires_grad_()
    hidden.requires_grad_()
    found = distillation.chunked_divergence(hidden, head, theirs, head, beta=beta, width=11)
    torch.testing.assert_close(found, torch.zeros_like(found))
    found.sum().backward()
    assert theirs.grad is None
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden))


def test_small_beta_tends_to_forward_and_large_to_reverse_kl():
    teacher, student = (torch.randn(4, 6, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    forward, reverse = (distillation.divergence(teacher, student, beta=b) for b in (0.0, 1.0))
    torch.testing.assert_close(distillation.divergence(teacher, student, beta=1e-6) / 1e-6, forward, rtol=1e-4, atol=0)
    near = distillation.divergence(teacher, student, beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(near, reverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", BETAS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 11))
def test_top_tokens_bound_the_divergence_from_below(beta, seed, k):
    hidden, head, theirs, their_head = make(seed=seed)
    whole = distillation.chunked_divergence(hidden, head, theirs, their_head, beta=beta, width=11)
    top = distillation.chunked_top_tokens(theirs, their_head, k=k, width=11, chunk_tokens=3)
    found = distillation.chunked_coarse_divergence(hidden, head, top, beta=beta, width=11, chunk_tokens=2)
    assert (found <= whole + 1e-12).all()
    if k == 11:
        torch.testing.assert_close(found, whole)
        assert top.other_logprob.eq(-math.inf).all()
    else:
        assert (found < whole).any() or k == 10
        total = top.logprobs.exp().sum(-1) + top.other_logprob.exp()
        torch.testing.assert_close(total, torch.ones(7, dtype=torch.float64))


def test_coarse_by_hand():
    student = torch.tensor([[0.25, 0.25, 0.4, 0.1]]).log()
    top = TopTokens(torch.tensor([[2]]), torch.tensor([[LOG(0.8)]]), torch.tensor([LOG(0.2)]))
    found = distillation.coarse_divergence(top, student, beta=0.0)
    assert found.item() == pytest.approx(0.8 * LOG(2) + 0.2 * LOG(0.2 / 0.6))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 4, 11])
def test_gradients_of_the_coarse_divergence(beta, k):
    hidden, head, theirs, their_head = make(4)
    top = distillation.chunked_top_tokens(theirs, their_head, k=k, width=11)
    inputs = [t.requires_grad_() for t in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: distillation.chunked_coarse_divergence(h, Head(w, b), top, beta=beta, width=11, chunk_tokens=3),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float32(dtype):
    hidden, head, theirs, their_head = make()
    cast = [t.to(dtype) for t in (hidden, head.weight, theirs, their_head.weight)]
    found = distillation.chunked_divergence(
        cast[0].requires_grad_(), Head(cast[1]), cast[2], Head(cast[3]), beta=0.5, width=11
    )
    assert found.dtype == torch.float32
    found.sum().backward()
    assert cast[0].grad.dtype == dtype


def test_no_tokens_have_no_divergence():
    hidden, head, theirs, their_head = make(0)
    found = distillation.chunked_divergence(hidden.requires_grad_(), head, theirs, their_head, beta=0.5, width=11)
    assert found.shape == (0,)
    found.sum().backward()


def test_without_tokens_a_trained_head_has_a_gradient_of_0():
    """Other ranks wait for this rank's gradient of every trained parameter."""
    hidden, head, theirs, their_head = make(0)
    head = distillation.Head(head.weight.detach().requires_grad_(), head.bias, head.softcap)
    distillation.chunked_divergence(hidden, head, theirs, their_head, beta=0.5, width=11).sum().backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"width": 12}, "width is 12"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_out_of_range(changes, message):
    hidden, head, theirs, their_head = make()
    with pytest.raises(ValueError, match=message):
        distillation.chunked_divergence(hidden, head, theirs, their_head, **{"beta": 0.5, "width": 11} | changes)


def test_k_out_of_range():
    _, _, theirs, their_head = make()
    with pytest.raises(ValueError, match="k is 12"):
        distillation.chunked_top_tokens(theirs, their_head, k=12, width=11)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_equals_that_of_trl(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd")
    torch.manual_seed(0)
    ours, theirs = (torch.randn(6, 9).requires_grad_() for _ in range(2))
    with torch.no_grad():
        ours.copy_(theirs)
    teacher = torch.randn(6, 9)
    student = (ours / temperature).log_softmax(-1)
    found = distillation.divergence((teacher / temperature).log_softmax(-1), student, beta=beta).sum()
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        theirs[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
