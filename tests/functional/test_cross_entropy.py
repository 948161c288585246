"""The loss of supervised learning: by hand, by slow and full twins, its gradient, and any cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional import logprobs
from alignlab.functional.cross_entropy import chunked_cross_entropy
from tests.functional.test_logprobs import MODES, make_head
from tests.reference import functional as twin

LOSSES = [
    dict(label_weight=1.0, label_smoothing=0.0, z_loss_coef=0.0),
    dict(label_weight=1.0, label_smoothing=0.3, z_loss_coef=0.0),
    dict(label_weight=1.0, label_smoothing=0.0, z_loss_coef=0.2),
    dict(label_weight=0.0, label_smoothing=0.0, z_loss_coef=0.2),
    dict(label_weight=0.4, label_smoothing=0.3, z_loss_coef=0.2),
]


def options_of(mode):
    return dict(temperature=mode["temperature"], softcap=mode["softcap"])


def full_cross_entropy(
    hidden, weight, targets, *, label_weight, label_smoothing, z_loss_coef, bias=None, temperature=1.0, softcap=None
):
    """The twin with all logits at once, for autograd to differentiate."""
    logits = logprobs.head_logits(hidden, weight, bias=bias, softcap=softcap) / temperature
    labels = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return label_weight * labels + z_loss_coef * logits.logsumexp(-1).square()


def test_smoothed_loss_of_one_token_by_hand():
    """p = (3/4, 1/4), the label (0.9, 0.1): eps = 0.2 over two ids gives each a tenth."""
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.log(3.0), 9.0], [0.0, 9.0]])
    smoothed = chunked_cross_entropy(hidden, weight, torch.tensor([0]), label_smoothing=0.2)
    assert smoothed.loss.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    assert smoothed.logprobs.item() == pytest.approx(math.log(0.75))
    assert smoothed.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_gradient_of_one_token_by_hand():
    """With one hidden dimension of 1 the gradient of the hidden state is sum_v W_v (p_v - q_v)."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    chunked_cross_entropy(hidden, weight, torch.tensor([1]), label_smoothing=0.2).loss.sum().backward()
    assert hidden.grad.item() == pytest.approx(math.log(3.0) * (0.75 - 0.1))


def test_z_loss_of_one_token_by_hand():
    """Logits log 3 and 0: Z = 4, p = (3/4, 1/4), and d / dz = (1 + 2 c log 4) p - onehot."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    result = chunked_cross_entropy(hidden, weight, torch.tensor([1]), z_loss_coef=0.5)
    assert result.loss.item() == pytest.approx(math.log(4.0) + 0.5 * math.log(4.0) ** 2)
    assert result.log_normalizer.item() == pytest.approx(math.log(4.0))
    result.loss.sum().backward()
    assert hidden.grad.item() == pytest.approx(math.log(3.0) * (1 + math.log(4.0)) * 0.75)


def test_z_loss_alone_pays_for_both_signs_of_log_z():
    """Logits of -5 for two ids: log Z = log 2 - 5 < 0; the loss falls as the logits rise."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.full((2, 1), -5.0, dtype=torch.float64)
    result = chunked_cross_entropy(hidden, weight, torch.tensor([1]), label_weight=0.0, z_loss_coef=1.0)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx((math.log(2.0) - 5.0) ** 2)
    assert hidden.grad.item() == pytest.approx(2 * (math.log(2.0) - 5.0) * -5.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_equal_to_the_slow_twin(mode, loss):
    hidden, weight, bias, targets = make_head()
    bias = bias if mode["bias"] else None
    ours = chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk_tokens=3, **loss, **options_of(mode)).loss
    for i, target in enumerate(targets.tolist()):
        logits = logprobs.head_logits(hidden[i : i + 1], weight, bias=bias, softcap=mode["softcap"])[0]
        expected = twin.label_loss((logits / mode["temperature"]).tolist(), target, **loss)
        assert ours[i].item() == pytest.approx(expected, rel=1e-12)


def test_without_smoothing_the_loss_is_minus_the_log_prob_to_the_bit():
    hidden, weight, bias, targets = make_head(dtype=torch.float32)
    expected, entropy = logprobs.chunked_logprobs(hidden, weight, targets, bias=bias)
    ours = chunked_cross_entropy(hidden, weight, targets, bias=bias)
    assert torch.equal(ours.loss, -expected)
    assert torch.equal(ours.logprobs, expected) and torch.equal(ours.entropy, entropy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("head_in_training", [False, True])
def test_gradcheck(mode, loss, head_in_training):
    hidden, weight, bias, targets = make_head(num_tokens=4, hidden_size=3, vocabulary=6)
    hidden.requires_grad_()
    weight.requires_grad_(head_in_training)
    bias = bias.requires_grad_(head_in_training) if mode["bias"] else None

    def function(hidden, weight, bias):
        return chunked_cross_entropy(
            hidden, weight, targets, bias=bias, chunk_tokens=3, **loss, **options_of(mode)
        ).loss

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@settings(max_examples=20)
@given(
    num_tokens=st.integers(0, 9), chunk_tokens=st.integers(1, 10), block_logits=st.integers(1, 60),
    mode=st.sampled_from(MODES), loss=st.sampled_from(LOSSES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_chunk_and_block_equal_the_full_logits(num_tokens, chunk_tokens, block_logits, mode, loss, seed):
    """Values, and gradients of hidden, weight and bias, with a trained head and with a frozen one."""
    hidden, weight, bias, targets = make_head(num_tokens, seed=seed)
    coefficients = torch.randn(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def both(function, head_in_training, **more):
        leaves = [t.clone().requires_grad_(t is hidden or head_in_training) for t in (hidden, weight, bias)]
        result = function(*leaves[:2], targets, bias=leaves[2] if mode["bias"] else None, **more)
        values = result if isinstance(result, torch.Tensor) else result.loss
        (coefficients * values).sum().backward()
        return [values.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for head_in_training in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logprobs, "CPU_BLOCK_LOGITS", block_logits)
            ours = both(
                chunked_cross_entropy, head_in_training, chunk_tokens=chunk_tokens, **loss, **options_of(mode)
            )
        expected = both(full_cross_entropy, head_in_training, **loss, **options_of(mode))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("head_in_training", [False, True])
def test_never_more_than_a_chunk_of_logits(head_in_training):
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
        ours = chunked_cross_entropy(hidden.requires_grad_(), weight, targets, chunk_tokens=8, **LOSSES[-1])
        ours.loss.sum().backward()
    assert largest == 8 * 300


def test_log_probs_and_entropy_carry_no_gradient():
    hidden, weight, _, targets = make_head()
    ours = chunked_cross_entropy(hidden.requires_grad_(), weight, targets, label_smoothing=0.1)
    assert [values.requires_grad for values in ours] == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(label_smoothing=1.0), r"label_smoothing is 1\.0"), (dict(label_smoothing=-0.1), r"is -0\.1"),
        (dict(z_loss_coef=-1.0), r"z_loss_coef is -1\.0"), (dict(label_weight=-1.0), r"label_weight is -1\.0"),
        (dict(temperature=0.0), "temperature is 0.0"), (dict(chunk_tokens=0), "chunk_tokens is 0"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options, message):
    hidden, weight, _, targets = make_head()
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(hidden, weight, targets, **options)
