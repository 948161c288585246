"""GRPO and its family: the advantage of a completion is its reward against those of its own group; no critic.

GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), RLOO (arXiv:2402.14740), REINFORCE++
(arXiv:2501.03262), GSPO (arXiv:2507.18071), CISPO (arXiv:2506.13585): combinations of an advantage, a surrogate and a
reduction, named by `GRPOConfig.recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config.trainers import GRPOConfig
from alignlab.errors import ConfigError
from alignlab.functional import advantages as advantage_functions
from alignlab.functional.kl import adapt_kl_coef, kl_k1, kl_k3, kl_loss
from alignlab.functional.policy_losses import cispo, clip_acts, gspo_clip, ppo_clip, reinforce
from alignlab.functional.reduction import sequence_sum
from alignlab.functional.shaping import overlong_penalty
from alignlab.models.attention import causal_lm
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.mismatch import choose_correction, kept_by_length
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.reduction import Weigh, constant, sequence_mean, token_mean
from alignlab.types import Experience, Rollout


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation; arguments are `OnlineTrainer`'s."""

    config: GRPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl_coef = self.config.kl.coef
        lm = causal_lm(self.learner.model)
        sparse = bool(getattr(lm.config, "sparse_layers", None))
        if self.config.routing_replay != "rollout" and not sparse:
            raise ConfigError(
                f"routing_replay is {self.config.routing_replay}, and {type(lm).__name__} has no experts of ours to "
                "choose; leave it out"
            )
        self.correction = choose_correction(self.config.mismatch, self.config.rollout, lm.dtype, sparse=sparse)

    @property
    def prices_kl(self) -> bool:
        """Whether the KL of whole completions is known before the update: it is part of the reward, or steers."""
        kl = self.config.kl
        return kl.coef > 0 and (kl.placement == "reward" or kl.target is not None)

    def needs(self, step: int) -> frozenset[str]:
        """Old log-probs where the policy moves before they are used again; the reference's where KL counts or shows."""
        kl = self.config.kl
        # A correction compares with the engine, which has no dropout; the loss's own log-probs have.
        drops = self.correction.name != "none" and any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in self.learner.model.modules()
        )
        moves = drops or self.config.num_epochs * self.config.num_minibatches > 1
        shown = kl.measure_every_steps is not None and step % kl.measure_every_steps == 0
        wanted = {"old": moves or self.prices_kl, "ref": kl.coef > 0 or shown}
        return frozenset(name for name, needed in wanted.items() if needed)

    @property
    def weigh(self) -> Weigh:
        """The reduction of `config.reduction`."""
        if self.config.reduction == "constant":
            return constant(self.config.sampling.max_new_tokens)
        return {"token_mean": token_mean, "sequence_mean": sequence_mean}[self.config.reduction]

    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Tensor:
        """Advantage [P, G] of each completion; 0 where it has no reward."""
        rewards = torch.tensor([rollout.rewards for rollout in rollouts])
        if self.config.overlong_buffer_tokens is not None:
            lengths = torch.tensor([len(c.token_ids) for rollout in rollouts for c in rollout.completions])
            penalty = overlong_penalty(
                lengths,
                max_tokens=self.config.sampling.max_new_tokens,
                buffer_tokens=self.config.overlong_buffer_tokens,
                factor=self.config.overlong_penalty,
            )
            rewards = rewards + penalty.view_as(rewards)
        if self.prices_kl:
            count = rewards.numel() // len(minibatches)
            rewards = rewards - self._price_of_kl(minibatches, count).view_as(rewards)
        if self.config.advantage == "batch_whitened":
            everyone = self.accelerator.gather(rewards.to(self.learner.device)).cpu()
            first = self.accelerator.process_index * len(rollouts)
            return advantage_functions.batch_whitened(everyone)[first : first + len(rollouts)]
        return getattr(advantage_functions, self.config.advantage)(rewards)

    def _price_of_kl(self, minibatches: Sequence[Sequence[Experience]], count: int) -> Tensor:
        """What each completion's KL costs in reward [P * G]; moves an adaptive coefficient afterwards.

        Args:
            count: completions of a mini-batch, those of no tokens included.
        """
        per_sequence = [self._sequence_kl(packs, count) for packs in minibatches]
        kl = torch.cat([values for values, _ in per_sequence])
        tokens = torch.cat([counts for _, counts in per_sequence])
        price = kl * self.kl_coef if self.config.kl.placement == "reward" else torch.zeros_like(kl)
        if self.config.kl.target is not None:
            totals = self.learner.reduce_sum(torch.stack([kl.sum(), tokens.sum(), torch.tensor(float(len(kl)))]))
            total_kl, num_tokens, num_samples = totals.tolist()
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                total_kl / max(num_tokens, 1.0),
                target=self.config.kl.target,
                horizon=self.config.kl.horizon,
                num_samples=int(num_samples),
            )
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

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Surrogate + KL penalty - entropy bonus, each token [N]."""
        logprobs, config = output.logprobs, self.config
        old = logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs
        token_loss, ratio = self._surrogate(logprobs, old, experience)
        metrics = {"ratio": ratio, "clip_frac": self._clipped(ratio, experience).float()}
        metrics["approx_kl"] = kl_k3(old, logprobs)
        if output.routing_disagreement is not None:
            metrics["routing_disagreement"] = output.routing_disagreement
        if experience.rollout_logprobs is not None:
            weights = self.correction.weights(old, experience)
            token_loss = token_loss * weights
            # Of the weights that sampled: later updates of a batch move the policy, and that is no gap.
            metrics["rollout_gap"] = (old - experience.rollout_logprobs).abs()
            metrics |= kept_by_length(weights, experience, config.sampling.max_new_tokens)
        if experience.ref_logprobs is not None:
            metrics["kl"] = kl_k3(logprobs, experience.ref_logprobs)
            metrics["kl_coef"] = torch.full_like(ratio, self.kl_coef)
            if config.kl.coef > 0 and config.kl.placement == "loss":
                kl = kl_loss(logprobs, experience.ref_logprobs, old, estimator=config.kl.estimator)
                token_loss = token_loss + self.kl_coef * kl
        if config.entropy_coef > 0:
            token_loss = token_loss - config.entropy_coef * output.entropy
        return token_loss, metrics

    def _surrogate(self, logprobs: Tensor, old: Tensor, experience: Experience) -> tuple[Tensor, Tensor]:
        advantages, config = experience.advantages, self.config
        assert advantages is not None
        match config.surrogate:
            case "ppo_clip":
                return ppo_clip(
                    logprobs,
                    old,
                    advantages,
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    dual_clip=config.dual_clip,
                )
            case "gspo_clip":
                sequence_ids = experience.segments.sequence_of_token
                return gspo_clip(
                    logprobs,
                    old,
                    advantages,
                    mask=experience.completion_mask,
                    sequence_ids=sequence_ids,
                    num_sequences=1 + max(experience.segments.sequence_ids),
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                )
            case "cispo":
                return cispo(logprobs, old, advantages, clip_high=config.clip_high)
            case "reinforce":
                return reinforce(logprobs, advantages)

    def _clipped(self, ratio: Tensor, experience: Experience) -> Tensor:
        """Tokens [N] on which a bound of the surrogate acts."""
        assert experience.advantages is not None
        low, high = self.config.clip_low, self.config.clip_high
        match self.config.surrogate:
            case "reinforce":
                return torch.zeros_like(experience.completion_mask)
            case "cispo":
                return ratio > 1 + high
            case _:
                return clip_acts(ratio, experience.advantages, clip_low=low, clip_high=high)

    def state(self) -> dict[str, Any]:
        """The loop's state and the KL coefficient."""
        return super().state() | {"kl_coef": self.kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        super().load_state(state)
        self.kl_coef = state["kl_coef"]
