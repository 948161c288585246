"""One method of learning from rollouts, as an object that the online loop has.

A step of the loop asks an algorithm, in this order: `has_signal` and `signal_groups` of the groups that the source
sampled, `pack`, `needs` (which log-probs to compute), `credit`, and `update` once for each mini-batch, which trains by
`loss` and `loss_weights`. To add a method, derive from `Algorithm`; `trainers/grpo.py` is the shortest example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from alignlab.config.trainers import OnlineConfig
from alignlab.data.packing import pack_rollouts
from alignlab.loop.learner import Learner
from alignlab.loop.loss_weights import LossWeights, token_mean
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.pack_logprobs import with_logprobs
from alignlab.loop.reference import Reference
from alignlab.models.mtp import check_trains
from alignlab.models.routers.uses import compare_logprobs
from alignlab.types import Experience, Prompt, Rollout

if TYPE_CHECKING:
    from alignlab.loop.source import RolloutSource

SampleGroups = Callable[[Sequence[Prompt], int], list[Rollout]]
"""(prompts, seed) -> one scored group of completions for each prompt, in order."""


@dataclass(frozen=True)
class Credit:
    """Rollouts turned into what is trained on.

    Attributes:
        advantages: [P, G] of each completion, for the store of rollouts; the mean over its tokens where these differ.
        minibatches: packs of each mini-batch, with all that the loss needs.
        metrics: of the step.
    """

    advantages: Tensor
    minibatches: list[list[Experience]]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Algorithm(ABC):
    """A method of learning from rollouts, with what it trains.

    Args:
        config: the trainer's section.
        inputs: model, tokenizer, prompts and rewards of the run.
        learner: of the policy.
        reference: where log-probs of the reference are ever needed.
        prompts: those of `inputs` that the algorithm can use; default: all.

    Attributes:
        routing: experts that a mixture trains with: the rollout's, the trainer's before the update, or its routers'
            own choice ("none"); see `PolicyGradientConfig.routing_replay`.
        trains_routing_policy: whether losses are of tokens, from which a router can learn by REINFORCE.
        trains_mtp: whether a layer for multi-token prediction is trained.
    """

    trains_routing_policy: ClassVar[bool] = False
    trains_mtp: ClassVar[bool] = False

    routing: Literal["rollout", "trainer", "none"] = "rollout"

    def __init__(
        self,
        config: OnlineConfig,
        inputs: OnlineInputs,
        learner: Learner,
        *,
        reference: Reference | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> None:
        self.config, self.learner, self.reference = config, learner, reference
        compare_logprobs(
            learner.model, type(self).__name__, replays=self.routing != "none", per_token=self.trains_routing_policy
        )
        check_trains(learner.model, type(self).__name__, trains_mtp=self.trains_mtp)
        self.ranks, self.rewards = learner.ranks, inputs.rewards
        self.prompts = inputs.prompts if prompts is None else prompts

    @classmethod  # noqa: B027
    def check_arguments(cls, config: Any, *, has_rewards: bool) -> None:
        """Raise a ConfigError if the settings and the rewards of a run do not fit; nothing by default."""

    # What the source asks.

    @property
    def num_rounds(self) -> int:
        """Rounds of sampling in a step, until enough groups have a signal."""
        return 1

    def has_signal(self, rollout: Rollout) -> bool:
        """Return whether a group is kept rather than replaced by another round's."""
        return True

    def sampling(self, source: RolloutSource) -> SampleGroups:
        """Return how groups are sampled: by default by the engine, and scored by the rewards."""
        return source.sample

    # Which completions and groups are trained on.

    def not_truncated(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which completions [P, G] have an end, or need none."""
        is_cut = [[completion.finish_reason == "length" for completion in r.completions] for r in rollouts]
        return ~(torch.tensor(is_cut) & self.config.mask_truncated)

    def trainable_mask(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which completions [P, G] are trained on: those with a reward and, under `mask_truncated`, an end."""
        return self.not_truncated(rollouts) & ~rewards_of(rollouts).isnan()

    def trained_completions(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which completions [P, G] are trained on and have a token."""
        lengths = [[len(completion.token_ids) for completion in r.completions] for r in rollouts]
        return self.trainable_mask(rollouts) & (torch.tensor(lengths) > 0)

    def signal_groups(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which groups [P] can move the policy; every rank calls this together.

        By default those with a completion to train on, as where a teacher judges each of them.
        """
        return self.trained_completions(rollouts).any(dim=1)

    # From rollouts to an update.

    def pack(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """Return the packs of a mini-batch: all its completions."""
        return pack_rollouts(rollouts, budget=self.config.memory.tokens_per_microbatch)

    def needs(self, step: int) -> frozenset[str]:
        """Return the log-probs that are computed before the updates of a step: "old", "ref"."""
        return frozenset()

    def with_logprobs(self, step: int, packs: Sequence[Experience]) -> list[Experience]:
        """Return the packs of a mini-batch, on the learner's device, with the log-probs that the step needs."""
        return with_logprobs(packs, self.needs(step), self.learner, self.reference, routing=self.routing)

    @abstractmethod
    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return the advantage of each completion and token; every rank calls this together.

        Args:
            rollouts: of the step.
            minibatches: their packs, cut between groups by `minibatch_slices`.
        """

    @property
    def loss_weights(self) -> LossWeights:
        """Weight of each loss in the step: by default the same for every trained token."""
        return token_mean

    @abstractmethod
    def loss(self, output: Any, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the losses [N] of a pack's tokens, or [P] of its pairs; and metrics of the same shape."""

    def update(self, step: int, packs: Sequence[Experience]) -> dict[str, float]:
        """Take one optimizer step on a mini-batch, and return its metrics."""
        return self.learner.update(packs, self.loss, self.loss_weights)

    # What a run keeps.

    @property
    def learners(self) -> dict[str, Learner]:
        """All that is trained, by the prefix of its tensors in a checkpoint."""
        return {"": self.learner}

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """Modules beside those in training: a copy of the policy as the reference, a teacher."""
        return [] if self.reference is None or self.reference.policy is None else [self.reference.policy]

    @property
    def models_beside(self) -> dict[str, str]:
        """Description of each model beside the policy that a user has named, by its part, such as "teacher"."""
        return {}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each frozen model beside the policy, by name."""
        return {} if self.reference is None else self.reference.fingerprints

    def state(self) -> dict[str, Any]:
        """Return what the algorithm needs to go on, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state` gave."""


def policy_learner(
    config: Any, inputs: OnlineInputs, module: Any, *, policy_steps: int | None = None, **options: Any
) -> Learner:
    """Return the learner of a policy that is updated `num_epochs * num_minibatches` times a step.

    Args:
        policy_steps: steps that update it; default: all of the run.
        options: see `Learner`.
    """
    per_step = config.num_epochs * config.num_minibatches
    total = (config.num_steps if policy_steps is None else policy_steps) * per_step
    return Learner(module, config, inputs.accelerator, total_updates=total, updates_per_step=per_step, **options)


def minibatch_slices(num_rollouts: int, num_minibatches: int) -> list[slice]:
    """Return which rollouts of a step are in each mini-batch."""
    size = -(-num_rollouts // num_minibatches)
    return [slice(start, start + size) for start in range(0, num_rollouts, size)]


def rewards_of(rollouts: Sequence[Rollout]) -> Tensor:
    """Return the reward [P, G] of each completion; nan where it has none."""
    return torch.tensor([rollout.rewards for rollout in rollouts])
