"""The loss of a policy that learns from rollouts, a number for each token: surrogate + KL penalty - entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from alignlab.errors import ConfigError
from alignlab.functional.kl import adapt_kl_coef, kl_k3, kl_loss
from alignlab.functional.policy_losses import cispo, clip_acts, gspo_clip, ppo_clip, reinforce
from alignlab.models.attention import causal_lm
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.mismatch import choose_correction, kept_by_length
from alignlab.types import Experience

if TYPE_CHECKING:
    from alignlab.config.trainers import GRPOConfig, OnPolicyDistillConfig, PPOConfig


class Objective(Protocol):
    """What the policy of a run from rollouts minimises, and what must be known for it.

    Attributes:
        uses_reference: whether log-probs of the reference are ever asked for.
        entropy_grad: whether the loss uses the entropy with a gradient.
        routing: which experts a mixture is trained with, see `PolicyGradientConfig.routing_replay`.
    """

    uses_reference: bool
    entropy_grad: bool
    routing: Literal["rollout", "trainer", "none"]

    def needs(self, step: int) -> frozenset[str]:
        """What is scored before the updates of a step: "old", "ref"."""
        ...

    def __call__(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each token [N], and metrics [N]."""
        ...

    def state(self) -> dict[str, Any]:
        """What it needs to go on, as JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        ...


class PolicyObjective:
    """The loss of a policy gradient; an `Objective`.

    Args:
        config: the trainer's section.
        policy: in training.

    Attributes:
        correction: of the gap between engine and trainer.
        kl_coef: as it is now; an adaptive one moves.

    Raises:
        ConfigError: experts are to be replayed, and the model has none.
    """

    def __init__(self, config: GRPOConfig | PPOConfig | OnPolicyDistillConfig, policy: Policy) -> None:
        self.config = config
        self.kl_coef = config.kl.coef
        self.uses_reference = config.kl.coef > 0 or config.kl.measure_every_steps is not None
        self.entropy_grad = config.entropy_coef > 0
        self.routing = config.routing_replay
        lm = causal_lm(policy.model)
        sparse = bool(getattr(lm.config, "sparse_layers", None))
        if config.routing_replay != "rollout" and not sparse:
            raise ConfigError(
                f"routing_replay is {config.routing_replay}, and {type(lm).__name__} has no experts of ours to "
                "choose; leave it out"
            )
        self.correction = choose_correction(config.mismatch, config.rollout, lm.dtype, sparse=sparse)
        # A correction compares with the engine, which has no dropout; the loss's own log-probs have.
        self._drops = self.correction.name != "none" and any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in policy.model.modules()
        )

    @property
    def prices_kl(self) -> bool:
        """Whether the KL is known before the update: it is part of the reward, or steers."""
        kl = self.config.kl
        return kl.coef > 0 and (kl.placement == "reward" or kl.target is not None)

    def needs(self, step: int) -> frozenset[str]:
        """Old log-probs where the policy moves before they are used again; the reference's where KL counts or shows."""
        kl = self.config.kl
        moves = self._drops or self.config.num_epochs * self.config.num_minibatches > 1
        shown = kl.measure_every_steps is not None and step % kl.measure_every_steps == 0
        wanted = {"old": moves or self.prices_kl, "ref": kl.coef > 0 or shown}
        return frozenset(name for name, needed in wanted.items() if needed)

    def state(self) -> dict[str, Any]:
        """The coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.kl_coef = state["kl_coef"]

    def adapt(self, kl: float, num_samples: int) -> None:
        """Move an adaptive coefficient, after a step of `num_samples` completions whose KL was `kl` nats a token."""
        settings = self.config.kl
        if settings.target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, kl, target=settings.target, horizon=settings.horizon, num_samples=num_samples
            )

    def __call__(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each token [N], and metrics [N]."""
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
