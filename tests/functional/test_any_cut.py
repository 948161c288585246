"""Any cut of a step into packs gives the same gradient: every surrogate, every KL estimator, every reduction."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.functional import kl, logprobs, policy_losses, reduction

VOCABULARY, HIDDEN, MAX_TOKENS = 7, 4, 6
SURROGATES = ("ppo_clip", "dual_clip", "gspo_clip", "cispo", "reinforce")
REDUCTIONS = ("token_mean", "sequence_mean", "constant")
ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Step:
    """All sequences of a step, each tensor a list with one entry a sequence; the first token of each is its prompt."""

    tokens: list[torch.Tensor]
    masks: list[torch.Tensor]
    shifts: list[torch.Tensor]
    """old_logprobs and ref_logprobs, as distances from the policy's: [2, n]."""
    advantages: list[float]

    @property
    def num_sequences(self):
        return len(self.tokens)

    @functools.cached_property
    def sequence_tokens(self):
        return torch.stack([mask.sum() for mask in self.masks])


def random_step(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (n + 1,), generator=generator) for n in lengths]
    masks = [torch.cat([torch.tensor([False]), torch.rand(n, generator=generator) > 0.2]) for n in lengths]
    masks[0][1] = True
    shifts = [0.5 * torch.randn(2, n + 1, generator=generator, dtype=torch.float64) for n in lengths]
    return Step(tokens, masks, shifts, torch.randn(len(lengths), generator=generator).tolist())


def surrogate_loss(name, logprob, old, advantages, mask, ids, num_sequences):
    clip = dict(clip_low=0.2, clip_high=0.28)
    if name == "gspo_clip":
        where = dict(mask=mask, sequence_ids=ids, num_sequences=num_sequences)
        return policy_losses.gspo_clip(logprob, old, advantages, **where, **clip)[0]
    if name == "cispo":
        return policy_losses.cispo(logprob, old, advantages, clip_high=0.28)[0]
    if name == "reinforce":
        return policy_losses.reinforce(logprob, advantages)[0]
    return policy_losses.ppo_clip(logprob, old, advantages, **clip, dual_clip=1.5 if name == "dual_clip" else None)[0]


def reduction_weights(name, mask, ids, step):
    if name == "token_mean":
        return reduction.token_mean_weights(mask, num_tokens=int(step.sequence_tokens.sum()))
    if name == "sequence_mean":
        return reduction.sequence_mean_weights(mask, ids, step.sequence_tokens, num_sequences=step.num_sequences)
    return reduction.constant_weights(mask, num_sequences=step.num_sequences, max_tokens=MAX_TOKENS)


def pack_loss(members, step, embedding, head, surrogate, estimator, reduce):
    """Loss of the pack that holds the sequences `members`, through a bigram model."""
    tokens = torch.cat([step.tokens[b] for b in members])
    mask = torch.cat([step.masks[b] for b in members])
    shifts = torch.cat([step.shifts[b] for b in members], dim=1)
    lengths = torch.tensor([len(step.tokens[b]) for b in members])
    ids = torch.tensor(members).repeat_interleave(lengths)
    advantages = torch.tensor(step.advantages, dtype=torch.float64)[ids] * mask
    where = mask.nonzero()[:, 0]
    chosen, spread = logprobs.chunked_logprobs(
        embedding[tokens[where - 1]], head, tokens[where], chunk_tokens=3, entropy_grad=True, temperature=0.9
    )
    zeros = torch.zeros(len(tokens), dtype=torch.float64)
    logprob, entropy = zeros.index_put((where,), chosen), zeros.index_put((where,), spread)
    old, ref = (logprob.detach() + shift * mask for shift in shifts)
    loss = surrogate_loss(surrogate, logprob, old, advantages, mask, ids, step.num_sequences)
    loss = loss + 0.3 * kl.kl_loss(logprob, ref, old, estimator=estimator) - 0.1 * entropy
    return (loss * reduction_weights(reduce, mask, ids, step)).sum()


def step_gradient(packs, step, seed, *what):
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    ]
    for members in packs:
        pack_loss(members, step, *parameters, *what).backward()
    return [p.grad for p in parameters]


@st.composite
def cuts(draw):
    """Lengths of the sequences, and two ways to deal them to packs, in any order."""
    lengths = draw(st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(lengths))))
    pack_of = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    packs = [[b for b in order if pack_of[b] == pack] for pack in range(4)]
    return lengths, [pack for pack in packs if pack]


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@settings(max_examples=8)
@given(cut=cuts(), estimator=st.sampled_from(ESTIMATORS), seed=st.integers(0, 999))
def test_any_cut_gives_the_same_gradient(surrogate, reduce, cut, estimator, seed):
    lengths, packs = cut
    step = random_step(lengths, seed)
    whole = step_gradient([list(range(len(lengths)))], step, seed, surrogate, estimator, reduce)
    parts = step_gradient(packs, step, seed, surrogate, estimator, reduce)
    assert max(g.abs().max() for g in whole) > 1e-6
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)


def test_averaging_pack_by_pack_would_depend_on_the_cut():
    """Averaging the packs' means gives another number, which is why losses have weights of the whole step."""
    loss, mask = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.ones(4, dtype=torch.bool)
    weighted = [(loss[p] * reduction.token_mean_weights(mask[p], num_tokens=4)).sum() for p in (slice(3), slice(3, 4))]
    assert sum(weighted).item() == loss.mean().item() == 2.0
    assert (loss[:3].mean() + loss[3:].mean()).item() / 2 == 3.0
