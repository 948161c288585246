"""The loss of a policy gradient, one number a token: surrogate + KL penalty - entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config.trainers import GRPOConfig, OnPolicyDistillConfig, PPOConfig
from alignlab.errors import ConfigError
from alignlab.functional.kl import adapt_kl_coef, kl_k3, kl_loss
from alignlab.functional.policy_losses import cispo, clip_acts, gspo_clip, ppo_clip, reinforce
from alignlab.loop.algorithm import Algorithm, policy_learner
from alignlab.loop.correction import choose_correction, kept_by_length
from alignlab.loop.forward import PolicyForward
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.reference import Reference
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import model_dtype
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.types import Experience, Prompt

PolicyGradientSettings = GRPOConfig | PPOConfig | OnPolicyDistillConfig


class PolicyGradientAlgorithm(Algorithm):
    """An algorithm that follows the policy gradient; it still has to say how completions are credited.

    Args:
        policy_steps: steps that update the policy; default: all of the run.
        prompts: see `Algorithm`.

    Attributes:
        objective: the loss, with the coefficient of the KL.
    """

    trains_routing_policy = True
    trains_mtp = True

    def __init__(
        self,
        config: PolicyGradientSettings,
        inputs: OnlineInputs,
        *,
        policy_steps: int | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> None:
        policy = Policy(
            inputs.model, chunk_tokens=config.memory.logprob_chunk_tokens,
            kv_approximation=replayed_approximation(config.rollout, inputs.model),
        )
        self.objective = PolicyObjective(config, policy)
        forward = PolicyForward(config.sampling.temperature, entropy_grad=config.entropy_coef > 0)
        learner = policy_learner(config, inputs, policy, policy_steps=policy_steps, forward=forward)
        reference = Reference(learner) if self.objective.uses_reference else None
        self.routing = config.routing_replay
        super().__init__(config, inputs, learner, reference=reference, prompts=prompts)

    def needs(self, step: int) -> frozenset[str]:
        """Return what the objective needs."""
        return self.objective.needs(step)

    def loss(self, output: PolicyOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [N] of each token, and metrics [N]."""
        return self.objective(output, pack)

    def state(self) -> dict[str, Any]:
        """Return the coefficient of the KL, which may adapt."""
        return {"kl_coef": self.objective.kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.objective.kl_coef = state["kl_coef"]


class PolicyObjective:
    """The loss of a policy gradient, and what it needs.

    Args:
        config: the trainer's section.
        policy: in training.

    Attributes:
        uses_reference: whether log-probs of the reference are ever needed.
        correction: of the gap between engine and trainer.
        kl_coef: the present coefficient of the KL; an adaptive one moves.

    Raises:
        ConfigError: experts are to be replayed, and the model has none.
    """

    def __init__(self, config: PolicyGradientSettings, policy: Policy) -> None:
        self.config = config
        self.kl_coef = config.kl.coef
        self.uses_reference = config.kl.coef > 0 or config.kl.measure_every_steps is not None
        lm = causal_lm(policy.model)
        is_mixture = getattr(lm.config, "num_routers", 0) > 0
        if config.routing_replay != "rollout" and not is_mixture:
            raise ConfigError(
                f"routing_replay is {config.routing_replay}, and {type(lm).__name__} has no experts of ours to "
                "choose; leave it out"
            )
        self.correction = choose_correction(config.mismatch, config.rollout, model_dtype(lm), sparse=is_mixture)
        # A correction compares with the engine, which has no dropout; the loss's own log-probs have.
        self._has_dropout = self.correction.name != "none" and any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in policy.model.modules()
        )

    @property
    def prices_kl(self) -> bool:
        """Whether the KL must be known before the update: as part of the reward, or to adapt the coefficient."""
        kl = self.config.kl
        return kl.coef > 0 and (kl.placement == "reward" or kl.target is not None)

    def needs(self, step: int) -> frozenset[str]:
        """Return "old" if the policy moves before its log-probs are used again, "ref" if the KL counts or is shown."""
        kl = self.config.kl
        moves = self._has_dropout or self.config.num_epochs * self.config.num_minibatches > 1
        shown = kl.measure_every_steps is not None and step % kl.measure_every_steps == 0
        needed = {"old": moves or self.prices_kl, "ref": kl.coef > 0 or shown}
        return frozenset(name for name, is_needed in needed.items() if is_needed)

    def adapt(self, kl: float, num_samples: int) -> None:
        """Move an adaptive coefficient after a step of `num_samples` completions whose KL was `kl` nats a token."""
        settings = self.config.kl
        if settings.target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, kl, target=settings.target, horizon=settings.horizon, num_samples=num_samples
            )

    def __call__(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [N] of each token, and metrics [N]."""
        logprobs, config = output.logprobs, self.config
        old = logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs
        token_loss, ratio = self._surrogate(logprobs, old, experience)
        metrics = {"ratio": ratio, "clip_frac": self._clipped(ratio, experience).float()}
        metrics |= {"approx_kl": kl_k3(old, logprobs), "entropy": output.entropy}
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
        """Return the tokens [N] on which a bound of the surrogate acts."""
        assert experience.advantages is not None
        low, high = self.config.clip_low, self.config.clip_high
        match self.config.surrogate:
            case "reinforce":
                return torch.zeros_like(experience.completion_mask)
            case "cispo":
                return ratio > 1 + high
            case _:
                return clip_acts(ratio, experience.advantages, clip_low=low, clip_high=high)
