import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignlab.functional.mismatch import mismatch_weights
from tests.reference import functional as twin

OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0, -1.0])
MU = torch.tensor([-1.0, -3.0, -0.2, -1.0, -1.1, -0.9])
RATIOS = [math.exp(gap) for gap in (0.0, 1.0, -0.3, -2.0, 0.1, -0.1)]
IDS = torch.tensor([-1, 0, 0, 0, 1, 1])
MASK = torch.tensor([False, True, True, False, True, True])
WHERE = {"mask": MASK, "sequence_ids": IDS, "num_sequences": 2}


def weights_of(correction, old, mu, **options):
    """Weights where, unless `options` say otherwise, all tokens are sampled and of one sequence."""
    where = {"mask": torch.ones(len(old), dtype=torch.bool), "sequence_ids": torch.zeros(len(old), dtype=torch.long)}
    return mismatch_weights(correction, old, mu, **{**where, "num_sequences": 1, **options})


def test_token_tis_caps_from_above_alone():
    weights = weights_of("token_tis", OLD, MU, high=2.0)
    assert weights.tolist() == pytest.approx([min(ratio, 2.0) for ratio in RATIOS])
    assert weights[1] == 2.0 and weights[3] < 0.2


def test_icepop_drops_what_is_outside_and_weighs_the_rest():
    weights = weights_of("icepop", OLD, MU, low=0.5, high=2.5)
    assert weights.tolist() == pytest.approx([r if 0.5 <= r <= 2.5 else 0.0 for r in RATIOS])
    assert (weights == 0).tolist() == [False, True, False, True, False, False]


def test_token_mask_keeps_a_weight_of_1_within_the_bounds():
    weights = weights_of("token_mask", OLD, MU, low=0.5, high=2.5)
    assert weights.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_sequence_mis_weighs_what_sequence_mask_keeps():
    bounds = {"low": 0.4, "high": 2.1}
    weights = weights_of("sequence_mis", OLD, MU, **WHERE, **bounds)
    assert weights.tolist() == pytest.approx([1.0] + [math.exp(0.7)] * 3 + [1.0] * 2)
    bounds["high"] = 2.0
    assert weights_of("sequence_mis", OLD, MU, **WHERE, **bounds).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    low = weights_of("sequence_mis", MU, OLD, **WHERE, low=0.0, high=2.0)
    assert low[1:4].tolist() == pytest.approx([math.exp(-0.7)] * 3)


def test_sequence_tis_caps_the_sequence_s_ratio_from_above_alone():
    assert weights_of("sequence_tis", OLD, MU, **WHERE, high=2.0).tolist() == [1.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert weights_of("sequence_tis", MU, OLD, **WHERE, high=2.0)[1:4].tolist() == pytest.approx([math.exp(-0.7)] * 3)


def test_geometric_mis_weighs_by_the_mean():
    weights = weights_of("geometric_mis", OLD, MU, **WHERE, low=0.4, high=1.5)
    assert weights.tolist() == pytest.approx([1.0] + [math.exp(0.35)] * 3 + [1.0] * 2)
    assert weights_of("geometric_mis", OLD, MU, **WHERE, low=0.4, high=1.4)[1:4].tolist() == [0.0] * 3


@given(
    st.lists(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=5), min_size=1, max_size=4),
    st.floats(0.05, 0.95), st.floats(1.05, 4.0),
)
def test_every_correction_equals_its_slow_twin(sequences, low, high):
    gaps = torch.tensor([gap for sequence in sequences for gap in sequence], dtype=torch.float64)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.arange(len(sequences)).repeat_interleave(lengths)
    where = {"mask": torch.ones(len(gaps), dtype=torch.bool), "sequence_ids": ids, "num_sequences": len(sequences)}
    mu = torch.zeros_like(gaps)
    bounds = {"low": low, "high": high}
    weights = {
        "token_tis": weights_of("token_tis", gaps, mu, high=high),
        "token_mis": weights_of("icepop", gaps, mu, **bounds),
        "token_mask": weights_of("token_mask", gaps, mu, **bounds),
        "sequence_tis": weights_of("sequence_tis", gaps, mu, **where, high=high),
        "sequence_mis": weights_of("sequence_mis", gaps, mu, **where, **bounds),
        "sequence_mask": weights_of("sequence_mask", gaps, mu, **where, **bounds),
        "geometric_mis": weights_of("geometric_mis", gaps, mu, **where, **bounds),
        "geometric_mask": weights_of("geometric_mask", gaps, mu, **where, **bounds),
    }
    for name, found in weights.items():
        expected = [
            twin.mismatch_weight(name, sequence, t, low, high) for sequence in sequences for t in range(len(sequence))
        ]
        assert found.tolist() == pytest.approx(expected, rel=1e-9), name


