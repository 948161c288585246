"""GRPO and its family: the advantage of a completion is its reward against those of its own group; no critic.

GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), RLOO (arXiv:2402.14740), REINFORCE++
(arXiv:2501.03262), GSPO (arXiv:2507.18071), CISPO (arXiv:2506.13585): combinations of an advantage, a surrogate and a
reduction, named by `GRPOConfig.recipe`.

With the KL in the reward, most of these treat a completion as one action, as RLOO does: all of its KL is taken off its
reward before the reward is compared with others. REINFORCE++ credits tokens: each pays for the KL from itself to the
end, and all tokens of the step are whitened together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.config.policy_gradient import TOKEN_ADVANTAGES
from alignlab.config.trainers import GRPOConfig
from alignlab.functional import advantages as advantage_functions
from alignlab.functional.kl import kl_k1
from alignlab.functional.reduction import sequence_sum
from alignlab.functional.shaping import overlong_penalty
from alignlab.loop.algorithm import Credit, minibatch_slices, rewards_of
from alignlab.loop.credit import sequence_means, spread, trained_part, whiten
from alignlab.loop.loss_weights import LossWeights, constant, sequence_mean, token_mean
from alignlab.loop.online import OnlineTrainer
from alignlab.loop.reward_checks import is_compared_over_step
from alignlab.loop.rollout_metrics import extremes
from alignlab.trainers.policy_gradient import PolicyGradientAlgorithm
from alignlab.types import Experience, Rollout


class GRPO(PolicyGradientAlgorithm):
    """Group-relative policy optimisation; see `GRPOConfig` for what its family differs in."""

    config: GRPOConfig

    @property
    def num_rounds(self) -> int:
        """Rounds of sampling in a step: under dynamic sampling, groups without a signal are replaced."""
        return 1 + (self.config.max_refills if self.config.dynamic_sampling else 0)

    def has_signal(self, rollout: Rollout) -> bool:
        """Return whether a group is kept: under dynamic sampling, where its rewards differ."""
        is_mixed = advantage_functions.mixed_groups(rewards_of([rollout]))
        return bool(is_mixed) or not self.config.dynamic_sampling

    def signal_groups(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which groups [P] hold a completion whose reward less its baseline, the KL aside, is not zero."""
        rewards = self.shaped_rewards(rollouts)
        is_trained = self.trained_completions(rollouts)
        if is_compared_over_step(self.config):
            low, high = extremes(rewards, self.ranks.gather)
            return is_trained.any(dim=1) & (low < high)
        return ((advantage_functions.group_centered(rewards) != 0) & is_trained).any(dim=1)

    @property
    def loss_weights(self) -> LossWeights:
        """The reduction of `config.reduction`."""
        if self.config.reduction == "constant":
            return constant(self.config.sampling.max_new_tokens)
        return {"token_mean": token_mean, "sequence_mean": sequence_mean}[self.config.reduction]

    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return one advantage for all tokens of a completion, unless `config.advantage` tells its tokens apart."""
        if self.config.advantage in TOKEN_ADVANTAGES:
            return self._credit_tokens(rollouts, minibatches)
        advantages = self.advantages(rollouts, minibatches).to(self.learner.device)
        trainable = self.trainable_mask(rollouts).to(self.learner.device)
        parts = minibatch_slices(len(rollouts), self.config.num_minibatches)
        return Credit(
            advantages,
            [
                [spread(pack, advantages[part].flatten(), trainable[part].flatten()) for pack in packs]
                for part, packs in zip(parts, minibatches, strict=True)
            ],
        )

    def advantages(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Tensor:
        """Return the advantage [P, G] of each completion; 0 where it has no reward."""
        rewards = self.shaped_rewards(rollouts)
        if self.objective.prices_kl:
            count = rewards.numel() // len(minibatches)
            rewards = rewards - self._price_of_kl(minibatches, count).view_as(rewards)
        if self.config.advantage == "batch_whitened":
            all_rewards = self.ranks.gather(rewards)
            first = self.ranks.index * len(rollouts)
            return advantage_functions.batch_whitened(all_rewards)[first : first + len(rollouts)]
        return getattr(advantage_functions, self.config.advantage)(rewards)

    def shaped_rewards(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return the reward [P, G] of each completion, less the penalty for its length; nan where it has none."""
        rewards = rewards_of(rollouts)
        if self.config.overlong_buffer_tokens is None:
            return rewards
        lengths = torch.tensor([len(c.token_ids) for rollout in rollouts for c in rollout.completions])
        penalty = overlong_penalty(
            lengths,
            max_tokens=self.config.sampling.max_new_tokens,
            buffer_tokens=self.config.overlong_buffer_tokens,
            factor=self.config.overlong_penalty,
        )
        return rewards + penalty.view_as(rewards)

    def _price_of_kl(self, minibatches: Sequence[Sequence[Experience]], count: int) -> Tensor:
        """Return the price of each completion's KL in reward [P * G]; moves an adaptive coefficient afterwards.

        Args:
            count: completions of a mini-batch, those of no tokens included.
        """
        per_minibatch = [_sequence_kl(packs, count) for packs in minibatches]
        kl = torch.cat([values for values, _ in per_minibatch])
        tokens = torch.cat([counts for _, counts in per_minibatch])
        price = kl * self.objective.kl_coef if self.config.kl.placement == "reward" else torch.zeros_like(kl)
        if self.config.kl.target is not None:
            totals = self.ranks.sum(torch.stack([kl.sum(), tokens.sum(), torch.tensor(float(len(kl)))]))
            total_kl, num_tokens, num_samples = totals.tolist()
            self.objective.adapt(total_kl / max(num_tokens, 1.0), int(num_samples))
        return price

    def _credit_tokens(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return an advantage for each token, see `rewards_to_go`; a completion's is the mean of its tokens'."""
        rewards = self.shaped_rewards(rollouts)
        if self.config.advantage == "group_centered_whitened":
            rewards = advantage_functions.group_centered(rewards)
        rewards = rewards.nan_to_num(0.0).to(self.learner.device)
        trainable = self.trainable_mask(rollouts).to(self.learner.device)
        in_reward = self.objective.prices_kl and self.config.kl.placement == "reward"
        coef = self.objective.kl_coef if in_reward else 0.0
        parts = minibatch_slices(len(rollouts), self.config.num_minibatches)
        credited = [
            [_with_returns(pack, rewards[part].flatten(), trainable[part].flatten(), coef) for pack in packs]
            for part, packs in zip(parts, minibatches, strict=True)
        ]
        if self.objective.prices_kl:
            self._price_of_kl(minibatches, rewards.numel() // len(minibatches))  # moves an adaptive coefficient
        credited = whiten(credited, self.ranks.sum)
        means = [sequence_means(packs, rewards[part].numel()) for part, packs in zip(parts, credited, strict=True)]
        return Credit(torch.cat(means).view_as(rewards), credited)


class GRPOTrainer(OnlineTrainer):
    """Trainer of GRPO and its family; arguments are `OnlineTrainer`'s."""

    config: GRPOConfig
    algorithm_class = GRPO


def _sequence_kl(packs: Sequence[Experience], num_sequences: int) -> tuple[Tensor, Tensor]:
    """Return the KL to the reference (k1) and the trained tokens of each sequence [B], on the host."""
    kl, tokens = torch.zeros(num_sequences), torch.zeros(num_sequences)
    for pack in packs:
        assert pack.old_logprobs is not None and pack.ref_logprobs is not None
        mask, sequence_ids = pack.completion_mask, pack.segments.sequence_of_token
        values = torch.where(mask, kl_k1(pack.old_logprobs, pack.ref_logprobs), 0.0)
        kl += sequence_sum(values, sequence_ids, num_sequences=num_sequences).cpu()
        tokens += sequence_sum(mask.float(), sequence_ids, num_sequences=num_sequences).cpu()
    return kl, tokens


def _with_returns(pack: Experience, rewards: Tensor, trainable: Tensor, kl_coef: float) -> Experience:
    """Return the pack with the return of each token, of the sequences [B] that are trainable."""
    masked = trained_part(pack, trainable)
    kl = torch.zeros(pack.num_tokens, device=pack.tokens.device)
    if kl_coef > 0:
        assert pack.old_logprobs is not None and pack.ref_logprobs is not None
        kl = kl_k1(pack.old_logprobs, pack.ref_logprobs)
    returns = advantage_functions.rewards_to_go(
        rewards, kl, mask=masked.completion_mask, sequence_ids=pack.segments.sequence_of_token, kl_coef=kl_coef
    )
    return replace(masked, advantages=returns)
