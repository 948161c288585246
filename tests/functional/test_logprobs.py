import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional import logprobs
from tests.reference import functional as twin

MODES = [
    dict(bias=False, softcap=None, temperature=1.0),
    dict(bias=True, softcap=None, temperature=0.7),
    dict(bias=False, softcap=1.5, temperature=1.0),
    dict(bias=True, softcap=2.0, temperature=1.3),
]


def make_head(num_tokens=7, hidden_size=5, vocabulary=11, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return random(num_tokens, hidden_size), random(vocabulary, hidden_size), random(vocabulary), targets


def full_logprobs(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None):
    """The twin with all logits at once, for autograd to differentiate."""
    logits = logprobs.head_logits(hidden, weight, bias=bias, softcap=softcap) / temperature
    log_probs = torch.log_softmax(logits, -1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def gradients(function, tensors, coefficients, **options):
    """Gradients of a random combination of log-probs and entropies."""
    hidden, weight, bias, targets = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    logprob, entropy = function(*leaves, targets, bias=bias, **options)
    (coefficients[0] * logprob + coefficients[1] * entropy).sum().backward()
    return [t.grad for t in (*leaves, bias) if t is not None]


def test_one_token_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.log(3.0), 9.0], [0.0, 9.0]])
    logprob, entropy = logprobs.chunked_logprobs(hidden, weight, torch.tensor([0]))
    assert logprob.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_the_slow_twin(mode):
    hidden, weight, bias, targets = make_head()
    options = dict(temperature=mode["temperature"], softcap=mode["softcap"])
    bias = bias if mode["bias"] else None
    logprob, entropy = logprobs.chunked_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=3, **options)
    for i, target in enumerate(targets.tolist()):
        expected = twin.logprob_and_entropy(
            hidden[i].tolist(), weight.tolist(), target, None if bias is None else bias.tolist(), **options
        )
        assert (logprob[i].item(), entropy[i].item()) == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_in_training", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradcheck(mode, head_in_training, entropy_grad):
    hidden, weight, bias, targets = make_head(num_tokens=4, hidden_size=3, vocabulary=6)
    hidden.requires_grad_()
    weight.requires_grad_(head_in_training)
    bias = bias.requires_grad_(head_in_training) if mode["bias"] else None

    def function(hidden, weight, bias):
        both = logprobs.chunked_logprobs(
            hidden, weight, targets, bias=bias, chunk_tokens=3, entropy_grad=entropy_grad,
            temperature=mode["temperature"], softcap=mode["softcap"],
        )  # fmt: skip
        return both if entropy_grad else both[0]

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@settings(max_examples=20)
@given(
    num_tokens=st.integers(0, 9), chunk_tokens=st.integers(1, 10), block_logits=st.integers(1, 60),
    mode=st.sampled_from(MODES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_chunk_and_block_equal_the_full_logits(num_tokens, chunk_tokens, block_logits, mode, seed):
    """Values, and gradients of hidden, weight and bias, with the entropy's."""
    hidden, weight, bias, targets = make_head(num_tokens, seed=seed)
    tensors = (hidden, weight, bias if mode["bias"] else None, targets)
    coefficients = torch.randn(2, num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = dict(temperature=mode["temperature"], softcap=mode["softcap"])
    chunked = dict(options, chunk_tokens=chunk_tokens, entropy_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CPU_BLOCK_LOGITS", block_logits)
        values = logprobs.chunked_logprobs(hidden, weight, targets, bias=tensors[2], **chunked)
        ours = gradients(logprobs.chunked_logprobs, tensors, coefficients, **chunked)
        frozen = hidden.clone().requires_grad_()
        both = logprobs.chunked_logprobs(frozen, weight, targets, bias=tensors[2], **chunked)
        (coefficients[0] * both[0] + coefficients[1] * both[1]).sum().backward()
    torch.testing.assert_close(values, full_logprobs(hidden, weight, targets, bias=tensors[2], **options))
    expected = gradients(full_logprobs, tensors, coefficients, **options)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(frozen.grad, expected[0])


@pytest.mark.parametrize("head_in_training", [False, True])
def test_bfloat16_is_as_close_as_autograd_and_statistics_are_float32(head_in_training):
    hidden, weight, _, targets = make_head(64, 32, 200, dtype=torch.bfloat16)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    full_logprobs(exact_hidden, exact_weight, targets)[0].sum().backward()
    hidden.requires_grad_()
    weight.requires_grad_(head_in_training)
    logprob, entropy = logprobs.chunked_logprobs(hidden, weight, targets, chunk_tokens=10)
    logprob.sum().backward()
    assert logprob.dtype == entropy.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    error = (hidden.grad.double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()
    assert error < 0.02
    if head_in_training:
        assert weight.grad.dtype == torch.bfloat16
        assert (weight.grad.double() - exact_weight.grad).norm() / exact_weight.grad.norm() < 0.02


def test_confident_tokens_keep_their_small_gradient_in_bfloat16():
    """p(y) = 0.9997: the rounded small difference, not the difference of rounded numbers, which would be 0.

    Two roundings to bfloat16, of 2^-9 each, are all that is lost.
    """
    hidden = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 1.0], [0.0, -1.0]], dtype=torch.bfloat16)
    logprobs.chunked_logprobs(hidden, weight, torch.tensor([0]))[0].sum().backward()
    other = 1 / (1 + math.exp(8.0))
    assert hidden.grad[0].float().tolist() == pytest.approx([other, 2 * other], rel=2**-7)


def test_entropy_carries_no_gradient_unless_asked():
    hidden, weight, _, targets = make_head()
    hidden.requires_grad_()
    logprob, entropy = logprobs.chunked_logprobs(hidden, weight, targets)
    assert logprob.requires_grad
    assert not entropy.requires_grad
    assert logprobs.chunked_logprobs(hidden, weight, targets, entropy_grad=True)[1].requires_grad


def test_scoring_computes_nothing_for_a_gradient():
    hidden, weight, _, targets = make_head()
    with torch.no_grad():
        logprob, _ = logprobs.chunked_logprobs(hidden.requires_grad_(), weight, targets)
    assert not logprob.requires_grad
    assert torch.equal(logprob, logprobs.chunked_logprobs(hidden, weight, targets)[0])


def test_inputs_are_not_written_to():
    hidden, weight, bias, targets = make_head(dtype=torch.float32)
    copies = hidden.clone(), weight.clone(), bias.clone()
    gradients(logprobs.chunked_logprobs, (hidden, weight, bias, targets), torch.ones(2, 7), softcap=2.0)
    logprobs.chunked_logprobs(hidden.requires_grad_(), weight, targets, bias=bias)[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, bias), copies, strict=True))


