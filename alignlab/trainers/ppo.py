"""PPO: a critic credits each token, by generalised advantages, with the KL to the reference as part of the reward.

Schulman et al. (2017), arXiv:1707.06347; on language models Ziegler et al. (2019), arXiv:1909.08593, and Ouyang et al.
(2022), arXiv:2203.02155. The value of a completion that the length limit cut off is not bootstrapped: its reward is
taken as final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.config.trainers import PPOConfig
from alignlab.functional.kl import kl_k1
from alignlab.functional.reduction import mean_and_variance, moments
from alignlab.functional.values import explained_variance, gae, token_rewards, value_loss
from alignlab.loop.algorithm import Credit, minibatch_slices, policy_learner, rewards_of
from alignlab.loop.credit import sequence_means, trained_part, whiten
from alignlab.loop.forward import critic_forward
from alignlab.loop.learner import Learner
from alignlab.loop.online import OnlineTrainer
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.rollout_metrics import extremes
from alignlab.models.critic import CriticOutput, make_critic
from alignlab.trainers.policy_gradient import PolicyGradientAlgorithm
from alignlab.types import Experience, Rollout


class PPO(PolicyGradientAlgorithm):
    """Proximal policy optimisation with a critic.

    Attributes:
        critic_learner: the critic and its optimizer.
    """

    trains_mtp = False  # a critic's copy of the layer would never learn

    config: PPOConfig

    def __init__(self, config: PPOConfig, inputs: OnlineInputs) -> None:
        critic = make_critic(inputs.model, config.critic)  # before the policy's weights are spread over ranks
        # The critic warms up alone in the first steps.
        super().__init__(config, inputs, policy_steps=config.num_steps - config.critic.warmup_steps)
        self.critic_learner = policy_learner(
            config.model_copy(update={"optim": config.critic_optim}),
            inputs,
            critic,
            forward=critic_forward,
            counts_experts=False,  # a mixture's routers are the policy's
            is_exported=False,
        )

    @property
    def learners(self) -> dict[str, Learner]:
        """Policy and critic."""
        return super().learners | {"critic-": self.critic_learner}

    def signal_groups(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which groups [P] have a completion to train on, in a step whose rewards are not all equal.

        From equal rewards a critic can learn that number alone, and the policy nothing. A step of one completion
        counts.
        """
        low, high = extremes(rewards_of(rollouts), self.ranks.gather)
        differ = low < high or self.config.num_prompts * self.config.group_size == 1
        return self.trained_completions(rollouts).any(dim=1) & differ

    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return advantages and returns of each token; a completion's advantage is the mean of its tokens'."""
        rewards = rewards_of(rollouts).to(self.learner.device)
        trainable = self.trainable_mask(rollouts).to(self.learner.device)
        parts = minibatch_slices(len(rollouts), self.config.num_minibatches)
        credited = [
            self._credit_packs(packs, rewards[part].flatten(), trainable[part].flatten())
            for part, packs in zip(parts, minibatches, strict=True)
        ]
        metrics = self._measure([pack for packs in credited for pack in packs], rewards.numel())
        if self.config.whiten_advantages:
            credited = whiten(credited, self.ranks.sum)
        means = [sequence_means(packs, rewards[part].numel()) for part, packs in zip(parts, credited, strict=True)]
        return Credit(torch.cat(means).view_as(rewards), credited, metrics)

    def _credit_packs(self, packs: Sequence[Experience], rewards: Tensor, trainable: Tensor) -> list[Experience]:
        """Return the packs of one mini-batch with values, advantages and returns of trainable sequences [B]."""
        config, credited = self.config, []
        masked = [trained_part(pack, trainable) for pack in packs]
        for pack, output in zip(masked, self.critic_learner.outputs(masked), strict=True):
            mask, ids, values = pack.completion_mask, pack.segments.sequence_of_token, output.values
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

    def _measure(self, packs: Sequence[Experience], num_samples: int) -> dict[str, float]:
        """Return how good the critic was before this step, and the step's KL, which moves an adaptive coefficient."""
        errors = [_returns(pack) - _values(pack) for pack in packs]
        of_returns = self._totals([_returns(pack) for pack in packs], packs)
        metrics = {
            "explained_variance": explained_variance(of_returns, self._totals(errors, packs)),
            "returns": mean_and_variance(of_returns)[0],
            "values": mean_and_variance(self._totals([_values(pack) for pack in packs], packs))[0],
        }
        if self.objective.prices_kl:
            totals = self._totals([_kl(pack) for pack in packs], packs)
            metrics["kl_in_reward"] = mean_and_variance(totals)[0]
            if totals[0] > 0:  # no token is no KL of 0
                self.objective.adapt(metrics["kl_in_reward"], num_samples * self.ranks.count)
        return metrics

    def _totals(self, values: Sequence[Tensor], packs: Sequence[Experience]) -> Tensor:
        """Return the moments over the trained tokens of all packs and ranks."""
        on_this_rank = [moments(value, pack.completion_mask) for value, pack in zip(values, packs, strict=True)]
        return self.ranks.sum(torch.stack(on_this_rank).sum(dim=0))

    def update(self, step: int, packs: Sequence[Experience]) -> dict[str, float]:
        """Update the critic and, once it is warm, the policy."""
        critic_metrics = self.critic_learner.update(packs, self.value_loss, self.loss_weights)
        metrics = {f"critic/{name}": value for name, value in critic_metrics.items()}
        if step > self.config.critic.warmup_steps:
            metrics |= super().update(step, packs)
        return metrics

    def value_loss(self, output: CriticOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [N] of each token's value."""
        loss, clipped = value_loss(
            output.values, _values(pack), _returns(pack), clip=self.config.critic.value_clip
        )
        return loss, {"clip_frac": clipped.float()}


class PPOTrainer(OnlineTrainer):
    """Trainer of PPO; arguments are `OnlineTrainer`'s."""

    config: PPOConfig
    algorithm_class = PPO


def _values(pack: Experience) -> Tensor:
    assert pack.values is not None
    return pack.values


def _returns(pack: Experience) -> Tensor:
    assert pack.returns is not None
    return pack.returns


def _kl(pack: Experience) -> Tensor:
    assert pack.old_logprobs is not None and pack.ref_logprobs is not None
    return kl_k1(pack.old_logprobs, pack.ref_logprobs)
