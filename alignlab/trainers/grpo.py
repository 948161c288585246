"""GRPO and its family: the advantage of a completion is its reward against those of its own group; no critic.

GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), RLOO (arXiv:2402.14740), REINFORCE++
(arXiv:2501.03262), GSPO (arXiv:2507.18071), CISPO (arXiv:2506.13585): combinations of an advantage, a surrogate and a
reduction, named by `GRPOConfig.recipe`.

With the KL in the reward, most of these treat a completion as one action, as RLOO does: all of its KL is taken off its
reward before it is compared with others. REINFORCE++ credits tokens: each pays for the KL from itself to the end, and
all tokens of the step are whitened together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.config.online_rules import TOKEN_ADVANTAGES
from alignlab.config.trainers import GRPOConfig
from alignlab.functional import advantages as advantage_functions
from alignlab.functional.kl import kl_k1
from alignlab.functional.reduction import sequence_sum
from alignlab.functional.shaping import overlong_penalty
from alignlab.models.policy import Policy
from alignlab.trainers.objective import PolicyObjective
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.reduction import Weigh, constant, sequence_mean, sequence_means, token_mean
from alignlab.trainers.reward_evidence import is_compared_over_step
from alignlab.trainers.rollout_metrics import extremes
from alignlab.trainers.whitening import whiten
from alignlab.types import Experience, Rollout


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation; arguments are `OnlineTrainer`'s."""

    config: GRPOConfig
    objective: PolicyObjective

    def make_objective(self, config: GRPOConfig, policy: Policy) -> PolicyObjective:
        """The policy gradient."""
        return PolicyObjective(config, policy)

    @property
    def num_rounds(self) -> int:
        """Under dynamic sampling, groups that teach nothing are replaced."""
        return 1 + (self.config.max_refills if self.config.dynamic_sampling else 0)

    def keeps(self, rollout: Rollout) -> bool:
        """Whether a group teaches anything: under dynamic sampling, where its rewards differ."""
        mixed = advantage_functions.mixed_groups(torch.tensor([rollout.rewards]))
        return bool(mixed) or not self.config.dynamic_sampling

    def informative(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which groups [P] hold a completion whose reward, less its baseline, is not zero; the KL is left out of it."""
        rewards = self.shaped_rewards(rollouts)
        if is_compared_over_step(self.config):
            low, high = extremes(rewards, self.gather)
            return self.trainable(rollouts).any(dim=1) & (low < high)
        return ((advantage_functions.group_centered(rewards) != 0) & self.trainable(rollouts)).any(dim=1)

    @property
    def weigh(self) -> Weigh:
        """The reduction of `config.reduction`."""
        if self.config.reduction == "constant":
            return constant(self.config.sampling.max_new_tokens)
        return {"token_mean": token_mean, "sequence_mean": sequence_mean}[self.config.reduction]

    def credit(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """One advantage for all tokens of a completion, unless `config.advantage` tells its tokens apart."""
        if self.config.advantage in TOKEN_ADVANTAGES:
            return self._credit_tokens(rollouts, minibatches)
        advantages = self.advantages(rollouts, minibatches).to(self.learner.device)
        teaches = self.teaches(rollouts).to(self.learner.device)
        return advantages, [
            [spread(pack, advantages[part].flatten(), teaches[part].flatten()) for pack in packs]
            for part, packs in zip(self.minibatches(len(rollouts)), minibatches, strict=True)
        ]

    def advantages(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Tensor:
        """Advantage [P, G] of each completion; 0 where it has no reward."""
        rewards = self.shaped_rewards(rollouts)
        if self.objective.prices_kl:
            count = rewards.numel() // len(minibatches)
            rewards = rewards - self._price_of_kl(minibatches, count).view_as(rewards)
        if self.config.advantage == "batch_whitened":
            everyone = self.accelerator.gather(rewards.to(self.learner.device)).cpu()
            first = self.accelerator.process_index * len(rollouts)
            return advantage_functions.batch_whitened(everyone)[first : first + len(rollouts)]
        return getattr(advantage_functions, self.config.advantage)(rewards)

    def shaped_rewards(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Reward [P, G] of each completion, less the penalty for its length; nan where it has none."""
        rewards = torch.tensor([rollout.rewards for rollout in rollouts])
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
        """What each completion's KL costs in reward [P * G]; moves an adaptive coefficient afterwards.

        Args:
            count: completions of a mini-batch, those of no tokens included.
        """
        per_sequence = [self._sequence_kl(packs, count) for packs in minibatches]
        kl = torch.cat([values for values, _ in per_sequence])
        tokens = torch.cat([counts for _, counts in per_sequence])
        price = kl * self.objective.kl_coef if self.config.kl.placement == "reward" else torch.zeros_like(kl)
        if self.config.kl.target is not None:
            totals = self.learner.reduce_sum(torch.stack([kl.sum(), tokens.sum(), torch.tensor(float(len(kl)))]))
            total_kl, num_tokens, num_samples = totals.tolist()
            self.objective.adapt(total_kl / max(num_tokens, 1.0), int(num_samples))
        return price

    def _sequence_kl(self, packs: Sequence[Experience], num_sequences: int) -> tuple[Tensor, Tensor]:
        """KL to the reference (k1) and trained tokens of each sequence [B], on the host."""
        kl, tokens = torch.zeros(num_sequences), torch.zeros(num_sequences)
        for pack in packs:
            assert pack.old_logprobs is not None and pack.ref_logprobs is not None
            mask, sequence_ids = pack.completion_mask, pack.segments.sequence_of_token
            values = torch.where(mask, kl_k1(pack.old_logprobs, pack.ref_logprobs), 0.0)
            kl += sequence_sum(values, sequence_ids, num_sequences=num_sequences).cpu()
            tokens += sequence_sum(mask.float(), sequence_ids, num_sequences=num_sequences).cpu()
        return kl, tokens

    def _credit_tokens(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """An advantage for each token, see `rewards_to_go`; that of a completion is the mean of its tokens'."""
        rewards = self.shaped_rewards(rollouts)
        if self.config.advantage == "group_centered_whitened":
            rewards = advantage_functions.group_centered(rewards)
        rewards = rewards.nan_to_num(0.0).to(self.learner.device)
        teaches = self.teaches(rollouts).to(self.learner.device)
        in_reward = self.objective.prices_kl and self.config.kl.placement == "reward"
        coef = self.objective.kl_coef if in_reward else 0.0
        parts = self.minibatches(len(rollouts))
        credited = [
            [_with_returns(pack, rewards[part].flatten(), teaches[part].flatten(), coef) for pack in packs]
            for part, packs in zip(parts, minibatches, strict=True)
        ]
        if self.objective.prices_kl:
            self._price_of_kl(minibatches, rewards.numel() // len(minibatches))  # moves an adaptive coefficient
        credited = whiten(credited, self.learner.reduce_sum)
        means = [sequence_means(packs, rewards[part].numel()) for part, packs in zip(parts, credited, strict=True)]
        return torch.cat(means).view_as(rewards), credited


def _with_returns(pack: Experience, rewards: Tensor, teaches: Tensor, kl_coef: float) -> Experience:
    """The pack with the return of each token; sequences that do not teach [B] are masked out."""
    masked = replace(pack, completion_mask=pack.completion_mask & teaches[pack.segments.sequence_of_token.clamp(min=0)])
    kl = torch.zeros(pack.num_tokens, device=pack.tokens.device)
    if kl_coef > 0:
        assert pack.old_logprobs is not None and pack.ref_logprobs is not None
        kl = kl_k1(pack.old_logprobs, pack.ref_logprobs)
    returns = advantage_functions.rewards_to_go(
        rewards, kl, mask=masked.completion_mask, sequence_ids=pack.segments.sequence_of_token, kl_coef=kl_coef
    )
    return replace(masked, advantages=returns)


def spread(pack: Experience, advantages: Tensor, teaches: Tensor) -> Experience:
    """The pack with each sequence's advantage [B] on its tokens; sequences that do not teach [B] are masked out."""
    sequences = pack.segments.sequence_of_token.clamp(min=0)
    mask = pack.completion_mask & teaches[sequences]
    return replace(pack, completion_mask=mask, advantages=torch.where(mask, advantages[sequences], 0.0))