@pytest.mark.parametrize("head_in_training", [False, True])
def test_never_more_than_a_chunk_of_logits(head_in_training):
    """No tensor in the forward or the backward pass has as many elements as two chunks of logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight, _, targets = make_head(64, 4, 300)
    weight.requires_grad_(head_in_training)
    with Watch():
        both = logprobs.chunked_logprobs(hidden.requires_grad_(), weight, targets, chunk_tokens=8, entropy_grad=True)
        (both[0] + both[1]).sum().backward()
    assert largest == 8 * 300


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    logprob, entropy = logprobs.chunked_logprobs(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0]))
    logprob.sum().backward()
    assert logprob.tolist() == [0.0, -1e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert hidden.grad.tolist() == [[0.0], [1.0]]


def test_head_logits_are_float32_and_take_a_head_of_another_dtype():
    hidden, weight, bias, _ = make_head(dtype=torch.bfloat16)
    logits = logprobs.head_logits(hidden, weight.float(), bias=bias, softcap=2.0)
    assert logits.dtype == torch.float32
    expected = 2 * torch.tanh(((hidden @ weight.T).float() + bias.float()) / 2)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("options", "message"), [(dict(temperature=0.0), "temperature is 0.0"), (dict(chunk_tokens=0), "chunk_tokens is 0")]
)
def test_impossible_options_are_refused(options, message):
    hidden, weight, _, targets = make_head()
    with pytest.raises(ValueError, match=message):
        logprobs.chunked_logprobs(hidden, weight, targets, **options)


def test_a_chunk_has_more_tokens_on_a_gpu_and_the_float32_logits_of_a_block_are_bounded():
    assert logprobs.default_chunk_tokens("cpu") == 512 and logprobs.default_chunk_tokens("cuda") == 2048
    assert logprobs.block_rows(2**17, "cuda") == 512 and logprobs.block_rows(2**30, "cuda") == 1
    assert logprobs.block_rows(2**17, "cpu") == max(1, 2 * torch.get_num_threads())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_a_total_in_the_totals_dtype(dtype):
    left, right = torch.randn(7, 5).to(dtype), torch.randn(5, 3).to(dtype)
    total = torch.randn(7, 3)
    expected = total + left.float() @ right.float()
    logprobs._add_product(total, left, right)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)