def test_masked_importance_sampling_is_unbiased_where_nothing_is_outside():
    """E_mu[w f] = E_old[f] for a completion drawn from mu: true of the weight, not of the mask alone."""
    old, mu, f = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 3.0])
    where = {"mask": torch.ones(2, dtype=torch.bool), "sequence_ids": torch.arange(2), "num_sequences": 2}
    bounds = {"low": 0.1, "high": 9.0}
    weighted = (mu.exp() * weights_of("sequence_mis", old, mu, **where, **bounds) * f).sum()
    masked = (mu.exp() * weights_of("sequence_mask", old, mu, **where, **bounds) * f).sum()
    assert weighted.item() == pytest.approx((old.exp() * f).sum().item())
    assert masked.item() == pytest.approx(2.0)


def test_sequence_mask_sums_masked_tokens():
    # The sums are 1.0 - 0.3 = 0.7 (the third of the sequence's tokens is not trained), and 0.
    inside, outside = ({"low": 0.4, "high": math.exp(0.7) + d} for d in (1e-3, -1e-3))
    assert weights_of("sequence_mask", OLD, MU, **WHERE, **inside).tolist() == [1.0] * 6
    assert weights_of("sequence_mask", OLD, MU, **WHERE, **outside).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    low = {"low": math.exp(-0.7) + 1e-3, "high": 9.0}
    assert weights_of("sequence_mask", MU, OLD, **WHERE, **low).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_geometric_mask_divides_by_the_length():
    inside, outside = ({"low": 0.4, "high": math.exp(0.35) + d} for d in (1e-3, -1e-3))
    assert weights_of("geometric_mask", OLD, MU, **WHERE, **inside).tolist() == [1.0] * 6
    assert weights_of("geometric_mask", OLD, MU, **WHERE, **outside).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_long_sequences_go_first_by_the_sum_and_not_by_the_mean():
    gap = torch.full((40,), 0.05)
    for length, kept in ((10, 1.0), (40, 0.0)):
        where = {"mask": torch.ones(length, dtype=torch.bool), "sequence_ids": torch.zeros(length, dtype=torch.long)}
        bounds = {"num_sequences": 1, "low": 0.5, "high": 2.0}
        by_sum, by_mean = (
            weights_of(name, gap[:length], 0 * gap[:length], **where, **bounds)
            for name in ("sequence_mask", "geometric_mask")
        )
        assert by_sum.unique().tolist() == [kept] and by_mean.unique().tolist() == [1.0]


def test_agreement_weighs_1_and_no_weight_carries_a_gradient():
    old = OLD.clone().requires_grad_()
    bounds = {"low": 0.5, "high": 5.0}
    found = [
        weights_of("token_tis", old, OLD, high=2.0),
        weights_of("icepop", old, OLD, **bounds),
        weights_of("token_mask", old, OLD, **bounds),
        weights_of("sequence_tis", old, OLD, **WHERE, high=2.0),
        weights_of("sequence_mis", old, OLD, **WHERE, **bounds),
        weights_of("sequence_mask", old, OLD, **WHERE, **bounds),
        weights_of("geometric_mis", old, OLD, **WHERE, **bounds),
        weights_of("geometric_mask", old, OLD, **WHERE, **bounds),
    ]
    for weights in found:
        assert weights.tolist() == [1.0] * 6
        assert not weights.requires_grad


def test_a_huge_gap_stays_finite():
    far = torch.tensor([0.0, -900.0])
    assert weights_of("token_tis", far, far.flip(0), high=2.0).tolist() == [2.0, 0.0]
    assert weights_of("icepop", far, far.flip(0), low=0.5, high=5.0).tolist() == [0.0, 0.0]
    one = {"mask": torch.tensor([True]), "sequence_ids": torch.tensor([0]), "num_sequences": 1}
    assert weights_of("sequence_mis", far[:1], far[1:], **one, low=0.5, high=2.0).tolist() == [0.0]
