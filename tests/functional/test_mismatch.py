import math

import pytest
import torch

from alignlab.functional import mismatch

OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0, -1.0])
MU = torch.tensor([-1.0, -3.0, -0.2, -1.0, -1.1, -0.9])
RATIOS = [math.exp(gap) for gap in (0.0, 1.0, -0.3, -2.0, 0.1, -0.1)]
IDS = torch.tensor([-1, 0, 0, 0, 1, 1])
MASK = torch.tensor([False, True, True, False, True, True])
WHERE = {"mask": MASK, "sequence_ids": IDS, "num_sequences": 2}


def test_token_tis_caps_from_above_alone():
    weights = mismatch.token_tis(OLD, MU, cap=2.0)
    assert weights.tolist() == pytest.approx([min(ratio, 2.0) for ratio in RATIOS])
    assert weights[1] == 2.0 and weights[3] < 0.2


def test_icepop_drops_what_is_outside_and_weighs_the_rest():
    weights = mismatch.icepop(OLD, MU, low=0.5, high=2.5)
    assert weights.tolist() == pytest.approx([r if 0.5 <= r <= 2.5 else 0.0 for r in RATIOS])
    assert (weights == 0).tolist() == [False, True, False, True, False, False]


def test_sequence_mask_sums_masked_tokens():
    # The sums are 1.0 - 0.3 = 0.7 (the third of the sequence's tokens is not trained), and 0.
    inside, outside = ({"low": 0.4, "high": math.exp(0.7) + d} for d in (1e-3, -1e-3))
    assert mismatch.sequence_mask(OLD, MU, **WHERE, **inside).tolist() == [1.0] * 6
    assert mismatch.sequence_mask(OLD, MU, **WHERE, **outside).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    low = {"low": math.exp(-0.7) + 1e-3, "high": 9.0}
    assert mismatch.sequence_mask(MU, OLD, **WHERE, **low).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_geometric_mask_divides_by_the_length():
    inside, outside = ({"low": 0.4, "high": math.exp(0.35) + d} for d in (1e-3, -1e-3))
    assert mismatch.geometric_mask(OLD, MU, **WHERE, **inside).tolist() == [1.0] * 6
    assert mismatch.geometric_mask(OLD, MU, **WHERE, **outside).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_long_sequences_go_first_by_the_sum_and_not_by_the_mean():
    gap = torch.full((40,), 0.05)
    for length, kept in ((10, 1.0), (40, 0.0)):
        where = {"mask": torch.ones(length, dtype=torch.bool), "sequence_ids": torch.zeros(length, dtype=torch.long)}
        bounds = {"num_sequences": 1, "low": 0.5, "high": 2.0}
        assert mismatch.sequence_mask(gap[:length], 0 * gap[:length], **where, **bounds).unique().tolist() == [kept]
        assert mismatch.geometric_mask(gap[:length], 0 * gap[:length], **where, **bounds).unique().tolist() == [1.0]


def test_agreement_weighs_1_and_no_weight_carries_a_gradient():
    old = OLD.clone().requires_grad_()
    bounds = {"low": 0.5, "high": 5.0}
    found = [
        mismatch.token_tis(old, OLD, cap=2.0),
        mismatch.icepop(old, OLD, **bounds),
        mismatch.sequence_mask(old, OLD, **WHERE, **bounds),
        mismatch.geometric_mask(old, OLD, **WHERE, **bounds),
    ]
    for weights in found:
        assert weights.tolist() == [1.0] * 6
        assert not weights.requires_grad


def test_a_hopeless_gap_stays_finite():
    far = torch.tensor([0.0, -900.0])
    assert mismatch.token_tis(far, far.flip(0), cap=2.0).tolist() == [2.0, 0.0]
    assert mismatch.icepop(far, far.flip(0), low=0.5, high=5.0).tolist() == [0.0, 0.0]
