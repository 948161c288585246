"""PPO: a critic credits each token, by generalised advantages, with the KL to the reference as part of the reward.

Schulman et al. (2017), arXiv:1707.06347; on language models Ziegler et al. (2019), arXiv:1909.08593, and Ouyang et al.
(2022), arXiv:2203.02155. What it does not do: bootstrap the value of a completion that the length limit cut off, whose
reward is taken as final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.config.trainers import PPOConfig
from alignlab.functional.kl import kl_k1
from alignlab.functional.values import (
    explained_variance,
    gae,
    mean_and_variance,
    moments,
    token_rewards,
    value_loss,
)
from alignlab.models.critic import CriticOutput, make_critic
from alignlab.models.policy import Policy
from alignlab.trainers.learner import CriticLearner, Learner
from alignlab.trainers.objective import PolicyObjective
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.reduction import Weigh, sequence_means, token_mean
from alignlab.trainers.rollout_metrics import extremes
from alignlab.trainers.whitening import whiten
from alignlab.types import Experience, Rollout


class PPOTrainer(OnlineTrainer):
    """Proximal policy optimisation with a critic; arguments are `OnlineTrainer`'s.

    Attributes:
        critic_learner: the critic and its optimizer.
    """

    config: PPOConfig
    objective: PolicyObjective

    def make_objective(self, config: PPOConfig, policy: Policy) -> PolicyObjective:
        """The policy gradient."""
        return PolicyObjective(config, policy)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.critic_learner = CriticLearner(
            make_critic(self.learner.model, config.critic),
            config.model_copy(update={"learning_rate": config.critic.learning_rate or 10 * config.learning_rate}),
            self.accelerator,
            total_updates=config.num_steps * config.num_epochs * config.num_minibatches,
            updates_per_step=config.num_epochs * config.num_minibatches,
        )
        # Several ranks agree on a critic's weights by writing to all of the model's, the policy's among them.
        self.engine.update_weights(self.engine.policy_version + 1)

    @staticmethod
    def num_policy_steps(config: PPOConfig) -> int:
        """All but the first, in which the critic warms up."""
        return config.num_steps - config.critic.warmup_steps

    @property
    def learners(self) -> dict[str, Learner]:
        """Policy and critic."""
        return super().learners | {"critic-": self.critic_learner}

    def informative(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which groups [P] have a completion to train on, of a step whose rewards are not all equal: a critic of equal
        rewards can but learn that number, and the policy nothing. A step of a single completion counts."""
        rewards = torch.tensor([rollout.rewards for rollout in rollouts])
        low, high = extremes(rewards, self.gather)
        differ = low < high or self.config.num_prompts * self.config.group_size == 1
        return self.trainable(rollouts).any(dim=1) & differ

    @property
    def weigh(self) -> Weigh:
        """Every token of the step weighs the same."""
        return token_mean

    def credit(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """Advantages and returns of each token; a completion's is the mean of its tokens'."""
        rewards = torch.tensor([rollout.rewards for rollout in rollouts], device=self.learner.device)
        teaches = self.teaches(rollouts).to(self.learner.device)
        parts = self.minibatches(len(rollouts))
        credited = [
            self._credit_packs(packs, rewards[part].flatten(), teaches[part].flatten())
            for part, packs in zip(parts, minibatches, strict=True)
        ]
        everything = [pack for packs in credited for pack in packs]
        self._measure(everything, rewards.numel())
        if self.config.whiten_advantages:
            credited = whiten(credited, self.learner.reduce_sum)
        each = [
            sequence_means(packs, rewards[part].numel()) for part, packs in zip(parts, credited, strict=True)
        ]
        return torch.cat(each).view_as(rewards), credited

    def _credit_packs(self, packs: Sequence[Experience], rewards: Tensor, teaches: Tensor) -> list[Experience]:
        """The packs of one mini-batch with values, advantages and returns; what does not teach [B] is masked out."""
        config, credited = self.config, []
        masked = [
            replace(pack, completion_mask=pack.completion_mask & teaches[pack.segments.sequence_of_token.clamp(min=0)])
            for pack in packs
        ]
        for pack, values in zip(masked, self.critic_learner.values(masked), strict=True):
            mask, ids = pack.completion_mask, pack.segments.sequence_of_token
            kl, coef = torch.zeros_like(values), 0.0
            if self.objective.prices_kl and config.kl.placement == "reward":
                kl, coef = _kl(pack), self.objective.kl_coef
            steps = token_rewards(rewards.nan_to_num(0.0), kl, mask=mask, sequence_ids=ids, kl_coef=coef)
            advantages = gae(
                steps, values, mask=mask, sequence_ids=ids, num_sequences=len(rewards), gamma=config.gamma,
                lam=config.gae_lambda,
            )
            returns = torch.where(mask, advantages + values, 0.0)
            credited.append(replace(pack, values=values, advantages=advantages, returns=returns))
        return credited

    def _measure(self, packs: Sequence[Experience], num_samples: int) -> None:
        """How good the critic was before this step; and the step's KL, which moves an adaptive coefficient."""
        errors = [_returns(pack) - _values(pack) for pack in packs]
        of_returns = self._totals([_returns(pack) for pack in packs], packs)
        self.credit_metrics = {
            "explained_variance": explained_variance(of_returns, self._totals(errors, packs)),
            "returns": mean_and_variance(of_returns)[0],
            "values": mean_and_variance(self._totals([_values(pack) for pack in packs], packs))[0],
        }
        if self.objective.prices_kl:
            totals = self._totals([_kl(pack) for pack in packs], packs)
            kl = mean_and_variance(totals)[0]
            self.credit_metrics["kl_in_reward"] = kl
            if totals[0] > 0:  # no token is no KL of 0
                self.objective.adapt(kl, num_samples * self.accelerator.num_processes)

    def _totals(self, values: Sequence[Tensor], packs: Sequence[Experience]) -> Tensor:
        """Moments over the trained tokens of all packs and ranks."""
        own = sum(moments(value, pack.completion_mask) for value, pack in zip(values, packs, strict=True))
        assert isinstance(own, Tensor)
        return self.learner.reduce_sum(own)

    def learn(self, step: int, packs: Sequence[Experience]) -> dict[str, float]:
        """The critic's update and, once it is warm, the policy's."""
        found = self.critic_learner.update(packs, self.value_loss, self.weigh)
        metrics = {f"critic/{name}": value for name, value in found.items()}
        if step > self.config.critic.warmup_steps:
            metrics |= self.learner.update(packs, self.loss, self.weigh)
        return metrics

    def value_loss(self, output: CriticOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss [N] of each token's value."""
        loss, clipped = value_loss(
            output.values, _values(experience), _returns(experience), clip=self.config.critic.value_clip
        )
        return loss, {"clip_frac": clipped.float()}


def _values(pack: Experience) -> Tensor:
    assert pack.values is not None
    return pack.values


def _returns(pack: Experience) -> Tensor:
    assert pack.returns is not None
    return pack.returns


def _kl(pack: Experience) -> Tensor:
    assert pack.old_logprobs is not None and pack.ref_logprobs is not None
    return kl_k1(pack.old_logprobs, pack.ref_logprobs)

